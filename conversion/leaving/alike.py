"""Layers that compute the same by whatever routes, as most conversions before training: nothing of them is measured."""

import torch
from torch import Tensor

from .plain import PlainPlan, layer_of

_DOWN = ".mlp.experts.down_proj"
_OF_SHARED = ("gate_proj", "up_proj", "down_proj")


def layers_to_fit(plan: PlainPlan) -> list[str]:
    """The numbers of the sparse layers for which something has to be measured; reads as much of the experts as it takes
    to see that they differ.

    Raises:
        ConversionError: when a value is NaN or infinite.
    """
    if not (plan.form.is_scaled or plan.form.is_shifted):
        return []
    prefixes = [name.removesuffix(_DOWN) for name in plan.source.headers if name.endswith(_DOWN)]
    return sorted((layer_of(prefix) for prefix in prefixes if not _is_indifferent(plan, prefix)), key=int)


def _is_indifferent(plan: PlainPlan, prefix: str) -> bool:
    """Whether no route changes what a layer computes: experts add nothing; or they are one FFN, and the weights of a
    token add up to one; or this FFN is the shared expert, which takes what is missing to one."""
    config = plan.source_config
    is_complement = config.shared_expert_weighting == "complement"
    experts = range(config.num_experts)
    if not is_complement and not any(plan.source.read(prefix + _DOWN, e, e + 1).any() for e in experts):
        return True
    if is_complement:
        return all(_same(_expert(plan, prefix, e), _shared(plan, prefix)) for e in experts)
    has_one = config.routing == "token_choice" or config.min_experts_per_token >= 1
    if not (config.normalize_combine_weights and has_one):
        return False
    return all(_same(_expert(plan, prefix, e), _expert(plan, prefix, 0)) for e in experts)


def _expert(plan: PlainPlan, prefix: str, expert: int) -> list[Tensor]:
    """gate_proj over up_proj, and down_proj."""
    names = (".mlp.experts.gate_up_proj", _DOWN)
    return [plan.source.read(prefix + name, expert, expert + 1)[0] for name in names]


def _shared(plan: PlainPlan, prefix: str) -> list[Tensor]:
    gate, up, down = (plan.source.read(f"{prefix}.mlp.shared_expert.{name}.weight") for name in _OF_SHARED)
    return [torch.cat([gate, up]), down]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
