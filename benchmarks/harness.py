"""Side-by-side timing: all candidates in one run, interleaved in a new order each round, medians and ratios."""

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call of each candidate, `rounds` of them, the order drawn anew in every round."""
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        shuffle(order)
        for name in order:
            synchronize()
            begin = time.perf_counter()
            candidates[name]()
            synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def summarize(seconds: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """For each candidate the median of its seconds, and of its ratio to the reference in the same round."""
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, seconds[reference], strict=True)),
        }
        for name, values in seconds.items()
    }


def table(rows: dict[str, dict[str, float]], reference: str) -> str:
    lines = [f"| | ms | over {reference} |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {row['seconds'] * 1e3:.1f} | {row['ratio']:.2f} |" for name, row in rows.items()]
    return "\n".join(lines)
