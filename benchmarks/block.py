"""The sparse block in training, forward and backward: `python -m benchmarks block`.

Against the bare matrix products on rows that are dispatched already (the limit), a dense FFN of the same FLOPs, and
Transformers' Mixtral block with each of its implementations at as many active experts per token.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .harness import device, interleaved, summarize, table, training_step
from .machine import save
from .peers import Sizes, blocks

SIZES = {  # D, I, E, T, c
    "small": (512, 1408, 8, 2048, 2),
    "middle": (1024, 2816, 16, 4096, 2),
    "large": (4096, 7168, 32, 16_384, 2),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks block", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["small", "middle"], choices=SIZES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="torch.compile our block and the dense FFN")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {"sizes": {name: SIZES[name] for name in options.sizes}, "rounds": options.rounds}
    for size in options.sizes:
        for dtype in options.dtypes:
            steps = candidates(*SIZES[size], getattr(torch, dtype), device(), options.compile)
            rows = summarize(interleaved(steps, options.rounds), "matrix products")
            figures[f"{size} {dtype}"] = rows
            print(f"\n{size} {dtype}: D, I, E, T, c = {SIZES[size]}\n\n{table(rows, 'matrix products')}", flush=True)
    print(save(f"block-{device()}{'-compiled' if options.compile else ''}", figures))


def candidates(
    hidden: int, width: int, experts: int, tokens: int, capacity: int, dtype: torch.dtype, place: str, compiles: bool
) -> dict[str, Callable[[], object]]:
    """One training step, forward and backward, of each block; the same shapes and FLOPs in all of them."""
    torch.manual_seed(0)
    inputs = torch.randn(1, tokens, hidden, dtype=dtype, device=place)
    grad = torch.randn_like(inputs)
    rows = torch.randn(1, capacity * tokens, hidden, dtype=dtype, device=place)
    row_grad = torch.randn_like(rows)
    implementations: tuple[str, ...] = ("eager", "grouped_mm", "batched_mm")
    if 3 * capacity * tokens * width * hidden * dtype.itemsize > 10**9:
        implementations = implementations[:2]  # batched_mm copies the weights of each token's experts
    compared = blocks(Sizes(hidden, width, experts, capacity), implementations)
    for block in compared.values():
        block.to(place, dtype).train()
    steps: dict[str, Callable[[], object]] = {
        name: training_step(
            torch.compile(block) if compiles and name in ("expert choice", "dense FFN") else block,
            *((rows, row_grad) if name == "dense FFN" else (inputs, grad)),
        )
        for name, block in compared.items()
    }

    ours: Any = compared["expert choice"]

    def products(hidden_states: Tensor) -> Tensor:
        return ours.experts._equal_rows(hidden_states[0], capacity * tokens // experts)[None]

    steps["matrix products"] = training_step(products, rows, row_grad, list(ours.experts.parameters()))
    return steps


if __name__ == "__main__":
    main()
