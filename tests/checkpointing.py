"""Gradient checkpointing under the name that the installed Transformers has for it."""

from typing import Any

from transformers import PreTrainedModel


def recompute_layers(model: PreTrainedModel, **kwargs: Any) -> None:
    """Switches it on; kwargs are those of torch.utils.checkpoint. The older name is deprecated since 5.23."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(kwargs)
