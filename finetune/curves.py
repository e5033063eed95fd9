"""The curves of a run as one picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Losses, learning rate and routing over the steps, read off Trainer's log; panels without a value are left out.

    history: `trainer.state.log_history`.
    """
    panels: list[tuple[str, dict[str, str]]] = [
        (
            "loss, nats per token",
            {
                "loss": "training",
                "eval_loss": "held out, causal",
                "eval_nll": "held out, likelihood",
                "eval_loss_top_k": "held out, top-k (not causal)",
            },
        ),
        ("learning rate", {"learning_rate": "learning rate"}),
        ("expert load, 1 = its share", {"eval_load_max": "most", "eval_load_min": "least"}),
        ("share of tokens chosen by no expert", {"eval_uncovered": "chosen by no expert"}),
    ]
    drawn = [(title, lines) for title, lines in panels if any(name in row for row in history for name in lines)]
    if not drawn:
        return
    figure, axes = plt.subplots(1, len(drawn), figsize=(4.2 * len(drawn), 3.2), layout="constrained", squeeze=False)
    for axis, (title, lines) in zip(axes[0], drawn, strict=True):
        _panel(axis, title, lines, history)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axis: Axes, title: str, lines: dict[str, str], history: list[dict[str, Any]]) -> None:
    for name, label in lines.items():
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            style = "--" if name == "eval_loss_top_k" else "-"  # it lies on the causal one where the gap is small
            axis.plot(*zip(*points, strict=True), style, label=label, marker="." if len(points) < 30 else None)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize=8)
