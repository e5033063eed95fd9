"""The pictures of a walk-through, and the same numbers as a text to follow by hand."""

import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from torch import Tensor

from .errors import AnalysisError
from .walkthrough import Walkthrough, read_matrices, walk_through

SUFFIXES = (".svg", ".png")
# Okabe and Ito's colours, which stay apart for every kind of colour vision; one for each token.
TOKEN_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#D55E00")


def number(value: float) -> str:
    """What stands in a cell: whole numbers as they are, others with two digits."""
    return str(round(value)) if value == round(value) else f"{value:.2f}"


def draw(
    num_experts: int = 3,
    top: int = 2,
    seed: int = 0,
    matrices: str | dict[str, Any] | None = None,
    output: str | None = None,
) -> str:
    """Expert choice step by step on small numbers, as a text to follow by hand and, where asked for, as a picture.

    Args:
        num_experts: E.
        top: tokens that each expert takes.
        seed: of the numbers, where none are given.
        matrices: tokens [T, D], experts [E, D], w1 [E, I, D] and w2 [E, D, I], or a JSON file with them.
        output: picture to write, .svg or .png.

    Raises:
        AnalysisError: for anything the user can put right.
    """
    if isinstance(matrices, str | os.PathLike):
        matrices = read_matrices(Path(matrices).expanduser())
    walk = walk_through(num_experts, top, seed, matrices)
    if output:
        write_picture(walk, Path(output).expanduser())
    return as_text(walk)


def write_picture(walk: Walkthrough, path: Path) -> None:
    """Writes the picture, an .svg or a .png: the tables of expert choice from left to right and top to bottom, and
    token choice on the same scores.

    Raises:
        AnalysisError: for another kind of file.
    """
    if path.suffix not in SUFFIXES:
        raise AnalysisError(f"output={path} must end in {' or '.join(SUFFIXES)}")
    num_experts = len(walk.experts)
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ecmoe", "font.size": 9}):
        figure, axes = plt.subplots(3, 5, figsize=(14, 8.4), layout="constrained")
        _first_row(list(axes[0]), walk)
        _second_row(list(axes[1]), walk)
        _third_row(list(axes[2]), walk)
        figure.suptitle(
            f"Expert choice: {num_experts} experts take their best {walk.gates.shape[1]} of {len(walk.tokens)} tokens"
        )
        try:
            figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise AnalysisError(f"output={path} cannot be written: {error}") from error
        finally:
            plt.close(figure)


def _first_row(axes: list[Axes], walk: Walkthrough) -> None:
    tokens, experts = _names("t", len(walk.tokens)), _names("E", len(walk.experts))
    features = _names("x", walk.tokens.shape[1])
    _table(axes[0], "tokens", "1", walk.tokens, tokens, features, rows_are_tokens=True)
    _table(axes[1], "experts", "2", walk.experts, experts, features)
    _table(axes[2], "affinity = tokens · experts", "3", walk.affinity, tokens, experts, rows_are_tokens=True)
    _table(axes[3], "scores = softmax over experts", "4", walk.scores, tokens, experts, rows_are_tokens=True)
    ranks = [f"{rank + 1}." for rank in range(walk.gates.shape[1])]
    _table(axes[4], "gates: each expert's best scores", "5", walk.gates, experts, ranks, owners=walk.index)


def _second_row(axes: list[Axes], walk: Walkthrough) -> None:
    """Whose scores these are, and what the experts make of the tokens."""
    experts = _names("E", len(walk.experts))
    ranks = [f"{rank + 1}." for rank in range(walk.gates.shape[1])]
    _table(axes[0], "tokens taken", "6", walk.index, experts, ranks, owners=walk.index, prefix="t")
    rows = [f"E{e} t{int(t)}" for e, line in enumerate(walk.index) for t in line]
    owners = walk.index.flatten()[:, None]
    inner = _names("h", walk.hidden.shape[2])
    features = _names("y", walk.outputs.shape[2])
    _table(axes[1], "relu(W1 x)", "7", walk.hidden.flatten(0, 1), rows, inner, owners=owners.expand(-1, len(inner)))
    _table(
        axes[2],
        "W2 relu(W1 x)",
        "8",
        walk.outputs.flatten(0, 1),
        rows,
        features,
        owners=owners.expand(-1, len(features)),
    )
    weighted = (walk.gates[..., None] * walk.outputs).flatten(0, 1)
    _table(axes[3], "gate times output", "9", weighted, rows, features, owners=owners.expand(-1, len(features)))
    tokens = _names("t", len(walk.tokens))
    _table(axes[4], "aggregate: sums per token", "10", walk.aggregate, tokens, features, rows_are_tokens=True)


