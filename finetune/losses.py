"""Losses of held-out rows: sums over learned tokens and their numbers, whatever batches the rows came in.

Shapes: B rows, S tokens of a row, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100


class LossSums:
    """The loss of all rows of an evaluation, and how many tokens it is of; rows that ranks see twice count once."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.loss, self.tokens = 0.0, 0
        self._rows: Tensor | None = None

    def mean(self) -> float:
        """Nats per learned token."""
        return self.loss / self.tokens

    @contextlib.contextmanager
    def watch(self, model: nn.Module, labels: Tensor) -> Iterator[None]:
        """Reads the losses of the rows off the first output that a pass through the model gives while this is open.

        labels: [B, S], IGNORE where nothing is learned.
        """

        def read(_module: nn.Module, _args: tuple, output: Any) -> None:
            if self._rows is None:
                self._rows = _row_sums(output, labels)

        self._rows = None
        handle = model.register_forward_hook(read)
        try:
            yield
        finally:
            handle.remove()

    def gather(self, accelerator: Any) -> None:
        """Adds the rows of all ranks up, those left out that fill up the last batch."""
        if self._rows is None:
            return
        loss, tokens = accelerator.gather_for_metrics(self._rows).sum(0).tolist()
        self.loss, self.tokens = self.loss + loss, self.tokens + round(tokens)
        self._rows = None


def _row_sums(output: Any, labels: Tensor) -> Tensor | None:
    """[B, 2] float64, each row's summed loss and its learned tokens; None of an output without logits.

    Row by row, because a float32 copy of all logits would not fit where the logits just do.
    """
    if getattr(output, "log_probs", None) is not None:  # TRL's fused head: [B, S - 1], 0 where nothing is learned
        return torch.stack([-output.log_probs.double().sum(1), output.label_mask.double().sum(1)], dim=1)
    logits = getattr(output, "logits", None)
    if logits is None:
        return None
    sums = []
    for row, targets in zip(logits, labels.to(logits.device), strict=True):
        loss = nn.functional.cross_entropy(row[:-1].float(), targets[1:], reduction="sum", ignore_index=IGNORE)
        sums.append(torch.stack([loss.double(), (targets[1:] != IGNORE).sum().double()]))
    return torch.stack(sums)
