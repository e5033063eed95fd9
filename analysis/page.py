"""One HTML file that shows the routes of a text: no network, no other file, every number the library's own."""

import json
import os
from collections import defaultdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import AnalysisError
from .loading import name_of, opened
from .routes import LayerRoutes, TextRoutes, read_text, routes_of_text

BINS = 24  # of a histogram
FAVOURITES = 8  # tokens listed for each expert


def report(
    checkpoint: Any,
    output: str,
    text: str | None = None,
    text_file: str | None = None,
    device: str | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Runs the model over one text and writes the page; the file appears whole or not at all.

    Args:
        checkpoint: folder or Hub id, or a model in memory, with its tokenizer.
        output: the page to write, .html.
        text: the text, or
        text_file: a UTF-8 file with it; at most as many tokens as the model's context.
        device: the first accelerator, or the CPU, when None; a model in memory is run where it is.
        tokenizer: of a model in memory.

    Returns:
        What the page shows; see `numbers`.

    Raises:
        AnalysisError: for anything the user can put right.
    """
    path = Path(output).expanduser()
    if path.suffix != ".html":
        raise AnalysisError(f"output={output} must end in .html")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK) or not path.parent.is_dir():
        raise AnalysisError(f"output={output} cannot be written; name a file in a folder that you may write to")
    content = read_text(text, text_file)
    name = name_of(checkpoint)
    folder = Path(name).expanduser()
    name = folder.resolve().name if folder.is_dir() else name  # a page is passed on; paths stay at home
    source = "text" if text_file is None else f"text_file={text_file}"
    with opened(checkpoint, tokenizer, device, needs_experts=True) as (model, tokenizer):
        result = numbers(routes_of_text(model, tokenizer, content, source), name)
    _write(path, render(result))
    return result


def numbers(routes: TextRoutes, checkpoint: str) -> dict[str, Any]:
    """The page's numbers as plain JSON, rounded to 6 significant digits.

    `layers` has an entry per sparse layer: scores [T][E]; threshold [E], None for a model that routes without; chosen
    [T] and gates [T], each token's experts and their combine weights; load [E], uncovered and fan_out [E + 1] as
    `modeling_ecmoe.routing_report`; histogram: counts [E][BINS] of the rounded scores between low and high; favourites
    [E], the tokens that an expert took, best mean score first.
    """
    return {
        "checkpoint": checkpoint,
        "model_type": routes.model_type,
        "num_experts": routes.num_experts,
        "capacity_factor": routes.capacity_factor,
        "min_experts_per_token": routes.min_experts,
        "max_experts_per_token": routes.max_experts,
        "num_expert_groups": routes.num_groups,
        "loss": None if routes.loss is None else _round(routes.loss),
        "ids": routes.token_ids,
        "names": routes.names,
        "texts": routes.texts,
        "layers": [_layer(layer, routes) for layer in routes.layers],
    }


def _layer(layer: LayerRoutes, routes: TextRoutes) -> dict[str, Any]:
    chosen = [row.nonzero().flatten().tolist() for row in layer.routes]
    scores, threshold = _rounded(layer.scores), _rounded(layer.threshold) if routes.has_thresholds else None
    return {
        "layer": layer.layer,
        "scores": scores,
        "threshold": threshold,
        "chosen": chosen,
        "gates": [[_round(row[e].item()) for e in experts] for row, experts in zip(layer.gates, chosen, strict=True)],
        "load": [_round(load) for load in layer.load],
        "uncovered": _round(layer.uncovered),
        "fan_out": [_round(share) for share in layer.fan_out],
        "histogram": _histogram(scores, threshold),
        "favourites": [
            _favourites(layer.scores[:, expert], layer.routes[:, expert], routes)
            for expert in range(routes.num_experts)
        ],
    }


def _histogram(scores: list[list[float]], threshold: list[float] | None) -> dict[str, Any]:
    """Counts for each expert over one range, which has the thresholds in it so that their lines are in the picture."""
    scores_TE = torch.tensor(scores, dtype=torch.float64)
    everything = torch.cat([scores_TE.flatten(), torch.tensor(threshold or [], dtype=torch.float64)])
    low, high = everything.min().item(), everything.max().item()
    if low == high:  # one score for every token, as with a single expert
        low, high = low - 0.5, high + 0.5
    counts = [torch.histc(column, BINS, low, high).long().tolist() for column in scores_TE.T]
    return {"low": low, "high": high, "counts": counts}


def _favourites(scores_T: Tensor, routes_T: Tensor, routes: TextRoutes) -> list[dict[str, Any]]:
    """The tokens of the vocabulary that one expert took: how often of how many times, and their mean score."""
    taken: dict[int, list[float]] = defaultdict(list)
    for position in routes_T.nonzero().flatten().tolist():
        taken[routes.token_ids[position]].append(scores_T[position].item())
    means = {token: sum(scores) / len(scores) for token, scores in taken.items()}
    best = sorted(means, key=lambda token: (-means[token], -len(taken[token]), token))[:FAVOURITES]
    return [
        {
            "name": routes.names[routes.token_ids.index(token)],
            "text": routes.texts[routes.token_ids.index(token)],
            "taken": len(taken[token]),
            "times": routes.token_ids.count(token),
            "score": _round(means[token]),
        }
        for token in best
    ]


def _rounded(values: Tensor) -> Any:
    """Nested lists of any depth."""
    if values.dim() == 0:
        return _round(values.item())
    return [_rounded(row) for row in values] if values.dim() > 1 else [_round(value) for value in values.tolist()]


def _round(value: float) -> float:
    return float(f"{value:.6g}")


def render(result: dict[str, Any]) -> str:
    """The page of `numbers`: template, style and script from the package, and the numbers as one JSON element."""
    files = resources.files(__package__)
    # Without a "<" nothing in the JSON can end its element or open a comment.
    data = json.dumps(result, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = files.joinpath("report.html").read_text(encoding="utf-8")
    for name, content in (
        ("style", files.joinpath("report.css").read_text(encoding="utf-8")),
        ("script", files.joinpath("report.js").read_text(encoding="utf-8")),
        ("routes", data),  # last: what comes from a text is not searched for placeholders
    ):
        page = page.replace(f"{{{{{name}}}}}", content)
    return page


def _write(path: Path, page: str) -> None:
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise AnalysisError(f"output={path} cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)
