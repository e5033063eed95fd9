"""The whole model in training: `python -m benchmarks model [--compile]`.

Forward with labels, backward, and the optimiser's step, of our model, of the dense one with the same active FLOPs, and
of Mixtral with each of its implementations. The optimiser reads and writes every weight, and a sparse model has E / c
times the FFN weights of the dense one, so forward + backward is timed apart from the whole step.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .harness import device, interleaved_laps, summarize
from .machine import save
from .peers import Sizes, models

REFERENCE = "dense"
SIZES = {  # and the batch B, S
    "cpu": (Sizes(512, 1408, 8, 2, layers=4, vocabulary=8192), (4, 512)),
    "cuda": (Sizes(2048, 2816, 16, 2, layers=12, heads=16, vocabulary=32_000, positions=4096), (8, 2048)),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks model", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True) ours and the dense model")
    parser.add_argument("--dtype", default="bfloat16" if device() == "cuda" else "float32")
    parser.add_argument("--layers", type=int, help="other than the preset's")
    options = parser.parse_args(arguments)
    sizes, batch = SIZES[device()]
    sizes = replace(sizes, layers=options.layers or sizes.layers)
    figures = measure(sizes, batch, getattr(torch, options.dtype), options.rounds, options.compile)
    print(f"D, I, E, k = {sizes.hidden}, {sizes.width}, {sizes.experts}, {sizes.active}; B, S = {batch}\n")
    print(markdown(figures["rows"]))
    for name, counted in figures["compilations"].items():
        print(f"\n{name}: {counted['graphs']} compilation(s), {counted['breaks']} graph breaks")
    print(save(f"model-{device()}{'-compiled' if options.compile else ''}", {"dtype": options.dtype, **figures}))


def measure(sizes: Sizes, batch: tuple[int, int], dtype: torch.dtype, rounds: int, compiles: bool) -> dict[str, Any]:
    """Seconds and ratios to the dense model of forward + backward, the optimiser alone, and both.

    batch: B, S of the random tokens. Two batches of that shape take turns.
    """
    torch.manual_seed(0)
    batches = [torch.randint(sizes.vocabulary, batch, device=device()) for _ in range(2)]
    compared = models(sizes, dtype, device())
    laps: dict[str, Sequence[Callable[[], object]]] = {}
    compilations = {}
    for name, model in compared.items():
        model.train()
        model.config.use_cache = False
        forward: Callable[..., Any] = model
        if compiles and name != "Mixtral":
            forward = torch.compile(model, fullgraph=True)
            compilations[name] = count_compilations(forward, batches)
        if name != "Mixtral":
            laps[name] = phases(model, forward, batches)
            continue
        for implementation in ("grouped_mm", "eager"):  # one after the other: they share weights and moments
            laps[f"Mixtral {implementation}"] = phases(model, model, batches, implementation)
    seconds = interleaved_laps(laps, rounds)
    parts = {
        "forward + backward": {name: [one[0] for one in values] for name, values in seconds.items()},
        "optimiser": {name: [one[1] for one in values] for name, values in seconds.items()},
        "whole step": {name: [sum(one) for one in values] for name, values in seconds.items()},
    }
    return {
        "sizes": sizes.json(),
        "batch": batch,
        "rounds": rounds,
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in compared.items()},
        "rows": {part: summarize(values, REFERENCE) for part, values in parts.items()},
        "spread": {name: _spread(values) for name, values in parts["whole step"].items()},
        "compilations": compilations,
    }


def phases(
    model: PreTrainedModel, forward: Callable[..., Any], batches: list[Tensor], implementation: str | None = None
) -> list[Callable[[], object]]:
    """The two parts of a step: forward and backward on the next batch, and AdamW's update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    turn = 0

    def learn() -> None:
        nonlocal turn
        if implementation is not None:
            model.set_experts_implementation(implementation)
        optimizer.zero_grad()
        turn += 1
        tokens = batches[turn % len(batches)]
        forward(input_ids=tokens, labels=tokens).loss.backward()

    return [learn, optimizer.step]


def count_compilations(forward: Callable[..., Any], batches: list[Tensor]) -> dict[str, int]:
    """Graphs compiled and graph breaks met over these batches, of one model by itself."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    for tokens in batches:
        forward(input_ids=tokens, labels=tokens).loss.backward()
    found = {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    counters.clear()
    return found


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"least": min(seconds), "median": statistics.median(seconds), "most": max(seconds)}


def markdown(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """One line per model; a time and its ratio to the dense model's for each part of the step."""
    parts = list(rows)
    lines = ["| | " + " | ".join(f"{part}, ms | over dense" for part in parts) + " |"]
    lines.append("| --- |" + " ---: |" * 2 * len(parts))
    for name in rows[parts[0]]:
        cells = [f"{rows[part][name]['seconds'] * 1e3:.0f} | {rows[part][name]['ratio']:.2f}" for part in parts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
