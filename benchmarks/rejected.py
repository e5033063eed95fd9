"""What was tried on a CPU and rejected, against what is done: `python -m benchmarks rejected`.

The experts' products with other numbers of experts at a time and by plain autograd; the prices of bounded choice from
all tokens in the paper's hundred rounds, and from the sample in fewer, with the score that each reaches.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modeling_ecmoe import bounded_ecmoe, experts_ecmoe
from modeling_ecmoe.bounded_ecmoe import choose_tokens_within_bounds

from .harness import TrainingStep, interleaved, summarize, table
from .machine import save
from .peers import Sizes, blocks

OURS = "as it is"
PRODUCTS = {  # D, I, E, T, c
    "tiny": (128, 352, 8, 1024, 1),
    "many experts": (256, 512, 128, 4096, 1),
    "small": (512, 1408, 8, 2048, 2),
    "middle": (1024, 2816, 16, 4096, 2),
}
PARTS = {OURS: None, "one expert at a time": 1, "2 MiB": 2 << 20, "16 MiB": 16 << 20, "all experts at once": 1 << 60}
POOLS = ((2048, 8), (4096, 16), (4096, 64))
PRICES: dict[str, dict[str, int]] = {OURS: {}, "all tokens": {"SAMPLE": 1 << 30}, "20 rounds": {"ROUNDS": 40}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks rejected", description=__doc__.splitlines()[0])
    parser.add_argument("--products", nargs="+", default=list(PRODUCTS), choices=PRODUCTS)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {"rounds": options.rounds}
    for name in options.products:
        rows = summarize(interleaved(products(*PRODUCTS[name]), options.rounds), OURS)
        figures[f"products, {name}"] = rows
        print(f"\nproducts, {name}: D, I, E, T, c = {PRODUCTS[name]}\n\n{table(rows, OURS)}", flush=True)
    for num_tokens, num_experts in POOLS:
        rows = prices(num_tokens, num_experts, options.rounds)
        figures[f"choice within [0, 3], {num_tokens} tokens, {num_experts} experts"] = rows
        print(f"\nchoice within [0, 3], {num_tokens} tokens, {num_experts} experts\n\n{table(rows, OURS)}")
        print("score over that of all tokens:", {way: round(row["score"], 5) for way, row in rows.items()}, flush=True)
    print(save("rejected", figures))


def products(hidden: int, width: int, experts: int, tokens: int, capacity: int) -> dict[str, Callable[[], object]]:
    """Forward and backward of dispatched rows through the experts, some of them at a time."""
    torch.manual_seed(0)
    block: Any = blocks(Sizes(hidden, width, experts, capacity), ())["expert choice"]
    stacked, weights = block.experts, list(block.experts.parameters())
    rows = torch.randn(capacity * tokens, hidden)
    grad = torch.randn_like(rows)

    def autograd(rows: Tensor) -> Tensor:
        parts = zip(rows.chunk(experts), stacked.gate_up_proj.unbind(), stacked.down_proj.unbind(), strict=True)
        linear = nn.functional.linear
        return torch.cat([linear(stacked._apply_gate(linear(own, up)), down) for own, up, down in parts])

    ours = TrainingStep(lambda rows: stacked._equal_rows(rows, len(rows) // experts), rows, grad, weights)

    def way(part_bytes: int | None) -> Callable[[], object]:
        def step() -> None:
            with _set(experts_ecmoe, {} if part_bytes is None else {"_PART_BYTES": part_bytes}):
                ours()

        return step

    steps = {name: way(size) for name, size in PARTS.items()}
    steps["one at a time, plain autograd"] = TrainingStep(autograd, rows, grad, weights)
    return steps


def prices(num_tokens: int, num_experts: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time of the whole choice, and its score over that with prices from all tokens."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, num_tokens, num_experts, generator=generator).softmax(-1)

    def choose(changed: dict[str, int]) -> float:
        with _set(bounded_ecmoe, changed):
            return choose_tokens_within_bounds(scores, 2, 0, 3).scores.sum().item()

    rows = summarize(interleaved({name: lambda c=c: choose(c) for name, c in PRICES.items()}, rounds), OURS)  # type: ignore[misc]
    best = choose(PRICES["all tokens"])
    return {name: row | {"score": choose(PRICES[name]) / best} for name, row in rows.items()}


@contextmanager
def _set(module: Any, values: dict[str, int]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


if __name__ == "__main__":
    main()
