"""One rank of two: a step under DistributedDataParallel, and how far its thresholds are from those of one process.

Started by torch.distributed.run; prints a JSON object, one entry per way to accumulate.
"""

import contextlib
import json

import torch
from conftest import build_model, random_tokens
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modeling_ecmoe.calibration_ecmoe import sparse_blocks


def thresholds_after_step(model: nn.Module, wrapped: nn.Module, batches: list[Tensor], sync_always: bool) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for number, ids in enumerate(batches, start=1):
        is_waiting = number < len(batches) and not sync_always and wrapped is not model
        with wrapped.no_sync() if is_waiting else contextlib.nullcontext():
            wrapped(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(block.gate.threshold_updates == 1 for block in sparse_blocks(model).values())
    return torch.cat([block.gate.threshold for block in sparse_blocks(model).values()])


def main() -> None:
    torch.set_num_threads(1)
    batches = [[random_tokens(2, 9, seed=10 * rank + number) for number in range(3)] for rank in range(2)]
    alone = {}
    for count in (1, 3):
        model = build_model("Llama").train()
        flat = [ids for each in batches for ids in each[:count]]
        alone[count] = thresholds_after_step(model, model, flat, sync_always=True)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    errors = {}
    for way, count, sync_always in (("one batch", 1, True), ("no_sync", 3, False), ("sync always", 3, True)):
        model = build_model("Llama").train()
        found = thresholds_after_step(model, DistributedDataParallel(model), batches[rank][:count], sync_always)
        gathered = [torch.empty_like(found) for _ in range(2)]
        torch.distributed.all_gather(gathered, found)
        errors[way] = max((one - alone[count]).abs().max().item() for one in gathered)
    if rank == 0:
        print(json.dumps(errors))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
