"""Run by torchrun: one optimiser step of a model sharded by FSDP2, against the same step of the whole model.

An argument is the number of experts. Prints a JSON object on rank 0: the largest differences of thresholds and of
gradients, the dtypes and the number of updates.
"""

import copy
import json
import os
import sys

import torch
import torch.distributed as dist
from conftest import build_model, random_tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from modeling_ecmoe import sparse_blocks


def ddp_gradient_difference(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Largest difference of DDP's gradients from the mean of what the ranks get without it."""
    alone, wrapped = copy.deepcopy(model), torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    alone(ids, labels=ids).loss.backward()
    wrapped(ids, labels=ids).loss.backward()
    worst = 0.0
    for mine, theirs in zip(alone.parameters(), wrapped.module.parameters(), strict=True):
        dist.all_reduce(mine.grad)
        worst = max(worst, (mine.grad / dist.get_world_size() - theirs.grad).abs().max().item())
    for router in (module.gate for each in (alone, wrapped) for module in sparse_blocks(each).values()):
        router.has_pending = False  # this step is never taken
    return worst


def mixed(model: torch.nn.Module, mesh: object, ids: torch.Tensor) -> dict:
    """The dtypes of a step whose weights arrive in bfloat16, and how far scores are from those of rounded weights."""
    weight = model.model.layers[0].mlp.gate.weight.detach().bfloat16()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen: list[torch.Tensor] = []

    def see(_: object, args: tuple, output: tuple) -> None:
        expected = torch.nn.functional.linear(args[0].float(), weight.float())
        seen.append((output[0] - expected).abs().max())
        seen.append(output[1])

    model.model.layers[0].mlp.gate.register_forward_hook(see)
    model(ids, labels=ids).loss.backward()
    gate = sparse_blocks(model)["model.layers.0.mlp"].gate
    return {
        "mixed": [str(seen[1].dtype), str(gate.threshold.dtype), str(gate.weight.grad.dtype)],
        "mixed error": seen[0].item(),
    }


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    experts = int(sys.argv[1])
    whole = build_model("Llama", num_experts=experts, capacity_factor=min(experts, 1.5)).train()
    sharded, untrained = copy.deepcopy(whole), copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    ids = random_tokens(ranks, 24)[rank : rank + 1]  # each rank its own pool
    gradients = ddp_gradient_difference(whole, ids)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (whole, sharded)]
    for model in (whole, sharded):
        model(ids, labels=ids).loss.backward()
    of_shards = 0.0
    for mine, theirs in zip(whole.parameters(), sharded.parameters(), strict=True):
        mean = mine.grad.clone()
        dist.all_reduce(mean)
        of_shards = max(of_shards, (mean / ranks - theirs.grad.full_tensor()).abs().max().item())
    for optimizer in optimizers:
        optimizer.step()
    pairs = list(zip(sparse_blocks(whole).values(), sparse_blocks(sharded).values(), strict=True))
    worst = max((a.gate.threshold - b.gate.threshold).abs().max().item() for a, b in pairs)
    state = sharded.state_dict()
    found = {
        "gradients": gradients,
        "gradients of shards": of_shards,
        "difference": worst,
        "updates": [int(b.gate.threshold_updates) for _, b in pairs],
        "dtypes": sorted({str(tensor.dtype) for name, tensor in state.items() if name.endswith("gate.threshold")}),
        "sharded": all(hasattr(b.experts.gate_up_proj, "full_tensor") for _, b in pairs),
        "moved": min(b.gate.threshold.abs().min().item() for _, b in pairs),
    }
    found |= mixed(untrained, mesh, ids)
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Without the interpreter's end, where a thread of gloo that still holds a tensor aborts the process now and then
    # (pytorch/pytorch#190489); the meshes of FSDP keep such threads also when their groups are destroyed.
    sys.stdout.flush()
    os._exit(0)
