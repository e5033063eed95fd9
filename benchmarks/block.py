"""The sparse block in training, forward and backward: `python -m benchmarks block`.

Against the bare matrix products on rows that are dispatched already (the limit; also by torch.bmm and grouped_mm, to
choose the fastest), a dense FFN of the same FLOPs, and Transformers' Mixtral block with each of its implementations at
as many active experts per token. Beside the time stands the memory that is kept for backward.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .harness import TrainingStep, device, interleaved, summarize
from .machine import save
from .peers import Sizes, blocks

LIMIT = "matrix products"
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
    figures: dict[str, Any] = {}
    for size in options.sizes:
        for dtype in options.dtypes:
            steps = candidates(*SIZES[size], getattr(torch, dtype), device(), options.compile)
            rows = summarize(interleaved(steps, options.rounds, warmup=min(2, options.rounds - 1)), LIMIT)
            for name, row in rows.items():
                row["kept_bytes"] = steps[name].kept_bytes()
            figures[f"{size} {dtype}"] = {"D, I, E, T, c": SIZES[size], "rounds": options.rounds, "rows": rows}
            print(f"\n{size} {dtype}: D, I, E, T, c = {SIZES[size]}\n\n{_table(rows)}", flush=True)
    print(save(f"block-{device()}{'-compiled' if options.compile else ''}", figures))


def _table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"| | ms | over {LIMIT} | kept for backward, MB |", "| --- | ---: | ---: | ---: |"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['seconds'] * 1e3:.1f} | {row['ratio']:.2f} | {row['kept_bytes'] / 1e6:.1f} |")
    return "\n".join(lines)


def candidates(
    hidden: int, width: int, experts: int, tokens: int, capacity: int, dtype: torch.dtype, place: str, compiles: bool
) -> dict[str, TrainingStep]:
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
    steps = {
        name: TrainingStep(
            torch.compile(block) if compiles and name in ("expert choice", "dense FFN") else block,
            *((rows, row_grad) if name == "dense FFN" else (inputs, grad)),
        )
        for name, block in compared.items()
    }

    ours: Any = compared["expert choice"]
    weights = list(ours.experts.parameters())
    for name, function in _products(ours.experts, capacity * tokens // experts).items():
        steps[name] = TrainingStep(function, rows, row_grad, weights)
    return steps


def _products(experts: Any, rows_per_expert: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to take dispatched rows [1, E * C, D] through the experts; the first is the one that the block takes."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    offsets = rows_per_expert * torch.arange(1, len(down) + 1, dtype=torch.int32, device=down.device)

    def bmm(rows: Tensor) -> Tensor:
        rows_ECD = rows.view(len(down), rows_per_expert, -1)
        hidden = experts._apply_gate(torch.bmm(rows_ECD, gate_up.mT))
        return torch.bmm(hidden, down.mT).view_as(rows)

    def grouped_mm(rows: Tensor) -> Tensor:
        hidden = experts._apply_gate(nn.functional.grouped_mm(rows[0], gate_up.mT, offs=offsets))
        return nn.functional.grouped_mm(hidden, down.mT, offs=offsets)[None]

    ours = {LIMIT: lambda rows: experts._equal_rows(rows[0], rows_per_expert)[None]}
    return ours | {f"{LIMIT}, bmm": bmm, f"{LIMIT}, grouped_mm": grouped_mm}


if __name__ == "__main__":
    main()
