"""The tables of the pages that come from benchmarks/results: `python -m examples.figures`, `make docs`.

A page says `<!-- figures: NAME -->` on the line before a table; its rows below the head are made anew from the JSON,
with the labels that the page gives them. `--check` writes nothing and ends with code 1 where a page differs.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# A marker, the two lines of a table's head, its rows.
_TABLE = re.compile(r"(<!-- figures: ([\w-]+) -->\n(?:\|[^\n]*\n){2})((?:\|[^\n]*(?:\n|$))+)")
Rows = Iterator[list[str]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="examples.figures", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; code 1 where a page differs")
    options = parser.parse_args(arguments)
    differ = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        filled = _TABLE.sub(_filled, text)
        if filled != text:
            differ.append(page.relative_to(ROOT).as_posix())
            if not options.check:
                page.write_text(filled, encoding="utf-8")
    if differ and options.check:
        print(f"{', '.join(differ)}: other than benchmarks/results; run python -m examples.figures", file=sys.stderr)
        sys.exit(1)


def _filled(match: re.Match[str]) -> str:
    labels = [line.strip("| ").split(" | ")[0] for line in match[3].splitlines()]
    return match[1] + "".join(f"| {' | '.join(row)} |\n" for row in TABLES[match[2]](labels))


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _labelled(rows: Iterator[list[str]], labels: list[str]) -> Rows:
    """Rows of figures under the labels of the page, as many as it has."""
    found = list(rows)
    assert len(found) == len(labels), f"the page has {len(labels)} rows, the figures {len(found)}: {labels}"
    yield from ([label, *row] for label, row in zip(labels, found, strict=True))


def _ms(seconds: float, digits: int = 1) -> str:
    return f"{seconds * 1e3:,.{digits}f}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.{1 if ratio >= 10 else 2}f}"


def _block(labels: list[str]) -> Rows:
    found = read("block-cpu")
    order = ("expert choice", "matrix products", "dense FFN", "Mixtral grouped_mm", "Mixtral eager")
    order += ("matrix products, bmm", "matrix products, grouped_mm")

    def cell(size: str, name: str) -> str:
        row = found[size]["rows"][name]
        over = "" if name == "matrix products" else f" ({_ratio(row['ratio'])})"
        return f"{_ms(row['seconds'], 0)}{over}"

    def kept(name: str) -> str:
        return " / ".join(f"{found[size]['rows'][name]['kept_bytes'] / 1e6:.0f}" for size in sizes[:2])

    sizes = ("small float32", "middle float32", "small bfloat16")
    yield from _labelled(([*(cell(size, name) for size in sizes), kept(name)] for name in order), labels)


def _parallel(_: list[str]) -> Rows:
    found = read("parallel")
    for processes in (2, 4):
        for size, (hidden, *shape) in found["sizes"].items():
            row = found[f"{processes} processes, {size}"]
            sent = (row["bytes"]["all_to_all"], row["bytes"]["equal_splits"], row["least"])
            times = (_ms(row["seconds"][way]) for way in ("all_to_all", "equal_splits"))
            shapes = ", ".join(map(str, (hidden, *shape)))
            yield [str(processes), shapes, *times, f"{row['ratio']:.2f}", ", ".join(f"{each:,}" for each in sent)]


def _step(labels: list[str]) -> Rows:
    parts = read("model-cpu")["rows"]
    names = ("expert choice", "dense", "Mixtral grouped_mm", "Mixtral eager")

    def row(name: str) -> list[str]:
        cells = ((f"{part[name]['seconds'] * 1e3:.0f}", f"{part[name]['ratio']:.2f}") for part in parts.values())
        return [cell for pair in cells for cell in pair]

    yield from _labelled(map(row, names), labels)


def _decode(labels: list[str]) -> Rows:
    batches = read("decode-cpu")["rows"]
    for label in labels:
        name = label.replace(" (default)", "")
        cells = []
        for rows in batches.values():
            row = rows.get(name)
            cells.append(f"{row['tokens per second']:,.0f} ({row['over Mixtral']:.2f})" if row else "")
        yield [label, *cells]


def _router(labels: list[str]) -> Rows:
    found = read("router-cpu")
    small, middle = (list(found[size]["parts"].values()) for size in ("small", "middle"))

    def cells(row: dict[str, float]) -> list[str]:
        return [f"{_ms(row['seconds'])} ms", "" if row["ratio"] == 1 else f"{row['ratio']:.1%}".replace("%", " %")]

    yield from _labelled(([*cells(one), *cells(other)] for one, other in zip(small, middle, strict=True)), labels)


def _evaluation(labels: list[str]) -> Rows:
    found = read("evaluation-SmolLM2-8x")
    for label in labels:
        yield [
            label,
            f"{statistics.median(found['processor_seconds'][label]):.2f}",
            f"{found['over_dense'][label]:.2f}",
        ]


def _rejected_products(labels: list[str]) -> Rows:
    found = read("rejected")
    sizes = [rows for name, rows in found.items() if name.startswith("products")]
    for number, label in enumerate(labels):
        rows = (list(size.values())[number] for size in sizes)
        yield [label, *(_ms(row["seconds"]) if number == 0 else f"{row['ratio']:.2f}" for row in rows)]


def _rejected_choice(labels: list[str]) -> Rows:
    found = read("rejected")
    sizes = [rows for name, rows in found.items() if name.startswith("choice")]
    for number, label in enumerate(labels):
        rows = [list(size.values())[number] for size in sizes]
        times = [_ms(row["seconds"]) if number == 0 else _ratio(row["ratio"]) for row in rows]
        off = [f"{row['load']:.1%}".replace("%", " %") for row in rows]
        yield [label, *("; ".join(pair) for pair in zip(times, off, strict=True))]


def _mixtures(labels: list[str]) -> Rows:
    found = read("mixtures")
    before = ("the source's rule", "from 2 to 2", "from 1 to 4", "from 1 to 8", "from 0 to 8")
    groups = [[found["before"][name]] for name in before]
    groups += sorted(([run["end"] for run in runs] for runs in found["after"].values()), key=_loss)

    def row(seeds: list[dict[str, Any]]) -> list[str]:
        losses, routes = [each["loss"] for each in seeds], [each["routes"] for each in seeds]
        spread = f" ± {statistics.stdev(losses) / len(losses) ** 0.5:.4f}" if len(losses) > 1 else ""
        least, most = min(each["load_min"] for each in routes), max(each["load_max"] for each in routes)
        experts = statistics.fmean(each["experts_per_token"] for each in routes)
        return [f"{_loss(seeds):.4f}{spread}", f"{experts:.2f}", f"{least:.2f} to {most:.2f}"]

    yield from _labelled(map(row, groups), labels)


def _loss(seeds: list[dict[str, Any]]) -> float:
    return statistics.fmean(each["loss"] for each in seeds)


def _quantization(labels: list[str]) -> Rows:
    kinds = read("quantization")["kinds"]
    columns = [kinds[name] for name in ("16 bits", "4 bits, experts in 16", "4 bits", "4 bits, as saved")]
    shown: list[Callable[[dict[str, Any]], str]] = [
        lambda kind: f"{kind['file_bytes'] / 1e9:.2f}",
        lambda kind: f"{kind['weight_bytes'] / 1e9:.2f}",
        lambda kind: f"{kind['load']['anonymous_bytes'] / 1e9:.2f}",
        lambda kind: f"{kind['train']['anonymous_bytes'] / 1e9:.2f}",
        lambda kind: f"{kind['loss']:.3f}",
        lambda kind: f"{kind['adapter_over_base']:.2f}",
    ]
    yield from _labelled(([show(column) for column in columns] for show in shown), labels)


def _losses(part: str, arm: str) -> dict[int, dict[str, Any]]:
    """The runs of an arm by seed."""
    paths = sorted(RESULTS.glob(f"quality/{part}.mixture.{arm}.seed*.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return {run["recipe"]["seed"]: run for run in runs}


def _which(labels: list[str]) -> Rows:
    """FFNs per token, parameters, loss at both rates."""
    arms = ("dense", "tcq-copy1", "tcq-halves", "tcq-quarters32", "ec-shared", "ec-copy2", "dense-matched")

    def row(arm: str) -> list[str]:
        runs = [_losses(part, arm) for part in ("gentle", "main")]
        losses = (f"{_mean_loss(found):.4f}{_seeds(found)}" for found in runs)
        return [str(_ARMS[arm]), f"{_any(runs[0])['parameters']['total']:,}", *losses]

    yield from _labelled(map(row, arms), labels)


def _quality(labels: list[str]) -> Rows:
    """At both rates: loss, and the mean difference to dense and to token choice by quantiles over the seeds of both."""

    def row(arm: str) -> list[str]:
        cells = [str(_ARMS[arm])]
        for part in ("gentle", "main"):
            found, dense = _losses(part, arm), _losses(part, "dense")
            cells += [f"{_mean_loss(found):.4f}{_seeds(found)}", _against(found, dense) if arm != "dense" else ""]
            peer = f"tcq-copy{_ARMS[arm]}"
            cells.append(_against(found, _losses(part, peer)) if arm != peer else "")
        return cells

    yield from _labelled(map(row, _ARMS), labels)


# FFNs per token of the arms that docs/quality.md shows.
_ARMS = {"dense": 1, "tc-copy1": 1, "tcb-copy1": 1, "tcq-copy1": 1, "tcq-halves": 1, "tcq-quarters32": 1}
_ARMS |= {"tc-copy2": 2, "tcb-copy2": 2, "tcq-copy2": 2, "ec-copy2": 2, "ec-shared": 2, "dense-matched": 2}


def _any(found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return next(iter(found.values()))


def _mean_loss(found: dict[int, dict[str, Any]]) -> float:
    return statistics.fmean(run["final"]["loss"] for run in found.values())


def _seeds(found: dict[int, dict[str, Any]]) -> str:
    return " (one seed)" if len(found) == 1 else ""


def _against(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> str:
    seeds = ours.keys() & theirs.keys()
    return f"{statistics.fmean(ours[seed]['final']['loss'] - theirs[seed]['final']['loss'] for seed in seeds):+.4f}"


def _packing(_: list[str]) -> Rows:
    for name, row in read("packing")["models"].items():
        yield [name, row["batch"], f"{row['rows']:,.0f}", f"{row['one row']:,.0f}", f"{row['ratio']:.2f}"]


TABLES: dict[str, Callable[[list[str]], Rows]] = {
    "block": _block,
    "parallel": _parallel,
    "step": _step,
    "decode": _decode,
    "router": _router,
    "evaluation": _evaluation,
    "rejected-products": _rejected_products,
    "rejected-choice": _rejected_choice,
    "mixtures": _mixtures,
    "quantization": _quantization,
    "packing": _packing,
    "which": _which,
    "quality": _quality,
}

if __name__ == "__main__":
    main()
