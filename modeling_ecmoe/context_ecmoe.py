"""What is set around a pass through a model: which tokens are real, and another routing than the config's."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .block_ecmoe import EcMoeBlock


def _blocks_of(layer: nn.Module) -> list[EcMoeBlock]:
    """The block of a decoder layer, wrapped or not; without the walk over all modules, which every token would pay."""
    mlp = getattr(layer, "mlp", None)
    if isinstance(mlp, EcMoeBlock):
        return [mlp]
    return [module for module in layer.modules() if isinstance(module, EcMoeBlock)]


@contextlib.contextmanager
def announce_tokens(model: Any, token_mask: Tensor | None) -> Iterator[None]:
    """Tells the blocks of a base model which tokens [B, S] are real, before its layers are entered.

    In eager mode each decoder layer tells its block again, because a recomputed layer is entered without the
    model. A compiled layer under gradient checkpointing may not set attributes, and reads what was set here.
    """
    blocks = [block for layer in model.config.dense_ffn.layers_of(model) for block in _blocks_of(layer)]
    learning = model.training and torch.is_grad_enabled()
    if learning and getattr(model, "_is_replica", False):
        raise ValueError(
            "nn.DataParallel cannot train this model: what its replicas learn of thresholds is thrown away. Start one "
            "process per GPU with `accelerate launch` or torchrun, or show this process a single GPU"
        )
    for block in blocks:
        if not hasattr(block.gate, "threshold"):  # PEFT's wrapper of a parameter shows nothing of what it wraps
            raise ValueError(
                "mlp.gate.weight cannot have an adapter: the thresholds belong to the router as a whole. Take it out "
                'of target_parameters and train the router itself: modules_to_save=["gate"]'
            )
        block.token_mask = token_mask
        if learning:
            block.gate.expect_thresholds()
    try:
        yield
    finally:
        for block in blocks:
            block.token_mask = None


@contextlib.contextmanager
def use_inference_routing(model: nn.Module, routing: str | None = None) -> Iterator[None]:
    """Routes as in eval mode while the context is open, also in a model that is left in train mode.

    routing: "threshold", "token_choice", or "expert_choice", which is not causal; None is each model's
        `inference_routing`.

    Raises:
        ValueError: for another routing.
    """
    if routing not in (None, "threshold", "expert_choice", "token_choice"):
        raise ValueError(f"routing={routing!r} is unknown; use 'threshold', 'expert_choice', 'token_choice' or None")
    blocks = [module for module in model.modules() if isinstance(module, EcMoeBlock)]
    asked = [routing or block.config.inference_routing for block in blocks]
    for block, override in zip(blocks, asked, strict=True):
        block.routing_overrides.append(override)
    try:
        yield
    finally:
        # Not "restore what was": two threads that generate at once do not close in the order they opened.
        for block, override in zip(blocks, asked, strict=True):
            block.routing_overrides.remove(override)
