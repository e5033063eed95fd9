"""Losses beside a trainer's own: of held-out rows, sums over learned tokens and their numbers, whatever batches the
rows came in; and the router's, for trainers that compute the loss without the model's head.

Shapes: B rows, S tokens of a row, V vocabulary.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ecmoe.encoding import IGNORE


class RowLengths:
    """A collator beside whose flattened batch stands how many of its tokens are of each row."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """As the collator's, with row_lengths [B]."""
        lengths: Tensor = torch.tensor([len(row["input_ids"]) for row in rows])
        return {**self.collator(rows), "row_lengths": lengths}


class LossSums:
    """What is summed over the rows of an evaluation; rows that ranks see twice count once.

    rows: of each row, in the order of the evaluation, its sums by the names of _SUMS.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.rows: list[list[float]] = []
        self._rows: Tensor | None = None

    def means(self) -> dict[str, float]:
        """By learned token: loss, and where TRL's head gives them entropy and mean_token_accuracy; {} of no rows."""
        totals = self.totals
        tokens = totals.pop("tokens", 0)
        return {name: total / tokens for name, total in totals.items()} if tokens else {}

    @property
    def totals(self) -> dict[str, float]:
        """The sums over all rows."""
        return dict(zip(_SUMS, map(math.fsum, zip(*self.rows, strict=True)), strict=False))

    def losses(self) -> list[tuple[float, int]]:
        """The summed loss and the number of learned tokens of each row."""
        return [(row[0], round(row[1])) for row in self.rows]

    @contextlib.contextmanager
    def watch(self, model: nn.Module, labels: Tensor, lengths: Tensor | None) -> Iterator[None]:
        """Reads the losses of the rows off the first output that a pass through the model gives while this is open.

        labels: [B, S], IGNORE where nothing is learned.
        lengths: [B], tokens of each row where they were put into one, and labels is [1, S]; None elsewhere.
        """

        def read(_module: nn.Module, _args: tuple, output: Any) -> None:
            if self._rows is None:
                self._rows = _row_sums(output, labels, lengths)

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
        self.rows += accelerator.gather_for_metrics(self._rows).tolist()
        self._rows = None


def standard_error(rows: Sequence[tuple[float, int]]) -> float | None:
    """Of a loss by token, sum of the rows' losses by the sum of their tokens, over rows drawn at random; None of one.

    rows: of each the summed loss, or difference of two losses, and the tokens. That of a ratio estimator (Cochran,
        Sampling Techniques, 1977, 2.11): rows of more tokens count for more.
    """
    tokens = sum(count for _, count in rows)
    if len(rows) < 2 or not tokens:
        return None
    mean = math.fsum(total for total, _ in rows) / tokens
    squares = math.fsum((total - mean * count) ** 2 for total, count in rows)
    return math.sqrt(squares * len(rows) / (len(rows) - 1)) / tokens


_SUMS = ("loss", "tokens", "entropy", "mean_token_accuracy")


def _row_sums(output: Any, labels: Tensor, lengths: Tensor | None) -> Tensor | None:
    """[B, 2 or 4] float64, each row's sums by the names of _SUMS; None of an output without logits."""
    if getattr(output, "log_probs", None) is not None:  # TRL's fused head: [B, S - 1], 0 where nothing is learned
        found = [-output.log_probs, output.label_mask, output.entropy, output.is_top1]
    elif getattr(output, "logits", None) is not None:
        targets = labels[:, 1:].to(output.logits.device)
        # Row by row, because a float32 copy of all logits would not fit where the logits just do.
        losses = [
            nn.functional.cross_entropy(row[:-1].float(), target, reduction="none", ignore_index=IGNORE)
            for row, target in zip(output.logits, targets, strict=True)
        ]
        found = [torch.stack(losses), targets != IGNORE]
    else:
        return None
    sums = torch.stack([each.double() for each in found if each is not None], dim=-1)
    if lengths is None:
        return sums.sum(1)
    # A token's loss is where it is predicted, one place before it.
    first, *others = lengths.tolist()
    return torch.stack([row.sum(0) for row in sums[0, : sum(others) + first - 1].split([first - 1, *others])])


@contextlib.contextmanager
def router_losses(language_model: Any) -> Iterator[list[Tensor]]:
    """The router's losses by their coefficients, one of each pass through the model that is learned from."""
    found: list[Tensor] = []

    def ask(_module: nn.Module, args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, options | {"output_router_logits": True}

    def keep(_module: nn.Module, _args: tuple, options: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():  # not a reference model's
            mask = options.get("attention_mask") if options.get("token_mask") is None else options["token_mask"]
            mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
            found.append(language_model.router_losses(output.router_logits, mask)[1])

    base = language_model.get_decoder()
    hooks = [base.register_forward_pre_hook(ask, with_kwargs=True), base.register_forward_hook(keep, with_kwargs=True)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
