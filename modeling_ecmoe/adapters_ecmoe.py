"""PEFT's adapters on the stacked experts where nothing is learned: on the rows that meet an expert.

PEFT adds an adapter to the whole stack in every call. In a step of decoding, where few experts are read, that sum is
most of the work.

Shapes: E experts, D hidden size, I expert width, W = 2I with a gate and I without, r rank, T tokens, K slots of one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .experts_ecmoe import EcMoeExperts


def by_rows(experts: Any) -> Any:
    """The experts as the block calls them where it does not learn: without gradients PEFT's wrappers give way to their
    adapters, row by row. Whatever else was put around the experts is left alone, and so are merged adapters."""
    if isinstance(experts, EcMoeExperts) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return experts
    return _AdaptedRows.of(experts) or experts


class _AdaptedRows:
    """x -> x W + s (x A) B in both products of an expert, by the contract of Transformers' experts back-ends."""

    def __init__(self, wrapped: nn.Module, base: EcMoeExperts, factors: dict[str, list[Any]]) -> None:
        self.wrapped, self.base, self.factors = wrapped, base, factors

    @classmethod
    def of(cls, wrapped: Any) -> "_AdaptedRows | None":
        """None unless all that is around the experts is PEFT's `ParamWrapper`, as it comes, on plain weights."""
        factors, module = {}, wrapped
        while not isinstance(module, EcMoeExperts):
            knows_factors = type(module).__name__ == "ParamWrapper" and hasattr(module, "get_delta_factors")
            if not knows_factors or module.disable_adapters or module.merged or _is_hooked(module):
                return None
            weight = module.get_param()
            if type(weight) is not nn.Parameter or weight.element_size() < 2:  # quantised, or divided among devices
                return None
            active = [name for name in module.active_adapters if name in module.lora_A]
            factors[module.parameter_name] = [module.get_delta_factors(name) for name in active]
            module = module.base_layer
        return None if _is_hooked(module) else cls(wrapped, module, factors)

    def __call__(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, rows_per_expert: int | None = None
    ) -> Tensor:
        """As `EcMoeExperts.forward`: [T, D], index and weights [T, K] -> [T, D]. Equal rows of all experts read the
        whole stack anyway."""
        if rows_per_expert is not None:
            return self.wrapped(hidden_states, top_k_index, top_k_weights, rows_per_expert=rows_per_expert)
        base, output = self.base, torch.zeros_like(hidden_states)
        into, into_bias, down, down_bias = base._stacks()
        first = "gate_up_proj" if base.has_gate else "up_proj"
        for expert in top_k_index.unique().tolist():
            if expert >= base.num_experts:  # a place without a pair
                continue
            token, slot = torch.where(top_k_index == expert)
            hidden = base._activate(self._product(hidden_states[token], into, into_bias, first, expert))
            hidden = self._product(hidden, down, down_bias, "down_proj", expert) * top_k_weights[token, slot, None]
            output.index_add_(0, token, hidden.to(output.dtype))
        return output

    def _product(self, rows: Tensor, weight: Tensor, bias: Tensor | None, name: str, expert: int) -> Tensor:
        """Rows [R, D or I] through one expert's matrix of a stack, [E, W, D] or [E, D, I], and through its adapters."""
        product = linear(rows, weight[expert], None if bias is None else bias[expert])
        for outer, inner, scaling in self.factors.get(name, ()):  # [E, W or D, r] and [E, r, D or I]
            product = product + scaling * linear(linear(rows, inner[expert]), outer[expert])
        return product


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to be asked when the module is called: offloading, sharding, a parallel plan."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
