"""What a rank of test_expert_parallel.py runs: a block with its experts spread over the ranks against a whole one."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.parallel import CountSent, make_block, spread
from modeling_ecmoe import use_inference_routing

SIZE = (16, 24, 8, 36, 1)  # D, I, E, T of one rank, c
BATCH = 3


def compare(implementation: str, pool: str) -> dict[str, Any]:
    """Largest difference, over the ranks, of outputs and gradients, with expert choice and where a threshold routes,
    so that every rank has another number of rows for every expert; and what the all-to-alls of expert choice carry."""
    whole = make_block(SIZE)
    parallel = spread(make_block(SIZE), implementation)
    torch.manual_seed(torch.distributed.get_rank())
    inputs, grad = torch.randn(2, BATCH, SIZE[3] // BATCH, SIZE[0]).unbind()
    for block in (whole, parallel):
        block.config.routing_pool = pool
        block.gate.threshold.fill_(0.13)
    with CountSent() as counter:
        found = results(parallel, inputs, grad)
    apart = [differences(found, results(whole, inputs, grad))]
    with use_inference_routing(parallel), use_inference_routing(whole):
        apart += [differences(results(parallel, inputs, grad), results(whole, inputs, grad))]
    largest = torch.tensor(apart)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return {"apart": largest.max().item(), "bytes": counter.nbytes, "calls": counter.calls}


def unequal() -> str:
    """What is said when the ranks hold other numbers of tokens."""
    block = spread(make_block(SIZE), "equal_splits")
    tokens = torch.randn(1, SIZE[3] * (1 + torch.distributed.get_rank()), SIZE[0])
    try:
        block(tokens)
    except ValueError as error:
        return str(error)
    return "nothing"


def results(block: Any, inputs: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients; those of a spread block's experts are of this rank's alone, from all ranks' tokens."""
    own = inputs.clone().requires_grad_()
    block.zero_grad()
    output = block(own)
    output.backward(grad)
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    gradients = {name: g.to_local() if hasattr(g, "to_local") else g for name, g in gradients.items()}
    return {"output": output.detach(), "inputs": own.grad} | {name: g.clone() for name, g in gradients.items()}


def differences(found: dict[str, Tensor], whole: dict[str, Tensor]) -> float:
    rank = torch.distributed.get_rank()
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        torch.distributed.all_reduce(whole[name])
        whole[name] = whole[name].chunk(torch.distributed.get_world_size())[rank]
    return max((found[name] - whole[name]).abs().max().item() for name in whole)
