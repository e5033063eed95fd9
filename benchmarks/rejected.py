"""What was tried on a CPU and rejected, against what is done: `python -m benchmarks rejected`.

The experts' products with other numbers of experts at a time and by plain autograd; the prices of bounded choice in
more and fewer rounds and by the paper's projections, with the score that each reaches and how far their thresholds are
from giving every expert its share.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modeling_ecmoe import experts_ecmoe
from modeling_ecmoe.bounded_ecmoe import Prices, choose_tokens_within_bounds, expert_shares
from modeling_ecmoe.routing_ecmoe import ExpertChoice, routes_by_threshold

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
POOLS = ((2048, 8, 0), (4096, 16, 0), (4096, 16, 3), (4096, 64, 0))  # tokens, experts, skew of the router
BEST = "100 rounds"
LEAST, MOST, FACTOR = 0, 3, 2
_OF = Prices.of


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks rejected", description=__doc__.splitlines()[0])
    parser.add_argument("--products", nargs="+", default=list(PRODUCTS), choices=PRODUCTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--selections", type=int, default=15, help="rounds of the choices, which are short")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {"rounds": options.rounds, "selections": options.selections}
    for name in options.products:
        rows = summarize(interleaved(products(*PRODUCTS[name]), options.rounds), OURS)
        figures[f"products, {name}"] = rows
        print(f"\nproducts, {name}: D, I, E, T, c = {PRODUCTS[name]}\n\n{table(rows, OURS)}", flush=True)
    for num_tokens, num_experts, skew in POOLS:
        name = f"choice within [0, 3], {num_tokens} tokens, {num_experts} experts, skew {skew}"
        figures[name] = rows = prices(num_tokens, num_experts, skew, options.selections)
        print(f"\n{name}\n\n{table(rows, OURS)}")
        for way, row in rows.items():
            print(f"{way}: score {row['score']:.5f} of {BEST}, load within {row['load']:.1%}", flush=True)
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


def prices(num_tokens: int, num_experts: int, skew: float, rounds: int) -> dict[str, dict[str, float]]:
    """Time of the whole choice; its score over the best; and the largest distance of a load from its share, over the
    share, by the threshold rule. skew: the router's logits favour some experts over others by up to twice that."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, num_tokens, num_experts, generator=generator) + torch.linspace(-skew, skew, num_experts)
    scores = logits.softmax(-1)

    def choose(changed: dict[str, Any]) -> ExpertChoice:
        with _set(Prices, changed):
            return choose_tokens_within_bounds(scores, FACTOR, LEAST, MOST)

    ways: dict[str, dict[str, Any]] = {
        OURS: {},
        BEST: {"of": lambda prices, scores: _OF(prices, scores, 100)},
        "3 rounds": {"of": lambda prices, scores: _OF(prices, scores, 3)},
        "4 plain rounds": {"of": lambda prices, scores: halfway(prices, scores, 4)},
        "8 plain rounds": {"of": lambda prices, scores: halfway(prices, scores, 8)},
        "4 rounds on 1,024 tokens": {"of": sampled},
        "50 projections of 1,024 tokens": {"of": projected},
    }
    rows = summarize(interleaved({name: lambda c=c: choose(c) for name, c in ways.items()}, rounds), OURS)  # type: ignore[misc]
    best = choose(ways[BEST]).scores.sum().item()
    share = FACTOR * num_tokens / num_experts
    for name, row in rows.items():
        choice = choose(ways[name])
        load_E = routes_by_threshold(scores[0], choice.threshold, LEAST, MOST).sum(0)
        row |= {"score": choice.scores.sum().item() / best, "load": (load_E / share - 1).abs().max().item()}
    return rows


def halfway(prices: Prices, scores_PEN: Tensor, rounds: int) -> Tensor:
    """[P, E] without acceleration."""
    price_PE = prices._quantile(scores_PEN)
    for _ in range(rounds):
        price_PE = (price_PE + prices._asked(scores_PEN, price_PE)) / 2
    return price_PE


def sampled(prices: Prices, scores_PEN: Tensor) -> Tensor:
    """[P, E] from a sample of the tokens, for pools without padding."""
    stride = scores_PEN.shape[2] // 1024
    sample_PEN = scores_PEN[..., ::stride].contiguous()
    shares = expert_shares(sample_PEN.transpose(1, 2), FACTOR, MOST, None)
    return _OF(Prices(FACTOR, LEAST, MOST, shares, None), sample_PEN)


def projected(prices: Prices, scores_PEN: Tensor) -> Tensor:
    """[P, E] from Dykstra's projections of a sample, as in Zhou et al. 2022 (arXiv 2202.09368, appendix), for pools
    without padding and without a lower bound: over-relaxed, and with an entropy term that shrinks to the paper's."""
    num_tokens = scores_PEN.shape[2]
    scores_PNE = scores_PEN[..., :: num_tokens // 1024].transpose(1, 2)
    log_share_P1E = (prices.share_PE * 1024 / num_tokens).log()[:, None, :]
    price_P1E, grant_PN1 = torch.zeros_like(log_share_P1E), torch.zeros_like(scores_PNE[..., :1])
    clip_PNE = torch.zeros_like(scores_PNE)
    for number in range(50):
        scale = max(1e-3 ** (number / 40), 1e-3)
        worth_PNE = scores_PNE + grant_PN1 - clip_PNE
        projected_P1E = scale * ((worth_PNE / scale).logsumexp(1, keepdim=True) - log_share_P1E)
        price_P1E = torch.lerp(price_P1E, projected_P1E, 1.5 if number else 1.0)
        sum_PN1 = ((scores_PNE - price_P1E - clip_PNE) / scale).logsumexp(2, keepdim=True)
        grant_PN1 = -scale * (sum_PN1 - math.log(prices.most)).clamp(min=0)
        clip_PNE = (scores_PNE - price_P1E + grant_PN1).clamp(min=0)
    return price_P1E.squeeze(1)


@contextmanager
def _set(module: Any, values: dict[str, Any]) -> Iterator[None]:
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
