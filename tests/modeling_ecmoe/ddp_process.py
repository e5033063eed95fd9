"""One rank of two: what a step under DistributedDataParallel gives, and how far it is from that of one process.

Started by torch.distributed.run; prints a JSON object, one entry per comparison.
"""

import contextlib
import json
import os
import sys

import torch
from conftest import build_model, random_tokens
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modeling_ecmoe.calibration_ecmoe import sparse_blocks

GLOBAL_POOLS = {
    "plain": {},
    "bounded": {"min_experts_per_token": 1, "max_experts_per_token": 2},
    "balanced, normalised": {
        "min_experts_per_token": 1,
        "max_experts_per_token": 1,
        "capacity_factor": 1,
        "normalize_combine_weights": True,
    },
    "sigmoid, complement": {
        "router_score_function": "sigmoid",
        "shared_expert_intermediate_size": 16,
        "shared_expert_weighting": "complement",
    },
}
HALVES = {"equal": (2, 2), "unequal": (1, 3), "another length": (2, 2)}


def thresholds_after_step(model: nn.Module, wrapped: nn.Module, batches: list[Tensor], sync_always: bool) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for number, ids in enumerate(batches, start=1):
        is_waiting = number < len(batches) and not sync_always and wrapped is not model
        with wrapped.no_sync() if is_waiting else contextlib.nullcontext():
            wrapped(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(block.gate.threshold_updates == 1 for block in sparse_blocks(model).values())
    return torch.cat([block.gate.threshold for block in sparse_blocks(model).values()])


def halves(kind: str) -> list[dict[str, Tensor]]:
    """The sequences of each rank, a padded one among them; padded to the longest of the rank alone."""
    batches = []
    for rank, rows in enumerate(HALVES[kind]):
        ids = random_tokens(rows, 9, seed=rank)
        mask = torch.ones_like(ids)
        mask[0, : 3 + rank] = 0
        if kind == "another length" and rank == 1:
            mask[:, 7:] = 0
            ids, mask = ids[:, :7], mask[:, :7]
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def together(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All sequences in one batch, padded on the right to one length."""
    length = max(batch["input_ids"].shape[1] for batch in batches)
    return {
        name: torch.cat([nn.functional.pad(batch[name], (0, length - batch[name].shape[1])) for batch in batches])
        for name in batches[0]
    }


def summed_step(model: nn.Module, wrapped: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the real tokens [R, V], and thresholds and gradients of a sum over them, which adds up over ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    logits_RV = wrapped(**batch).logits[batch["attention_mask"].bool()]
    logits_RV.square().sum().backward()
    values = {f"gradient of {name}": parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, block in sparse_blocks(model).items():
        values[f"threshold of {name}"] = block.gate.threshold.clone()
    return logits_RV.detach(), values


def largest_error(found: Tensor, wanted: Tensor) -> float:
    """Relative to the largest entry."""
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


def global_pool_errors(rank: int, fields: dict, kind: str, alone: tuple[Tensor, dict[str, Tensor]]) -> dict[str, float]:
    model = build_model("Llama", **fields, routing_pool="global").double().train()
    batches = halves(kind)
    logits, values = summed_step(model, DistributedDataParallel(model), batches[rank])
    wanted_logits, wanted = alone
    counts = [int(batch["attention_mask"].sum()) for batch in batches]
    errors = {"outputs": largest_error(logits, wanted_logits.split(counts)[rank]), "gradients": 0.0, "thresholds": 0.0}
    for name, value in values.items():
        is_gradient = name.startswith("gradient")  # of which DistributedDataParallel takes the mean
        error = largest_error(2 * value if is_gradient else value, wanted[name])
        what = "gradients" if is_gradient else "thresholds"
        errors[what] = max(errors[what], error)
    return errors


def largest_of_ranks(errors: dict[str, float]) -> dict[str, float]:
    gathered = torch.tensor(list(errors.values()), dtype=torch.float64)
    torch.distributed.all_reduce(gathered, torch.distributed.ReduceOp.MAX)
    return dict(zip(errors, gathered.tolist(), strict=True))


def main() -> None:
    torch.set_num_threads(1)
    batches = [[random_tokens(2, 9, seed=10 * rank + number) for number in range(3)] for rank in range(2)]
    alone = {}
    for count in (1, 3):
        model = build_model("Llama").train()
        flat = [ids for each in batches for ids in each[:count]]
        alone[count] = thresholds_after_step(model, model, flat, sync_always=True)
    whole = {}
    for pool, fields in GLOBAL_POOLS.items():
        for kind in HALVES:
            model = build_model("Llama", **fields, routing_pool="global").double().train()
            whole[pool, kind] = summed_step(model, model, together(halves(kind)))

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    errors: dict[str, float | dict[str, float]] = {}
    for way, count, sync_always in (("one batch", 1, True), ("no_sync", 3, False), ("sync always", 3, True)):
        model = build_model("Llama").train()
        found = thresholds_after_step(model, DistributedDataParallel(model), batches[rank][:count], sync_always)
        errors |= largest_of_ranks({way: (found - alone[count]).abs().max().item()})
    for (pool, kind), expected in whole.items():
        errors[f"{pool}, {kind}"] = largest_of_ranks(global_pool_errors(rank, GLOBAL_POOLS[pool], kind, expected))
    # Negative control: pools of each rank by itself.
    model = build_model("Llama").double().train()
    logits, _ = summed_step(model, DistributedDataParallel(model), halves("equal")[rank])
    counts = [int(batch["attention_mask"].sum()) for batch in halves("equal")]
    apart = largest_error(logits, whole["plain", "equal"][0].split(counts)[rank])
    errors |= largest_of_ranks({"a pool of each rank": apart})
    if rank == 0:
        print(json.dumps(errors))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    # Without the interpreter's end, where a thread of gloo that still holds a tensor aborts the process now and then
    # (pytorch/pytorch#190489); the meshes of FSDP keep such threads also when their groups are destroyed.
    sys.stdout.flush()
    os._exit(0)
