"""What one model does with held-out text: its loss, and the routes of training or inference, counted.

Shapes: T tokens, E experts.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modeling_ecmoe import sparse_blocks, training_routes

from .losses import row_sums, token_losses
from .text import Batch

Routes = Callable[..., tuple[Tensor, int]]


def inputs_of(batch: Batch) -> Batch:
    """Without labels."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def routes_of_training(block: Any, scores_TE: Tensor, _threshold_E: Tensor) -> tuple[Tensor, int]:
    return training_routes(block, scores_TE)


def routes_of_inference(block: Any, scores_TE: Tensor, threshold_E: Tensor) -> tuple[Tensor, int]:
    return block.routes(scores_TE, threshold_E), 0


@dataclass
class Counts:
    """Of one pass after the other, layer by layer."""

    dropped: int = 0
    chosen: int = 0
    uncovered: int = 0
    tokens: int = 0
    load_max: list[float] = field(default_factory=list)
    load_cv: list[float] = field(default_factory=list)

    def add(self, routes_TE: Tensor, dropped: int) -> None:
        load_E = routes_TE.sum(0).double()
        self.dropped += dropped
        self.chosen += int(load_E.sum())
        self.uncovered += int((~routes_TE.any(1)).sum())
        self.tokens += len(routes_TE)
        mean = load_E.mean().clamp(min=1e-9)
        self.load_max.append(float(load_E.max() / mean))
        self.load_cv.append(float(load_E.std(correction=0) / mean))

    def figures(self) -> dict[str, float]:
        return {
            "dropped": self.dropped / max(self.chosen + self.dropped, 1),
            "no_expert": self.uncovered / self.tokens,
            "experts_per_token": self.chosen / self.tokens,
            "load_max": statistics.fmean(self.load_max),
            "load_cv": statistics.fmean(self.load_cv),
        }


@contextlib.contextmanager
def _count(model: nn.Module, routes_of: Routes) -> Iterator[Counts]:
    """Counts the routes that `routes_of` finds for every block's scores while the context is open."""
    counts = Counts()

    def hook_of(block: Any) -> Callable[..., None]:
        return lambda _module, _args, output: counts.add(*routes_of(block, output[1], output[2]))

    handles = [block.gate.register_forward_hook(hook_of(block)) for block in sparse_blocks(model).values()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def held_out_figures(
    model: Any, batches: list[Batch], routes_of: Routes, on_pass: Callable[[int], Any]
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Figures of the routes with the loss, and of each row its summed loss and its predicted tokens, float64."""
    losses, predicted = [], []
    with _count(model, routes_of) as counts:
        for batch in batches:
            is_predicted = batch["labels"][:, 1:] != -100  # not the first token of a document
            losses.append(row_sums(token_losses(model, inputs_of(batch), is_predicted), is_predicted))
            predicted.append(is_predicted.double().sum(1))
            on_pass(is_predicted.numel())
    nll, count = torch.cat(losses), torch.cat(predicted)
    return counts.figures() | {"loss": float(nll.sum() / count.sum())}, nll, count
