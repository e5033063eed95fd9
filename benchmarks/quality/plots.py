"""The pictures: causal loss against tokens and seconds, arms of equal active FLOPs, and the domains of experts."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .data import MIXTURE
from .grid import ARMS, MAIN
from .tables import Groups, curve_loss

COLORS = {
    **{"dense": "#6b7280", "tc": "#d97706", "tcb": "#b45309", "tcq": "#dc2626"},
    **{"ec": "#2563eb", "ec0": "#7c3aed", "th": "#059669"},
}
DASHES = {
    "copy2": "-",
    "blend": "--",
    "shared": ":",
    "copy1": "-.",
    "": "-",
    "matched": ":",
    "halves": (0, (3, 1, 1, 1)),
    "quarters32": (0, (1, 1)),
}
# Arms of one panel: with as many FFNs per token each, and the dense model, which has one.
_PANELS = {
    1: {"tcq-copy1": "token choice (top-1)", "tcq-halves": "granular, halves", "tcq-quarters32": "granular, quarters"},
    2: {"tcq-copy2": "token choice (top-2)", "ec-copy2": "expert choice, copy", "ec-shared": "expert choice, shared"},
}
_RATES = {"gentle": 1e-3, "main": 1e-2}
_COLORS = {"tcq-copy1": "#d97706", "tcq-copy2": "#d97706", "tcq-halves": "#2563eb", "ec-copy2": "#2563eb"}
_COLORS |= {"tcq-quarters32": "#059669", "ec-shared": "#059669", "dense": "#6b7280"}


def draw_equal_flops(groups: Groups, path: Path) -> list[Path]:
    """A row for each number of FFNs per token, a column for each learning rate; means of the seeds that dense has too.

    The difference to the dense model at the same tokens is shown, since all curves fall by far more than they differ.
    """
    from matplotlib.figure import Figure

    if any((part, "mixture", "dense", "") not in groups for part in _RATES):
        return []
    figure = Figure(figsize=(9, 5.6), dpi=110, layout="constrained")
    panels = figure.subplots(len(_PANELS), len(_RATES), sharex=True, sharey="row")
    for row, (ffns, arms) in zip(panels, _PANELS.items(), strict=True):
        for axes, (part, rate) in zip(row, _RATES.items(), strict=True):
            dense = groups[part, "mixture", "dense", ""]
            axes.axhline(0, color=_COLORS["dense"], linewidth=1.5)
            for arm, label in arms.items():
                found = groups.get((part, "mixture", arm, ""), {})
                seeds = sorted(found.keys() & dense.keys())
                if not seeds:
                    continue
                _, tokens, ours = mean_curve({seed: found[seed] for seed in seeds})
                theirs = mean_curve({seed: dense[seed] for seed in seeds})[2]
                above = [a - b for a, b in zip(ours, theirs, strict=True)]
                note = "" if len(seeds) > 1 else ", one seed"
                axes.plot([n / 1e6 for n in tokens], above, color=_COLORS[arm], label=label + note)
                assert ARMS[arm].ffns == ffns
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{('One FFN', 'Two FFNs')[ffns - 1]} per token, learning rate {rate:g}", fontsize=10)
            axes.legend(fontsize=8, loc="best", title="grey: dense, one FFN", title_fontsize=8)
        row[0].set_ylabel("loss minus the dense model's, nats")
    for axes in panels[-1]:
        axes.set_xlabel("million tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return [path]


def draw(groups: Groups, path: Path, step_seconds: dict[str, float]) -> list[Path]:
    """The main comparison's curves, means over seeds: loss minus the dense model's at the same tokens, and loss over
    seconds of training, where the seconds of a step are known."""
    from matplotlib.figure import Figure

    found = {arm: groups["main", "mixture", arm, ""] for arm in MAIN if ("main", "mixture", arm, "") in groups}
    if "dense" not in found:
        return []
    figure = Figure(figsize=(10, 5.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, by_seed in found.items():
        short, _, init = arm.partition("-")
        label = f"{ARMS[arm].title} ({ARMS[arm].ffns})" + "*" * (len(by_seed) == 1)
        style = {"color": COLORS[short], "linestyle": DASHES[init], "label": label}
        steps, tokens, losses = mean_curve(by_seed)
        second = step_seconds.get("dense" if ARMS[arm].matched else arm, math.nan)
        right.plot([step * second for step in steps[1:]], losses[1:], **style)
        shared = {seed: by_seed[seed] for seed in by_seed.keys() & found["dense"].keys()}
        if ARMS[arm].matched or not shared:
            continue  # its checkpoints lie at other numbers of tokens
        dense = mean_curve({seed: found["dense"][seed] for seed in shared})[2]
        ours = mean_curve(shared)[2]
        above = [a - b for a, b in zip(ours, dense, strict=True)]
        left.plot([number / 1e6 for number in tokens[1:]], above[1:], **style)
    left.set(xlabel="million tokens", ylabel="nats per token", title="Causal loss minus the dense model's")
    right.set(xlabel="seconds of training", ylabel="nats per token", title="Causal loss over time")
    right.set_yscale("log")
    right.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        title="FFNs per token in brackets; * one seed",
        title_fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return [path]


def draw_domains(groups: Groups, path: Path, arms: Sequence[str] = ("ec-copy2", "tcq-copy2")) -> list[Path]:
    """Which domain each expert's tokens are of, by layer: one row of pictures for each arm, of its first seed."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    found = {arm: groups.get(("main", "mixture", arm, ""), {}) for arm in arms}
    if not all(found.values()):
        return []
    routes = {arm: by_seed[min(by_seed)]["final"]["routes"] for arm, by_seed in found.items()}
    num_layers = len(routes[arms[0]]["domain_shares"])
    chance = 1 / len(MIXTURE)
    scale = TwoSlopeNorm(vmin=0, vcenter=chance, vmax=1)
    figure = Figure(figsize=(2.1 * num_layers, 2.6 * len(arms)), dpi=110, layout="constrained")
    axes = figure.subplots(len(arms), num_layers, squeeze=False)
    for row, arm in enumerate(arms):
        for layer, table in enumerate(routes[arm]["domain_shares"]):
            place = axes[row][layer]
            picture = place.imshow(table, norm=scale, cmap="RdBu_r", aspect="auto")
            place.set(title=f"layer {layer}", yticks=range(len(table)))
            place.set_xticks(range(len(MIXTURE)), MIXTURE if row == len(arms) - 1 else [""] * len(MIXTURE), rotation=60)
        load = f"load {routes[arm]['load_min']:.2f} to {routes[arm]['load_max']:.2f}"
        axes[row][0].set_ylabel(f"{ARMS[arm].title}: expert\n(seed {min(found[arm])}, {load})", fontsize=8)
    figure.colorbar(picture, ax=axes, label=f"share of the expert's tokens; {chance:g} is chance", fraction=0.02)
    figure.savefig(path)
    return [path]


def mean_curve(by_seed: dict[int, dict[str, Any]]) -> tuple[list[int], list[int], list[float]]:
    """Steps, tokens and mean loss at each checkpoint."""
    curves = [result["curve"] for result in by_seed.values()]
    points = list(zip(*curves, strict=True))
    return (
        [same[0]["step"] for same in points],
        [same[0]["tokens"] for same in points],
        [statistics.fmean(curve_loss(point) for point in same) for same in points],
    )
