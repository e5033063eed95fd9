"""What a mixture whose tokens chose loses when its experts choose: each bound on the experts of a token side by side.

Letters: T tokens, E experts, K experts of one token.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modeling_ecmoe import calibrate_thresholds, sparse_blocks
from modeling_ecmoe.routing_ecmoe import choose_experts

from ..texts import BATCH, VERIFICATION_BATCH

CAPACITIES = (1.0, 1.25)  # of token choice in training, times an equal share
_PLAIN = {
    "min_experts_per_token": 0,
    "max_experts_per_token": None,
    "router_aux_loss_coef": 0.0,
    "token_choice_bias_update_rate": None,
}


@torch.no_grad()
def measure_regimes(
    model: Any, calibration: Tensor, verification: list[Tensor], biases: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """Loss and load of the model by the source's own rule and under every bound, calibrated for each.

    The model is left as it was. Losses are causal, in nats per token.

    Args:
        model: a conversion of a mixture to expert choice.
        calibration: token ids [W, L] of text to set thresholds on.
        verification: of each kind of other text to measure on.
        biases: of a source whose tokens choose by biased scores, by threshold's name what stands for them [E].

    Returns:
        source: the figures of token choice, with `dropped`, the share of its choices for which a capacity of each of
            CAPACITIES would leave no room, first come first served among a batch;
        bounds: for each pair of bounds those of expert choice, the least and the most experts of a token among them.
    """
    config = model.config.get_text_config()
    top_k, num_experts = int(config.capacity_factor), config.num_experts
    rate = 0.0 if biases else None
    with _routed_as(
        model, routing="token_choice", inference_routing="token_choice", token_choice_bias_update_rate=rate
    ):
        for name, threshold in (biases or {}).items():
            model.get_buffer(name).copy_(threshold)
        source = _measure(model, verification)
    bounds = []
    asked = [(0, num_experts), (1, num_experts), (1, min(2 * top_k, num_experts)), (top_k, top_k)]
    for least, most in dict.fromkeys(asked):
        with _routed_as(
            model,
            routing="expert_choice",
            inference_routing="threshold",
            min_experts_per_token=least,
            max_experts_per_token=None if most == num_experts else most,
        ):
            calibrate_thresholds(model, [{"input_ids": batch} for batch in calibration.split(BATCH)])
            figures = _measure(model, verification)
        del figures["dropped"]
        bounds.append({"least": least, "most": most} | figures)
    return {"source": source, "bounds": bounds}


@contextlib.contextmanager
def _routed_as(model: Any, **fields: Any) -> Iterator[None]:
    """Other routing fields while the context is open, and whatever thresholds are set meanwhile."""
    config = model.config.get_text_config()
    fields = _PLAIN | fields
    kept = {name: getattr(config, name) for name in fields}
    gates = [block.gate for block in sparse_blocks(model).values()]
    thresholds = [(gate.threshold.clone(), gate.threshold_updates.clone()) for gate in gates]
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)
        for gate, (threshold, updates) in zip(gates, thresholds, strict=True):
            gate.threshold.copy_(threshold)
            gate.threshold_updates.copy_(updates)


@dataclass
class _Counts:
    """Of one layer: load [E], tokens, tokens without an expert, choices, choices that each capacity drops."""

    load: Tensor
    tokens: int = 0
    uncovered: int = 0
    dropped: list[int] = field(default_factory=lambda: [0] * len(CAPACITIES))


def _measure(model: Any, kinds: list[Tensor]) -> dict[str, Any]:
    """Loss; experts per token; load over an equal share, least and most, and its coefficient of variation, mean over
    the layers; share of tokens without an expert."""
    config = model.config.get_text_config()
    has_bias = config.token_choice_bias_update_rate is not None
    blocks = sparse_blocks(model)
    counts = {name: _Counts(torch.zeros(config.num_experts)) for name in blocks}

    def hook_of(name: str, block: Any) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            _, scores_TE, threshold_E = output
            routes_TE = block.routes(scores_TE, threshold_E)
            counted = counts[name]
            counted.load += routes_TE.sum(0).cpu()
            counted.tokens += len(routes_TE)
            counted.uncovered += int((~routes_TE.any(-1)).sum())
            for number, capacity in enumerate(CAPACITIES):
                bias_E = threshold_E if has_bias else None
                _, is_kept_TK = choose_experts(scores_TE, int(config.capacity_factor), capacity, None, bias_E)
                counted.dropped[number] += int((~is_kept_TK).sum())

        return hook

    handles = [block.gate.register_forward_hook(hook_of(name, block)) for name, block in blocks.items()]
    total, predicted = 0.0, 0
    try:
        for batch in (batch for windows in kinds for batch in windows.split(VERIFICATION_BATCH)):
            logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten().to(logits.device), reduction="sum"
            )
            total, predicted = total + float(losses.double()), predicted + batch[:, 1:].numel()
    finally:
        for handle in handles:
            handle.remove()
    found = list(counts.values())
    shares = torch.stack([counted.load / counted.load.mean().clamp(min=1e-9) for counted in found])
    tokens = sum(counted.tokens for counted in found)
    return {
        "loss": total / predicted,
        "experts_per_token": float(sum(counted.load.sum() for counted in found)) / tokens,
        "load_min": float(shares.min()),
        "load_max": float(shares.max()),
        "load_cv": float(shares.std(dim=1, correction=0).mean()),
        "uncovered": sum(counted.uncovered for counted in found) / tokens,
        "dropped": {
            str(capacity): sum(counted.dropped[number] for counted in found) / (tokens * int(config.capacity_factor))
            for number, capacity in enumerate(CAPACITIES)
        },
    }
