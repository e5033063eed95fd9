"""How far a mean loss is known: standard errors over documents, alone and of the difference of two models."""

import torch
from torch import Tensor


def paired_difference(nll: Tensor, reference: Tensor, predicted: Tensor) -> tuple[float, float]:
    """Mean loss per token minus the reference's, and its standard error over units [N] of the same text.

    The units' own difficulty cancels, which is most of what their losses vary by. A unit weighs by its predicted
    tokens: the error is that of a ratio of sums. With a single unit there is none, and it is infinite.
    """
    difference = (nll - reference).double()
    mean = difference.sum() / predicted.sum()
    if len(nll) < 2:
        return float(mean), float("inf")
    residual = difference - mean * predicted
    error = (len(nll) * residual.var()).sqrt() / predicted.sum()
    return float(mean), float(error)


def mean_and_error(nll: Tensor, predicted: Tensor) -> tuple[float, float]:
    """Mean loss per token over units [N], and its standard error."""
    return paired_difference(nll, torch.zeros_like(nll), predicted)


def per_document(values_N: Tensor, documents: list[int]) -> Tensor:
    """Sums [M] over the rows of each document, in order; over rows [N] as they are where all are of one document."""
    order = {number: place for place, number in enumerate(dict.fromkeys(documents))}
    if len(order) < 2:
        return values_N
    places = torch.tensor([order[number] for number in documents])
    return torch.zeros(len(order), dtype=values_N.dtype).index_add_(0, places, values_N)
