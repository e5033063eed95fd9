"""The command: which runs are missing, one after the other, then tables and plots."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NoReturn

from transformers.utils import logging

from .. import machine
from . import pretrain, store
from .data import files
from .execute import Bench
from .grid import Run, quick_runs
from .parents import PARENTS
from .report import write
from .timing import step_seconds

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks quality", description="Quality against controls, causally.")
    parser.add_argument("--quick", action="store_true", help="four arms, half of the steps: a quarter of an hour")
    parser.add_argument("--parts", nargs="+", help="such as main, rates, pool; all when left out")
    parser.add_argument("--seeds", type=int, nargs="+", help="such as 0; all when left out, or one for each process")
    parser.add_argument(
        "--parent", choices=PARENTS, default="stories260K", help="the dense model; default: %(default)s"
    )
    parser.add_argument("--parent-folder", type=Path, help="where it lies, if it does not come with the data")
    parser.add_argument("--train-parent", action="store_true", help="train the parent 5M into --parent-folder first")
    parser.add_argument("--report", action="store_true", help="run nothing; tables and plots of what is there")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of parent and text")
    options = parser.parse_args(arguments)
    parent = PARENTS[options.parent]
    if options.train_parent:
        if options.parent != "5M" or options.parent_folder is None:
            stop("train-parent=True is for --parent 5M, and wants --parent-folder, where it is written")
        print(pretrain.train_parent(checked_data(options.data, []), options.parent_folder))
        return
    folder = machine.RESULTS / folder_name(options.parent, options.quick)
    everything = quick_runs() if options.quick else parent.runs()
    runs = chosen(everything, options.parts)
    seeds = sorted({run.seed for run in runs})
    for seed in options.seeds or []:
        if seed not in seeds:
            stop(f"seeds={seed} has no run there; choose of {seeds}")
    runs = [run for run in runs if options.seeds is None or run.seed in options.seeds]
    logging.disable_progress_bar()  # of every calibration
    timing = folder.with_name(f"{folder.name}-steps.json")
    if not options.report:
        bench = bench_of(options.data, options.quick, options.parent, options.parent_folder)
        run_missing(bench, runs, folder)
        if not timing.exists():
            print("Timing a step of each arm, side by side", flush=True)
            machine.save(timing.stem, step_seconds(bench, [run for run in everything if run.part == "main"]))
    results = [store.read(folder, run) for run in everything if store.finished(folder, run)]
    if not results:
        stop(f"no finished run in {folder}; leave --report out")
    missing = [run.name for run in everything if not store.finished(folder, run)]
    seconds = json.loads(timing.read_text())["seconds"] if timing.exists() else {}
    for path in write(results, missing, seconds, options.parent, quick=options.quick):
        print(path)


def stop(reason: str) -> NoReturn:
    """Raises SystemExit, code 2, after one line."""
    print(f"quality: error: {reason}", file=sys.stderr)
    sys.exit(2)


def folder_name(parent: str, quick: bool = False) -> str:
    """Of the results below benchmarks/results."""
    return "-".join(["quality", *[parent] * (parent != "stories260K"), *["quick"] * quick])


def bench_of(data: Path, quick: bool, parent: str, given: Path | None) -> Bench:
    """The parent and the text of a folder.

    Raises:
        SystemExit: code 2, where something is missing there.
    """
    place = PARENTS[parent].place(data, given)
    if place is None or not (place / "config.json").is_file():
        stop(f"parent-folder={place} holds no config.json of {parent}; name its folder")
    checked_data(data, ["blimp/BLiMP.zip"] * (not quick))
    return Bench(data, 1_024, 0, place) if quick else Bench(data, parent=place)


def checked_data(data: Path, more: list[str]) -> Path:
    missing = [name for name in (*files(), *more) if not (data / name).exists()]
    if missing:
        stop(f"data={data} lacks {', '.join(missing)}; name the folder that has them")
    return data


def chosen(runs: list[Run], parts: list[str] | None) -> list[Run]:
    """The runs of these parts, in the order of the grid.

    Raises:
        SystemExit: code 2, for a part that has no run.
    """
    known = list(dict.fromkeys(run.part for run in runs))
    for part in parts or []:
        if part not in known:
            stop(f"parts={part} is unknown; choose of {', '.join(known)}")
    return [run for run in runs if parts is None or run.part in parts]


def run_missing(bench: Bench, runs: list[Run], folder: Path) -> None:
    """Each run that is not there, and a line about it."""
    missing = [run for run in runs if not store.finished(folder, run)]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are there", flush=True)
    begin, steps_done = time.perf_counter(), 0
    for number, run in enumerate(missing, start=1):
        if store.finished(folder, run):  # by another process in the meantime
            continue
        started = time.perf_counter()
        result = bench.execute(run)
        store.save(folder, run, result)
        steps_done += run.steps * run.rows
        left = sum(other.steps * other.rows for other in missing[number:])
        minutes = (time.perf_counter() - begin) / 60
        print(
            f"{number}/{len(missing)} {run.name}: causal loss {result['final']['loss']:.4f}, "
            f"{time.perf_counter() - started:.0f} s; about {minutes * left / steps_done:.0f} minutes left",
            flush=True,
        )
