"""How much can be done in a time: a rate measured on one small pass, and what follows from it."""

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .losses import token_losses

MEASURED_TOKENS = 512  # of the pass that the rate is measured on


def seconds_per_token(model: Any, inputs: Mapping[str, Tensor], is_predicted: Tensor) -> float:
    """Of a forward pass and its losses in eval mode, as measured on these inputs after a pass that warms up.

    Small passes take longer per token than large ones, so that estimates err on the safe side. Arguments as of
    `token_losses`.
    """
    was_training = model.training
    model.eval()
    try:
        token_losses(model, {name: tensor[:1, :64] for name, tensor in inputs.items()}, is_predicted[:1, :63])
        begin = time.perf_counter()
        token_losses(model, inputs, is_predicted)
        return (time.perf_counter() - begin) / inputs["input_ids"].numel()
    finally:
        model.train(was_training)


def halved_until(fits: float, most: int, least: int) -> int:
    """The largest of most, most / 2, most / 4, ... that is no more than `fits`; `least` where that is smaller.

    Steps of two, so that one machine gives one number although no two measured rates are alike.
    """
    number = most
    while number > max(fits, least):
        number //= 2
    return max(number, least)
