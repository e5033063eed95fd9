"""Router and selection alone: `python -m benchmarks router`.

Forward and backward of scores, choice and combine weights, as a share of the block's training step; and the choice
within bounds on a token's experts against the plain choice.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from modeling_ecmoe.block_ecmoe import EcMoeBlock
from modeling_ecmoe.bounded_ecmoe import choose_tokens_within_bounds
from modeling_ecmoe.routing_ecmoe import choose_tokens, combine_weights

from .harness import TrainingStep, device, interleaved, summarize, table
from .machine import save
from .peers import Sizes

SIZES = {  # and T
    "small": (Sizes(512, 1408, 8, 2), 2048),
    "middle": (Sizes(1024, 2816, 16, 2), 4096),
    "large": (Sizes(4096, 7168, 32, 2), 16_384),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks router", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["small", "middle"], choices=SIZES)
    parser.add_argument("--dtype", default="bfloat16" if device() == "cuda" else "float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--selections", type=int, default=30, help="rounds of the selections, which are short")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {"dtype": options.dtype, "rounds": options.rounds, "selections": options.selections}
    for name in options.sizes:
        sizes, tokens = SIZES[name]
        steps = parts(sizes, tokens, getattr(torch, options.dtype))
        rows = summarize(interleaved(steps, options.rounds), "block")
        chosen = summarize(interleaved(selections(sizes, tokens), options.selections), "plain")
        figures[name] = {"sizes": sizes.json(), "tokens": tokens, "parts": rows, "selection": chosen}
        print(f"\n{name}: D, I, E, T, c = {sizes.hidden}, {sizes.width}, {sizes.experts}, {tokens}, {sizes.active}")
        print(f"\n{table(rows, 'the block')}\n\n{table(chosen, 'plain choice')}", flush=True)
    print(save(f"router-{device()}", figures))


def parts(sizes: Sizes, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Training steps: of the block, of all it does before the dispatch, and of that with each bound."""
    torch.manual_seed(0)
    inputs = torch.randn(1, tokens, sizes.hidden, device=device()).to(dtype)
    steps: dict[str, Callable[[], object]] = {}
    for name, (least, most) in bounds(sizes).items():
        fields = {"min_experts_per_token": least, "max_experts_per_token": most}
        block = EcMoeBlock(sizes.ecmoe(**fields), LlamaMLP).to(device(), dtype).train()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        if name == "plain":
            steps["block"] = TrainingStep(block, inputs, torch.randn_like(inputs))
        rows = choose(block, inputs)
        label = "router + choice" + ("" if name == "plain" else f", {name}")
        steps[label] = TrainingStep(
            lambda hidden, block=block: choose(block, hidden), inputs, torch.randn_like(rows), [block.gate.weight]
        )
    return steps


def choose(block: EcMoeBlock, hidden_states: Tensor) -> Tensor:
    """hidden_states [1, T, D] -> combine weights [E * C]: what the block does before it dispatches."""
    _, scores_TE, _ = block.gate(hidden_states[0], jitter=True)
    choice = block.choose_in_pools(scores_TE[None], None, learning=True)
    block.record(choice.threshold, len(scores_TE))
    weight_R = choice.scores.masked_fill(~choice.is_chosen, 0).flatten()
    return combine_weights(weight_R, choice.token_index.flatten(), len(scores_TE), normalize=False)[0]


def bounds(sizes: Sizes) -> dict[str, tuple[int, int | None]]:
    """Least and most experts of a token: none, the paper's cap, no token left out, and exactly c for every token."""
    capacity = int(sizes.active)
    return {
        "plain": (0, None),
        f"[0, {capacity + 1}]": (0, capacity + 1),
        f"[1, {sizes.experts}]": (1, None),
        f"[1, {capacity}]": (1, capacity),
    }


def selections(sizes: Sizes, tokens: int) -> dict[str, Callable[[], object]]:
    """The choice alone, without gradients: plainly and within each bound."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, tokens, sizes.experts, generator=generator).softmax(-1).to(device())
    found: dict[str, Callable[[], object]] = {}
    for name, (least, most) in bounds(sizes).items():
        if name == "plain":
            found[name] = lambda: choose_tokens(scores, sizes.active)
        else:
            found[name] = lambda least=least, most=most: choose_tokens_within_bounds(scores, sizes.active, least, most)
    return found


if __name__ == "__main__":
    main()
