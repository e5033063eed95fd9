"""Losses of tokens without all of a batch's logits at once: with 49,152 words those of 4,096 tokens are 800 MB.

Shapes: B rows, S tokens of a row, N predicted tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modeling_ecmoe.mixins_ecmoe import EcMoeForCausalLMMixin

from .loading import is_of_family

_LOGITS = 1 << 23  # at once: 32 MiB in float32


@torch.no_grad()
def token_losses(model: Any, inputs: Mapping[str, Tensor], is_predicted: Tensor) -> Tensor:
    """Cross-entropies [N] float64 of the tokens that are predicted, in nats, row by row, on the CPU.

    Args:
        model: any causal language model, in the mode that it is to be looked at in.
        inputs: keyword arguments of its forward, input_ids [B, S] among them.
        is_predicted: [B, S - 1] bool, of the tokens after the first.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    is_predicted = is_predicted.to(model.device)
    is_ours = isinstance(model, EcMoeForCausalLMMixin)
    if is_ours:
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        head: Callable[[Tensor], Tensor] = lambda hidden_ND: model.scale_logits(model.lm_head(hidden_ND))  # noqa: E731
        return _cross_entropies(hidden[is_predicted], head, inputs["input_ids"][:, 1:][is_predicted], model)
    # What else its forward does to logits is its own affair. Rows do not see each other, unless experts choose.
    rows, length = inputs["input_ids"].shape
    step = rows if is_of_family(model) else max(1, _logits_at_once(model) // length)
    losses = []
    for start in range(0, rows, step):
        part = {name: tensor[start : start + step] for name, tensor in inputs.items()}
        here = is_predicted[start : start + step]
        logits = model(**part, use_cache=False).logits[:, :-1]
        losses.append(
            _cross_entropies(logits[here], lambda logits_NV: logits_NV, part["input_ids"][:, 1:][here], model)
        )
    return torch.cat(losses)


def _logits_at_once(model: Any) -> int:
    return max(64, _LOGITS // (getattr(model.config.get_text_config(), "vocab_size", None) or 1))


def _cross_entropies(values_ND: Tensor, head: Callable[[Tensor], Tensor], targets_N: Tensor, model: Any) -> Tensor:
    step = _logits_at_once(model)
    losses = [
        nn.functional.cross_entropy(head(values).float(), targets, reduction="none")
        for values, targets in zip(values_ND.split(step), targets_N.split(step), strict=True)
    ]
    return torch.cat(losses).double().cpu()


def row_sums(values_N: Tensor, is_predicted: Tensor) -> Tensor:
    """[B] float64: what `token_losses` gives, added up in each row."""
    rows_N = is_predicted.cpu().nonzero()[:, 0]
    return torch.zeros(len(is_predicted), dtype=torch.float64).index_add_(0, rows_N, values_N)


def log_likelihoods(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """[B] float64: the log-likelihood of each row's tokens after its first, in nats; padding counts nothing."""
    is_predicted = batch["attention_mask"][:, 1:].bool()
    return -row_sums(token_losses(model, batch, is_predicted), is_predicted)