def _third_row(axes: list[Axes], walk: Walkthrough) -> None:
    """The experts' weights, and token choice beside expert choice."""
    experts = _names("E", len(walk.experts))
    for axis, title, weights in ((axes[0], "W1", walk.w1), (axes[1], "W2", walk.w2)):
        names = [f"{experts[e]}, {row}" for e in range(len(experts)) for row in range(weights.shape[1])]
        _table(axis, f"{title} of each expert", "", weights.flatten(0, 1), names, _names("", weights.shape[2]))
    choices = _names("", walk.chosen_experts.shape[1])
    tokens = _names("t", len(walk.tokens))
    _table(axes[2], "token choice: experts of a token", "", walk.chosen_experts, tokens, choices, True, prefix="E")
    taken = walk.index.new_full((len(experts),), walk.index.shape[1])
    for axis, title, load in ((axes[3], "load, token choice", walk.load), (axes[4], "load, expert choice", taken)):
        bars = axis.bar(experts, load.tolist(), color="#999999")
        axis.bar_label(bars, labels=[str(int(value)) for value in load])
        axis.set_ylim(0, max(int(walk.load.max()), int(taken.max())) * 1.2)
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)


def _names(letter: str, count: int) -> list[str]:
    return [f"{letter}{i}" for i in range(count)]


def _table(
    axis: Axes,
    title: str,
    step: str,
    values: Tensor,
    rows: list[str],
    columns: list[str],
    rows_are_tokens: bool = False,
    owners: Tensor | None = None,
    prefix: str = "",
) -> None:
    """A matrix with its numbers; cells have the colour of the token they belong to. owners: [rows, columns] tokens."""
    axis.axis("off")
    axis.set_title(f"{step}. {title}" if step else title, fontsize=9)
    colours = None
    if rows_are_tokens:
        colours = [[_colour(row)] * len(columns) for row in range(len(rows))]
    elif owners is not None:
        colours = [[_colour(int(token)) for token in line] for line in owners]
    cells = [[f"{prefix}{int(v)}" if prefix else number(float(v)) for v in line] for line in values]
    table = axis.table(
        cells,
        rowLabels=rows,
        colLabels=columns,
        cellColours=colours,
        cellLoc="center",
        loc="center",
        bbox=Bbox.from_bounds(0.2, 0, 0.8, 1),
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)


def _colour(token: int) -> str:
    return TOKEN_COLOURS[token % len(TOKEN_COLOURS)]


def as_text(walk: Walkthrough) -> str:
    """The walk-through in words and numbers; a reader can follow every line with a pencil."""
    tokens, experts = _names("t", len(walk.tokens)), _names("E", len(walk.experts))
    lines = ["Affinity of a token to an expert: the product of their embeddings. Scores: softmax over the experts.", ""]
    for t, name in enumerate(tokens):
        affinity = "  ".join(f"{e} {number(float(v))}" for e, v in zip(experts, walk.affinity[t], strict=True))
        scores = "  ".join(f"{e} {float(v):.4f}" for e, v in zip(experts, walk.scores[t], strict=True))
        lines.append(f"{name} = {_vector(walk.tokens[t])}   affinity  {affinity}   scores  {scores}")
    lines += ["", f"Each expert takes the {walk.index.shape[1]} tokens with its highest scores.", ""]
    for e, name in enumerate(experts):
        for rank, t in enumerate(walk.index[e].tolist()):
            hidden, output, gate = walk.hidden[e, rank], walk.outputs[e, rank], float(walk.gates[e, rank])
            lines.append(
                f"{name} takes {tokens[t]}: relu(W1 x) = {_vector(hidden)}, W2 relu(W1 x) = {_vector(output)}, "
                f"times gate {gate:.4f} = {_vector(gate * output)}"
            )
    lines += ["", "The aggregate of a token is the sum over the experts that took it.", ""]
    for t, name in enumerate(tokens):
        takers = [experts[e] for e in range(len(experts)) if t in walk.index[e].tolist()]
        lines.append(f"{name}: {' + '.join(takers) or 'nobody'} = {_vector(walk.aggregate[t])}")
    load = ", ".join(f"{e} {int(v)}" for e, v in zip(experts, walk.load, strict=True))
    per_token = walk.chosen_experts.shape[1]
    lines += ["", f"Token choice, each token its best {per_token}: tokens of {load}."]
    lines.append(f"Expert choice: {walk.index.shape[1]} tokens of every expert.")
    return "\n".join(lines)


def _vector(values: Tensor) -> str:
    return "(" + ", ".join(number(float(value)) for value in values) + ")"
