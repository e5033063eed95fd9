"""The command: which runs are missing, one after the other, then tables and plots."""

import argparse
import json
import sys
import time
from pathlib import Path

from transformers.utils import logging

from .. import machine
from . import store
from .data import files
from .execute import Bench
from .grid import MAIN, NUM_CORE, Run, all_runs, quick_runs
from .report import write
from .timing import step_seconds

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks quality", description="Quality against controls, causally.")
    parser.add_argument("--quick", action="store_true", help="four arms, half of the steps: a quarter of an hour")
    parser.add_argument("--parts", nargs="+", help="such as main, rates, pool; all when left out")
    parser.add_argument("--seeds", type=int, nargs="+", help="such as 0; all when left out, or one for each process")
    parser.add_argument("--report", action="store_true", help="run nothing; tables and plots of what is there")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of parent and text")
    options = parser.parse_args(arguments)
    folder = machine.RESULTS / ("quality-quick" if options.quick else "quality")
    everything = quick_runs() if options.quick else all_runs()
    runs = chosen(everything, options.parts)
    seeds = sorted({run.seed for run in runs})
    for seed in options.seeds or []:
        if seed not in seeds:
            print(f"quality: error: seeds={seed} has no run there; choose of {seeds}", file=sys.stderr)
            sys.exit(2)
    runs = [run for run in runs if options.seeds is None or run.seed in options.seeds]
    logging.disable_progress_bar()  # of every calibration
    timing = folder.with_name(f"{folder.name}-steps.json")
    if not options.report:
        bench = bench_of(options.data, options.quick)
        run_missing(bench, runs, folder)
        if not timing.exists():
            print("Timing a step of each arm, side by side", flush=True)
            arms = MAIN[:NUM_CORE] if options.quick else MAIN
            machine.save(timing.stem, step_seconds(bench, arms))
    results = [store.read(folder, run) for run in everything if store.finished(folder, run)]
    if not results:
        print(f"quality: error: no finished run in {folder}; leave --report out", file=sys.stderr)
        sys.exit(2)
    missing = [run.name for run in everything if not store.finished(folder, run)]
    seconds = json.loads(timing.read_text())["seconds"] if timing.exists() else {}
    for path in write(results, missing, seconds, quick=options.quick):
        print(path)


def bench_of(data: Path, quick: bool) -> Bench:
    """The parent and the text of a folder.

    Raises:
        SystemExit: code 2, where something is missing there.
    """
    needed = ["stories260K/hf", *files()] + ["blimp/BLiMP.zip"] * (not quick)
    missing = [name for name in needed if not (data / name).exists()]
    if missing:
        print(f"quality: error: data={data} lacks {', '.join(missing)}; name the folder that has them", file=sys.stderr)
        sys.exit(2)
    return Bench(data, 1_024, 0) if quick else Bench(data)


def chosen(runs: list[Run], parts: list[str] | None) -> list[Run]:
    """The runs of these parts, in the order of the grid.

    Raises:
        SystemExit: code 2, for a part that has no run.
    """
    known = list(dict.fromkeys(run.part for run in runs))
    for part in parts or []:
        if part not in known:
            print(f"quality: error: parts={part} is unknown; choose of {', '.join(known)}", file=sys.stderr)
            sys.exit(2)
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
