"""How the block's cost grows: `python -m benchmarks scaling`.

Forward and backward of our block over tokens T, experts E and capacity factor c, a plot in docs/scaling.png. T and c
multiply the FLOPs, so the exponent of the time is 1 where it is linear; E does not, so the time should be flat.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from modeling_ecmoe.block_ecmoe import EcMoeBlock

from .harness import TrainingStep, device, interleaved
from .machine import save
from .peers import Sizes

PLOT = Path(__file__).parents[1] / "docs" / "scaling.png"
SIZES = {"cpu": Sizes(256, 512, 8, 1), "cuda": Sizes(2048, 1408, 8, 2)}
TOKENS = 16_384  # where E or c moves; with fewer, the reading of 128 experts' weights is what one would see
LABELS = {"T": "tokens T", "E": "experts E", "c": "capacity factor c"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024 * 2**n for n in range(7)], help="1k to 64k")
    parser.add_argument("--experts", type=int, nargs="+", default=[4 * 2**n for n in range(6)], help="4 to 128")
    parser.add_argument("--capacities", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds of a step; larger T are left out")
    parser.add_argument("--dtype", default="bfloat16" if device() == "cuda" else "float32")
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args(arguments)
    figures = measure(SIZES[device()], TOKENS, options)
    for axis, panel in figures["panels"].items():
        print(f"\n| {axis} | ms per 1,000 tokens |\n| ---: | ---: |")
        print("\n".join(f"| {value} | {point['ms per 1,000 tokens']:.2f} |" for value, point in panel.items()))
    print(f"\nexponents of a step's time: {figures['exponents']}; over E most / least: {figures['over E']:.2f}")
    draw(figures, options.plot)
    print(save(f"scaling-{device()}", figures))


def measure(sizes: Sizes, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per 1,000 tokens over each of T, E and c; the others stay at `sizes` and `tokens`."""
    dtype = getattr(torch, options.dtype)
    over: dict[str, Any] = {"T": options.tokens, "E": options.experts, "c": options.capacities}
    panels: dict[str, dict[Any, dict[str, float]]] = {}
    left_out = []
    for axis, values in over.items():
        steps = {}
        for value in values:
            own: Any = {"T": tokens, "E": sizes.experts, "c": sizes.active} | {axis: value}
            step = block_step(Sizes(sizes.hidden, sizes.width, own["E"], own["c"]), own["T"], dtype)
            if axis == "T" and interleaved({"": step}, 1, warmup=0)[""][0] > options.longest:
                left_out += [other for other in values if other >= value]
                break
            steps[value] = step
        if not steps:
            sys.exit(f"--longest {options.longest} leaves no T: a step of {values[0]} tokens takes longer")
        seconds = interleaved(steps, options.rounds)
        panels[axis] = {value: _point(found, int(value) if axis == "T" else tokens) for value, found in seconds.items()}
    flat = [point["seconds"] for point in panels["E"].values()]
    return {
        "sizes": sizes.json(),
        "tokens": tokens,
        "rounds": options.rounds,
        "dtype": options.dtype,
        "left out, a step would exceed --longest": left_out,
        "panels": panels,
        "exponents": {axis: exponent(panels[axis]) for axis in ("T", "c")},
        "over E": max(flat) / min(flat),
    }


def block_step(sizes: Sizes, tokens: int, dtype: torch.dtype) -> Any:
    """A training step of our block on random tokens."""
    torch.manual_seed(0)
    block = EcMoeBlock(sizes.ecmoe(), LlamaMLP).to(device(), dtype).train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    inputs, grad = torch.randn(2, 1, tokens, sizes.hidden, device=device()).to(dtype).unbind()
    return TrainingStep(block, inputs, grad)


def _point(seconds: list[float], tokens: int) -> dict[str, float]:
    middle = statistics.median(seconds)
    return {"seconds": middle, "least": min(seconds), "ms per 1,000 tokens": middle / tokens * 1e6}


def exponent(panel: dict[Any, dict[str, float]]) -> float | None:
    """p of time ~ x^p, by least squares on logarithms; None of a single point."""
    if len(panel) < 2:
        return None
    x, y = ([math.log(value) for value in values] for values in (panel, (p["seconds"] for p in panel.values())))
    return round(statistics.linear_regression(x, y).slope, 3)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Three panels, milliseconds per 1,000 tokens over T, E and c."""
    from matplotlib.figure import Figure

    sizes, tokens = figures["sizes"], figures["tokens"]
    fixed = {"T": f"E = {sizes['experts']}, c = {sizes['active']}"}
    fixed |= {"E": f"T = {tokens:,}, c = {sizes['active']}", "c": f"T = {tokens:,}, E = {sizes['experts']}"}
    figure = Figure(figsize=(10, 3.2), dpi=110, layout="constrained")
    for axes, (axis, panel) in zip(figure.subplots(1, 3), figures["panels"].items(), strict=True):
        values = [float(value) for value in panel]
        axes.plot(values, [point["ms per 1,000 tokens"] for point in panel.values()], "o-", color="#2563eb")
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value // 1024:.0f}k" if value >= 1024 else f"{value:g}" for value in values])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(LABELS[axis])
        axes.set_ylabel("ms per 1,000 tokens")
        axes.set_title(fixed[axis], fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Block, forward + backward: D = {sizes['hidden']}, I = {sizes['width']}, {figures['dtype']}, {device()}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
