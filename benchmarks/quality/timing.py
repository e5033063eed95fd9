"""Seconds of a training step of each arm, side by side: runs share their machine with other runs, and their own clocks
disagree by a factor of two."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..harness import interleaved
from .data import MIXTURE, training_batches
from .execute import Bench
from .grid import ARMS, Run
from .train import one_step, optimizer_of

ROUNDS = 7


def step_seconds(bench: Bench, runs: Sequence[Run], rounds: int = ROUNDS) -> dict[str, Any]:
    """The median of `rounds` interleaved steps of each arm among the runs.

    Threshold training is timed past its warm-up; arms that differ in the number of steps alone are left out.
    """
    first = {run.arm: run for run in reversed(runs) if not ARMS[run.arm].matched}
    seconds = interleaved({arm: _step(bench, run) for arm, run in first.items()}, rounds)
    return {
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "seconds": {arm: statistics.median(values) for arm, values in seconds.items()},
    }


def _step(bench: Bench, run: Run) -> Callable[[], object]:
    config = {"threshold_after_steps": 0} if ARMS[run.arm].routing == "threshold" else {}
    model = bench.build(replace(run, config=config))[0].train()
    optimizer = optimizer_of(model, run)
    pools = {domain: bench.windows[domain].train for domain in MIXTURE}
    (rows,) = training_batches(pools, run.rows, 1, run.seed)
    return lambda: one_step(model, optimizer, rows, run, 0.0)  # at a rate of 0, so that it stays the same step
