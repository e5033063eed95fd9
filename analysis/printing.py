"""What an evaluation prints: a table with a column for each checkpoint, and what to make of its figures."""

import math
from collections.abc import Callable
from typing import Any

from rich import box
from rich.table import Table

from ecmoe.progress import number_of

Result = dict[str, Any]
# Of more experts than these, or beside another checkpoint, a layer's row says how far the loads lie apart.
_LOADS = 8
# More layers than these have one row together; --json has each.
_LAYERS = 12
# A standard error above WIDE says little: 0.05 nats are 5 % of a perplexity. That of FEW documents is a guess.
WIDE, FEW = 0.05, 10


def evaluation_table(result: Result) -> Table:
    """The figures of `evaluation.evaluate`, the first checkpoint's and those that it is held against."""
    entries = [result, *result.get("against", [])]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("", no_wrap=True)
    for entry in entries:
        table.add_column(entry["checkpoint"], justify="right", overflow="fold")
    for name, text in _ROWS:
        cells = [text(entry) for entry in entries]
        if any(cells):
            table.add_row(name, *cells)
    _routes(table, entries)
    _pairs(table, entries)
    return table


def calibration_table(found: Result) -> Table:
    """What a recalibration changed on the text that was held out."""
    table = Table(title=f"{found['checkpoint']}, {found['held_out_tokens']:,} held-out tokens of {found['text']}")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    rows = {
        "causal loss, nats per token": ("loss", ".4f"),
        "load of an expert, least (1 is its share)": ("load_min", ".2f"),
        "largest": ("load_max", ".2f"),
        "experts per token": ("experts_per_token", ".2f"),
        "chosen by no expert": ("uncovered", ".1%"),
    }
    for title, (name, style) in rows.items():
        table.add_row(title, *(format(found[when][name], style) for when in ("before", "after")))
    return table


def _with_error(value: str, error: float | None) -> str:
    return value if error is None else f"{value} ± {error:.4f}"


def _figure(name: str, text: str) -> Callable[[Result], str]:
    return lambda entry: text.format(entry[name]) if name in entry else ""


def _loss(entry: Result) -> str:
    return _with_error(f"{entry['loss']:.4f}", entry["standard_error"]) if "loss" in entry else ""


def _difference(entry: Result) -> str:
    if "difference" not in entry:
        return ""
    return _with_error(f"{entry['difference']['loss']:+.4f}", entry["difference"]["standard_error"])


def _gap(entry: Result) -> str:
    return f"{entry['loss_gap']:+.4f} on {entry['top_k_tokens']:,} tokens" if "loss_gap" in entry else ""


def _units(entry: Result) -> str:
    if "units" not in entry:
        return ""
    return f"{entry['predicted_tokens']:,} in {number_of(entry['num_units'], entry['units'].removesuffix('s'))}"


_ROWS: list[tuple[str, Callable[[Result], str]]] = [
    ("causal loss, nats ± error", _loss),
    ("first minus this one, paired", _difference),
    ("perplexity", _figure("perplexity", "{:,.2f}")),
    ("top-k loss (not causal)", _figure("loss_top_k", "{:.4f}")),
    ("gap, causal minus top-k", _gap),
    ("tokens read", _figure("tokens", "{:,}")),
    ("tokens predicted", _units),
    ("tokens/s", _figure("tokens_per_second", "{:,.0f}")),
    ("thresholds from", _figure("thresholds_from", "{}")),
    ("chat template of", _figure("chat_template_from", "{}")),
]


def _routes(table: Table, entries: list[Result]) -> None:
    """Load of each expert, layer by layer."""
    if not any("routes" in entry for entry in entries):
        return

    def summary(entry: Result, name: str, text: str) -> str:
        return text.format(entry["routes"]["summary"][name]) if "routes" in entry else ""

    table.add_row("experts per token", *(summary(entry, "experts_per_token", "{:.2f}") for entry in entries))
    table.add_row("chosen by no expert", *(summary(entry, "uncovered", "{:.1%}") for entry in entries))
    names = list(dict.fromkeys(name for e in entries if "routes" in e for name in e["routes"]["layers"]))
    table.add_section()
    if len(names) > _LAYERS:
        over = [_load_over_layers(entry) for entry in entries]
        table.add_row(f"load, {len(names)} layers", *(loads for loads, _ in over))
        table.add_row("  least even in", *(where for _, where in over))
        return
    for name in names:
        layers = [entry["routes"]["layers"].get(name) if "routes" in entry else None for entry in entries]
        cells = [_load(layer, is_short=len(entries) > 1) for layer in layers]
        table.add_row(f"load, {name.removesuffix('.mlp').removeprefix('model.')}", *cells)


def _load_over_layers(entry: Result) -> tuple[str, str]:
    """The least and the largest load over all layers, and the layers where they lie furthest apart."""
    if "routes" not in entry:
        return "", ""
    layers = {name: layer["load"] for name, layer in entry["routes"]["layers"].items()}
    furthest = sorted(layers, key=lambda name: min(layers[name]) - max(layers[name]))[:3]
    numbers = ", ".join(name.removesuffix(".mlp").rpartition(".")[2] for name in furthest)
    every = [load for loads in layers.values() for load in loads]
    return f"{min(every):.2f} to {max(every):.2f}", f"layers {numbers}"


def _load(layer: Result | None, is_short: bool) -> str:
    if layer is None:
        return ""
    loads = layer["load"]
    if len(loads) <= _LOADS and not is_short:
        return " ".join(f"{load:.2f}" for load in loads)
    return f"{min(loads):.2f} to {max(loads):.2f}"


def _pairs(table: Table, entries: list[Result]) -> None:
    if "pairs" not in entries[0]:
        return
    files = list(entries[0]["pairs"]["files"])
    accuracies = [f"{entry['pairs']['accuracy']:.1%}" for entry in entries]
    table.add_row(f"minimal pairs, {entries[0]['pairs']['pairs']:,}", *accuracies)
    for name in files if len(files) > 1 else ():
        table.add_row(f"  {name}", *(f"{entry['pairs']['files'][name]:.1%}" for entry in entries))


def remarks(result: Result) -> list[str]:
    """How far the loss is known, which of two models is better as far as this text can show, and why so many tokens."""
    if "loss" not in result:
        return []
    error = result["standard_error"]
    said = in_words(math.inf if error is None else error, result["num_units"])
    lines = [f"The standard error is {said}."] if said else []
    if result["num_cut"]:
        lines.append(f"Cut at the longest row that is read: {result['num_cut']:,} of the conversations.")
    for other in result.get("against", []):
        difference, error = other["difference"]["loss"], other["difference"]["standard_error"]
        if error is None:
            continue
        lines.append(f"{result['checkpoint']} against {other['checkpoint']}: {_verdict(difference, error)}")
    return [*lines, *([f"Read: {result['amount']}."] if result["amount"] else [])]


def _verdict(difference: float, error: float) -> str:
    figure = f"{difference:+.4f} ± {error:.4f} nats per token"
    if abs(difference) < 0.00005:
        return f"{figure}, the same."
    if abs(difference) <= 2 * error:
        return f"{figure}, no difference that this text can show."
    return f"{figure}, {'better' if difference < 0 else 'worse'}."


def in_words(error: float, units: int) -> str:
    """What to make of a standard error; empty where it needs no word."""
    if math.isinf(error):
        return "a single row of text: nothing says how far this loss is known; give more text"
    if units >= FEW and error <= WIDE:
        return ""
    return (
        f"wide: {units} decide, and another such text may differ by {2 * error:.2f}; give more text, or compare models "
        "on the same text with --against, where its own difficulty cancels"
    )
