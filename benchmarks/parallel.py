"""Expert parallelism over gloo: `python -m benchmarks parallel`.

A training step of one sparse block, forward and backward, whose experts are spread over 2 and 4 processes: our
`equal_splits` against Transformers' `all_to_all`, on the same rows and weights, alternating. Also the bytes that
leave a process, counted where the collectives are called.
"""

import argparse
import copy
import multiprocessing
import os
import socket
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.models.llama.modeling_llama import LlamaMLP

from modeling_ecmoe import EcMoeLlamaConfig
from modeling_ecmoe.block_ecmoe import EcMoeBlock

from .harness import interleaved
from .machine import save

IMPLEMENTATIONS = ("all_to_all", "equal_splits")
SIZES = {  # D, I, E, T of one process, c
    "tiny": (64, 128, 8, 256, 1),
    "small": (256, 512, 8, 1024, 2),
    "middle": (512, 1408, 8, 2048, 2),
    "many experts": (512, 256, 64, 2048, 2),
}
_PLAN = {
    "experts.gate_up_proj": "grouped_gemm",
    "experts.down_proj": "grouped_gemm",
    "experts": "ep_dispatch_experts",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks parallel", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {"sizes": {name: SIZES[name] for name in options.sizes}, "rounds": options.rounds}
    print("| processes | size | all_to_all ms | equal_splits ms | ratio | bytes, all_to_all | equal_splits | least |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for ranks in options.ranks:
        for name in options.sizes:
            row = on_ranks(ranks, measure, SIZES[name], options.rounds)
            figures[f"{ranks} processes, {name}"] = row
            seconds, sent = row["seconds"], row["bytes"]
            print(
                f"| {ranks} | {name} | {seconds['all_to_all'] * 1e3:.1f} | {seconds['equal_splits'] * 1e3:.1f} | "
                f"{row['ratio']:.2f} | {sent['all_to_all']:,} | {sent['equal_splits']:,} | {row['least']:,} |",
                flush=True,
            )
    print(save("parallel", figures))


def measure(size: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """On each rank of a process group: seconds, bytes sent in a step, and how far the results are apart."""
    hidden, _, experts, tokens, capacity = size
    torch.manual_seed(torch.distributed.get_rank())
    inputs, grad = torch.randn(2, 1, tokens, hidden).unbind()
    blocks = {name: spread(make_block(size), name) for name in IMPLEMENTATIONS}
    steps = {name: _step(block, inputs, grad) for name, block in blocks.items()}
    seconds = interleaved(steps, rounds)
    results = {name: step() for name, step in steps.items()}
    sent = {}
    for name, step in steps.items():
        with CountSent() as counter:
            step()
        sent[name] = counter.nbytes
    slowest = {name: _slowest(values) for name, values in seconds.items()}
    return {
        "seconds": {name: statistics.median(values) for name, values in slowest.items()},
        "ratio": statistics.median(a / b for a, b in zip(slowest["equal_splits"], slowest["all_to_all"], strict=True)),
        "bytes": sent,
        "least": 2 * 2 * experts * -(-capacity * tokens // experts) * hidden * inputs.element_size(),
        "difference": max((one - other).abs().max().item() for one, other in zip(*results.values(), strict=True)),
    }


def _slowest(seconds: list[float]) -> list[float]:
    """Of each round, over the ranks: a step ends when its last rank has ended."""
    slowest = torch.tensor(seconds, dtype=torch.float64)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    return slowest.tolist()


def make_block(size: tuple[int, ...]) -> EcMoeBlock:
    """A block with the same random weights on every rank."""
    hidden, width, experts, _, capacity = size
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": width, "num_experts": experts}
    config = EcMoeLlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=8, capacity_factor=capacity)
    config._experts_implementation = "grouped_mm"  # as from_pretrained chooses
    block = EcMoeBlock(config, LlamaMLP)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return block.train()


def spread(block: EcMoeBlock, implementation: str) -> EcMoeBlock:
    """The block with an equal part of its experts on every rank of the process group."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(), 1), mesh_dim_names=("ep", "tp"))
    apply_expert_parallelism(block, mesh["ep"], mesh["tp"], _PLAN, implementation)
    return block


def _step(block: EcMoeBlock, inputs: Tensor, grad: Tensor) -> Callable[[], list[Tensor]]:
    def step() -> list[Tensor]:
        own = inputs.clone().requires_grad_()
        block.zero_grad()
        output = block(own)
        output.backward(grad)
        weights = [parameter.grad for parameter in block.parameters()]
        local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in weights if grad is not None]
        return [output.detach(), own.grad, *map(copy.copy, local)]  # type: ignore[list-item]

    return step


class CountSent(TorchDispatchMode):
    """Bytes that this rank hands to all-to-alls while the mode is on, its own part included, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all" in func.name() or "alltoall" in func.name():
            sent = args[0] if "functional" in func.name() else args[1]
            self.nbytes += sent.numel() * sent.element_size()
            self.calls += 1
        return func(*args, **(kwargs or {}))


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns on rank 0 of so many new processes that talk over gloo."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.parallel"])
    queue = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, queue, function, arguments), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = queue.get()
    for process in processes:
        process.join()
    if isinstance(found, Exception):
        raise found
    return found


def _rank(rank: int, ranks: int, port: int, queue: Any, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        found = function(*arguments)
    except Exception as error:
        queue.put(error)
        raise
    if rank == 0:
        queue.put(found)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
