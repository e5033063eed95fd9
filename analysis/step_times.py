"""How long a training step takes with each way of routing, side by side."""

import time
from random import Random
from typing import Any

import torch

from ecmoe.progress import progress_bar

from .text import Batch
from .variants import Variant, configure


def step_times(model: Any, variants: list[Variant], batch: Batch, rounds: int, seed: int) -> list[list[float]]:
    """Seconds of a training step's forward and backward pass, [variants][rounds]; empty for no rounds.

    One model takes every variant's fields in turn, since blocks read them at each call; in every round all variants
    run once, in another order, so that whatever else the machine does meets all of them alike.
    """
    random = Random(seed)
    seconds: list[list[float]] = [[] for _ in variants]
    if not rounds:
        return seconds
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    model.train()
    total = (1 + rounds) * len(variants)
    with progress_bar(total=total, desc="Timing steps", unit="step") as bar:
        for is_warm in (False, *[True] * rounds):
            order = list(range(len(variants)))
            random.shuffle(order)
            for number in order:
                configure(model, variants[number])
                model.zero_grad()
                _wait(model.device)
                begin = time.perf_counter()
                model(**batch, use_cache=False).loss.backward()
                _wait(model.device)
                if is_warm:
                    seconds[number].append(time.perf_counter() - begin)
                bar.update()
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
