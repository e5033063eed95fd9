"""Weights that are too coarse for the steps of their optimiser."""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

_SAMPLE = 4_096  # weights looked at
_checked: "weakref.WeakSet[torch.optim.Optimizer]" = weakref.WeakSet()


@torch.no_grad()
def warn_lost_steps(optimizer: Any) -> None:
    """Says once for an optimiser that its steps are rounded away.

    Adam and its kin move a weight by about the learning rate. A weight w of bfloat16 or float16 has neighbours at a
    distance of some w * eps, and a step of less than half of it leaves it where it is. Optimisers that round at random
    or carry the rest along say so in their settings, and are passed over.
    """
    if optimizer in _checked:
        return
    _checked.add(optimizer)
    settings = getattr(optimizer, "defaults", {})
    if (
        settings.get("bf16_stochastic_round")
        or settings.get("kahan_sum")
        or getattr(optimizer, "bf16_stochastic_round", False)
    ):
        return
    for group in optimizer.param_groups:
        rate = float(group.get("initial_lr", group.get("lr", 0.0)))  # the highest of a schedule
        held = [p for p in group["params"] if p.dtype in (torch.bfloat16, torch.float16) and p.numel()]
        if not held or rate == 0 or not _is_adam(optimizer, held[0]):
            continue
        largest = max(held, key=Tensor.numel)
        size = largest.detach().flatten()[:_SAMPLE].abs().float().median().item()
        if rate < size * torch.finfo(largest.dtype).eps / 2:
            logger.warning_once(
                f"learning_rate={rate:.1e}: most steps of {type(optimizer).__name__} are rounded away in "
                f"{str(largest.dtype).removeprefix('torch.')} weights (half of them are above {size:.1e}, and move by "
                f"{size * torch.finfo(largest.dtype).eps:.1e} or not at all). Train the weights in float32, with "
                "bf16=True for products in bfloat16, or use an optimiser that rounds at random: "
                'optim="adamw_torch_8bit", optim_args="bf16_stochastic_round=True"'
            )
            return


def _is_adam(optimizer: Any, parameter: Tensor) -> bool:
    """Whether its steps are as long as the learning rate whatever the gradients are."""
    return "exp_avg" in optimizer.state.get(parameter, {})
