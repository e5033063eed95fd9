"""The tables of the pages that come from benchmarks/results: `python -m benchmarks pages`, `make docs`.

A page says `<!-- figures: NAME -->` on the line before a table; its rows below the head are made anew from the JSON,
with the labels that the page gives them. `--check` writes nothing and ends with code 1 where a page differs.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from . import mixtures, model
from .machine import RESULTS
from .quality.grid import ARMS, all_runs
from .quality.store import finished
from .quality.store import read as read_run
from .quality.tables import Groups, differences, grouped

ROOT = Path(__file__).resolve().parents[1]
# A marker, the two lines of a table's head, its rows.
_TABLE = re.compile(r"(<!-- figures: ([\w-]+) -->\n(?:\|[^\n]*\n){2})((?:\|[^\n]*(?:\n|$))+)")
Rows = Iterator[list[str]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks pages", description=__doc__.splitlines()[0])
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
        print(f"{', '.join(differ)}: other than benchmarks/results; run python -m benchmarks pages", file=sys.stderr)
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
    order = ["expert choice", "matrix products", "dense FFN", "Mixtral grouped_mm", "Mixtral eager"]
    order += ["matrix products, bmm", "matrix products, grouped_mm"]

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


def _cells(lines: list[str]) -> dict[str, list[str]]:
    """Cells by label of a table that a benchmark prints, without its head."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines[2:]]
    return {row[0]: row[1:] for row in rows}


def _step(labels: list[str]) -> Rows:
    yield from _labelled(iter(_cells(model.markdown(read("model-cpu")["rows"]).splitlines()).values()), labels)


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
    """The bounds from narrow to none, then what was trained by its loss; without the share that nobody chose."""
    found = read("mixtures")
    cells = _cells(mixtures.table(found["before"], found["after"]))
    before = ("the source's rule", "from 2 to 2", "from 1 to 4", "from 1 to 8", "from 0 to 8")
    order = [f"before: {name}" for name in before]
    order += sorted((label for label in cells if label.startswith("after: ")), key=lambda label: cells[label][0])
    yield from _labelled((cells[label][:3] for label in order), labels)


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


@cache
def _runs() -> Groups:
    folder = RESULTS / "quality"
    return grouped(read_run(folder, run) for run in all_runs() if finished(folder, run))


def _which(labels: list[str]) -> Rows:
    """FFNs per token, parameters, loss at both rates."""
    arms = ("dense", "tcq-copy1", "tcq-halves", "tcq-quarters32", "ec-shared", "ec-copy2", "dense-matched")

    def row(arm: str) -> list[str]:
        found = [_runs()[part, "mixture", arm, ""] for part in ("gentle", "main")]
        parameters = next(iter(found[0].values()))["parameters"]["total"]
        losses = ([run["final"]["loss"] for run in runs.values()] for runs in found)
        return [str(ARMS[arm].ffns), f"{parameters:,}", *(_mean(each, ".4f") for each in losses)]

    yield from _labelled(map(row, arms), labels)


def _quality(labels: list[str]) -> Rows:
    """At both rates: loss, and the mean difference to dense and to token choice by quantiles over the seeds of both."""
    arms = ["dense", "tc-copy1", "tcb-copy1", "tcq-copy1", "tcq-halves", "tcq-quarters32"]
    arms += ["tc-copy2", "tcb-copy2", "tcq-copy2", "ec-copy2", "ec-shared", "dense-matched"]

    def row(arm: str) -> list[str]:
        cells = [str(ARMS[arm].ffns)]
        for part in ("gentle", "main"):
            found = _runs()[part, "mixture", arm, ""]
            cells.append(_mean([run["final"]["loss"] for run in found.values()], ".4f"))
            for peer in ("dense", f"tcq-copy{ARMS[arm].ffns}"):
                theirs = _runs()[part, "mixture", peer, ""]
                cells.append("" if arm == peer else _mean(differences(found, theirs), "+.4f"))
        return cells

    yield from _labelled(map(row, arms), labels)


def _mean(values: list[float], form: str) -> str:
    """An asterisk says that one seed is behind it."""
    return f"{statistics.fmean(values):{form}}" + "*" * (len(values) == 1)


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
