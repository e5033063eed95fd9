"""A plain training loop, the same for every arm: AdamW, warm-up and cosine, gradient clipping."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .grid import Run
from .parents import PARENTS

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.0
WARM_UP_STEPS = 20  # at most a tenth of the steps
MOST_NORM = 1.0
CHECKPOINTS = 5


def learning_rate_factor(step: int, steps: int) -> float:
    """Of step 0, 1, ...: linear warm-up, then a cosine that would reach 0 at `steps`."""
    warm_up = min(WARM_UP_STEPS, steps // 10)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def checkpoint_steps(steps: int) -> set[int]:
    """After which steps a run is measured; 0 is before any."""
    return {round(steps * part / CHECKPOINTS) for part in range(CHECKPOINTS + 1)}


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to: "router", "experts" (the routed ones) or "rest"."""
    return "router" if ".gate." in name else "experts" if ".experts." in name else "rest"


def parameter_groups(model: Any, run: Run) -> list[dict[str, Any]]:
    """Router, routed experts and the rest, each with its own learning rate."""
    rates = {"router": run.router_rate, "experts": run.experts_rate, "rest": 1.0}
    members: dict[str, list[Tensor]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[part_of(name)].append(parameter)
    return [
        {"params": members[name], "lr": run.learning_rate * rate, "base": run.learning_rate * rate}
        for name, rate in rates.items()
        if members[name]
    ]


def optimizer_of(model: Any, run: Run) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, run), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def one_step(model: Any, optimizer: torch.optim.Optimizer, rows: Tensor, run: Run, factor: float) -> None:
    """One optimiser step over [rows, L] token ids, in passes of `run.pool_rows` windows; factor: of the base rates."""
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor
    for part in rows.split(run.pool_rows):
        part = part.to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=PARENTS[run.parent].bfloat16):
            loss = model(input_ids=part, labels=part, use_cache=False).loss
        (loss * len(part) / len(rows)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MOST_NORM)
    optimizer.step()
    optimizer.zero_grad()


def train(model: Any, batches: Iterable[Tensor], run: Run, steps: int, measure: Callable[[int], None]) -> None:
    """Trains in place.

    Args:
        batches: [rows, L] token ids, one for each step; each is gone through in passes of `run.pool_rows` windows.
        measure: called with the steps that are done.
    """
    optimizer = optimizer_of(model, run)
    when = checkpoint_steps(steps)
    measure(0)
    model.train()
    for step, rows in enumerate(tqdm(batches, total=steps, desc=run.name, unit="step", disable=None, leave=False)):
        one_step(model, optimizer, rows, run, learning_rate_factor(step, steps))
        if step + 1 in when:
            measure(step + 1)
            model.train()
