"""Other combine weights than the model's own, tried where a token has one expert.

Divided by its sum, the weight of a token's only expert is 1 whatever its score is, and its router learns nothing from
the task. Two ways to give it a gradient, both of which leave the model's code as it is.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from modeling_ecmoe import pairs_ecmoe, sparse_blocks, use_inference_routing
from modeling_ecmoe.routing_ecmoe import combine_weights


@contextlib.contextmanager
def of(kind: str, model: Any, rows_NL: Tensor) -> Iterator[None]:
    """Combine weights of that kind while the context is open.

    kind: "normalised" is the model's own. "straight-through" has the same values, and the gradient of a score over a
    constant (Bengio et al. 2013, arXiv 1308.3432). "raw" is the score times one number for all tokens, which makes
    the mean weight 1 on `rows_NL` before training, so that the model begins near its parent and not at it.
    """
    if kind == "normalised":
        yield
        return
    scale = 1 / _mean_best_score(model, rows_NL) if kind == "raw" else 0.0

    def weigh(
        scores: Tensor, token_index: Tensor, num_tokens: int, normalize: bool, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        if kind == "raw":
            return scale * scores, combine_weights(scores, token_index, num_tokens, normalize, *rest)[1]
        values, sums = combine_weights(scores.detach(), token_index, num_tokens, normalize, *rest)
        return values + (scores - scores.detach()) * (values / scores.detach().clamp(min=1e-9)), sums

    pairs_ecmoe.combine_weights = weigh  # type: ignore[assignment]
    try:
        yield
    finally:
        pairs_ecmoe.combine_weights = combine_weights


@torch.no_grad()
def _mean_best_score(model: Any, rows_NL: Tensor) -> float:
    """What a token's best expert scores, the mean over tokens and layers."""
    best: list[Tensor] = []

    def see(_module: Any, _arguments: Any, output: tuple[Tensor, ...]) -> None:
        best.append(output[1].amax(-1).mean())

    hooks = [block.gate.register_forward_hook(see) for block in sparse_blocks(model).values()]
    with use_inference_routing(model, "expert_choice"):
        model.eval()(input_ids=rows_NL.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(best).mean().item()
