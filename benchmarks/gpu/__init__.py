"""Everything that wants a GPU, the most telling first: `python -m benchmarks gpu --minutes 8 --output DIR`, `make gpu`.

Each part runs in a process of its own with a time limit and writes its figures to DIR/NAME.json the moment they exist,
so that a cut leaves the rest. It needs torch and Transformers, and pytest for the tests. `--tiny` runs every part at
sizes that show nothing but that it runs, on a CPU too.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..machine import commit, machine
from .parts import PARTS

LEAST = 5  # seconds, in which a process has hardly begun


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--output", type=Path, default=Path("gpu_results"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="sizes that show that it runs, on a CPU too")
    parser.add_argument("--in-process", metavar="PART", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.in_process:
        path = options.output / f"{options.in_process}.json"
        PARTS[options.in_process].run(options.tiny, lambda found: write(path, found))
        return
    tools = {name: shutil.which(name) is not None for name in ("git", "cc", "nvidia-smi")}  # Triton wants a compiler
    write(options.output / "machine.json", {"commit": commit(), **machine(), "tools": tools})
    end = time.monotonic() + 60 * options.minutes
    print(f"{len(options.parts)} parts in {options.minutes:g} minutes at most; figures in {options.output}", flush=True)
    for name in options.parts:
        run(name, options, min(PARTS[name].seconds, end - time.monotonic()))


def run(name: str, options: argparse.Namespace, seconds: float) -> None:
    """One part; what it had written when its time was over stays."""
    if seconds < LEAST:
        print(f"{name}: no time left", flush=True)
        return
    command = [sys.executable, "-m", "benchmarks", "gpu", "--in-process", name, "--output", str(options.output)]
    begin = time.monotonic()
    with (options.output / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command + ["--tiny"] * options.tiny, stdout=log, stderr=log, start_new_session=True)
        try:
            ended: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            ended = None
        finally:  # and what it has started: nothing else may use the card while the next part is timed
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = f"{time.monotonic() - begin:.0f} s"
    fate = {0: "done", None: f"cut after {seconds:.0f} s"}.get(ended, f"failed, see {name}.log")
    print(f"{name}: {fate} ({took})", flush=True)
    if ended != 0:
        write(options.output / f"{name}.end.json", {"fate": fate})


def write(path: Path, found: dict[str, Any]) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found, indent=1) + "\n")
    unfinished.replace(path)
