"""PEFT's adapters on the stacked experts, applied to the rows that meet an expert.

PEFT adds an adapter to the whole stack in every call, keeps that sum for the backward pass and computes its gradient
whole. In a step of decoding, where few experts are read, the sum is most of the work; in training it takes the experts'
memory twice more.

Shapes: E experts, C rows of each, D hidden size, I expert width, W = 2I with a gate and I without, r rank, T tokens, K
slots of one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .experts_ecmoe import EcMoeExperts
from .quantized_ecmoe import Stacked4bit, through_expert


def forget_text(block: Any, *_: Any) -> None:
    """Where adapters have brought a router whose thresholds are not the base's (`modules_to_save`), nobody knows on
    which text these were measured. Also a hook of torch's, after `load_state_dict`."""
    base = getattr(block.gate, "original_module", None)
    if base is None or block.config.thresholds_from is None:
        return
    for router in block.gate.modules_to_save.values():
        is_known = not (router.threshold.is_meta or base.threshold.is_meta)
        if not is_known or not torch.equal(router.threshold.cpu(), base.threshold.cpu()):
            block.config.thresholds_from = None
            return


def by_rows(experts: Any) -> Any:
    """The experts as the block calls them: PEFT's wrappers give way to their adapters, row by row. Whatever else was
    put around the experts is left alone, and so are merged adapters."""
    if isinstance(experts, EcMoeExperts) or torch.compiler.is_compiling():
        return experts
    return _AdaptedRows.of(experts) or experts


class _AdaptedRows:
    """x -> x W + s (x A) B in both products of an expert, by the contract of `EcMoeExperts`."""

    def __init__(self, base: EcMoeExperts, factors: dict[str, list[Any]]) -> None:
        self.base, self.factors = base, factors
        self.first = "gate_up_proj" if base.has_gate else "up_proj"

    @classmethod
    def of(cls, module: Any) -> "_AdaptedRows | None":
        """None unless all that is around the experts is PEFT's `ParamWrapper`, as it comes, on plain frozen weights."""
        factors = {}
        while not isinstance(module, EcMoeExperts):
            knows_factors = type(module).__name__ == "ParamWrapper" and hasattr(module, "get_delta_factors")
            if not knows_factors or module.disable_adapters or module.merged or _is_hooked(module):
                return None
            weight = module.get_param()  # of another type where it is quantised or divided among devices
            is_plain = type(weight) is nn.Parameter and weight.element_size() > 1
            if weight.requires_grad or not (is_plain or isinstance(weight, Stacked4bit)):
                return None
            active = [name for name in module.active_adapters if name in module.lora_A]
            factors[module.parameter_name] = [module.get_delta_factors(name) for name in active]
            module = module.base_layer
        return None if _is_hooked(module) else cls(module, factors)

    def __call__(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        rows_per_expert: int | list[int] | None = None,
    ) -> Tensor:
        """As `EcMoeExperts.forward`: [T, D], index and weights [T, K] -> [T, D]; or the rows [R, D] of each expert in
        turn, equally many or as many as a list says."""
        base = self.base
        into, into_bias, down, down_bias = base._stacks()
        is_in_4bit = isinstance(into, Stacked4bit) or isinstance(down, Stacked4bit)  # and one expert at a time
        if isinstance(rows_per_expert, list) or (rows_per_expert is not None and is_in_4bit):
            outputs = []
            for expert, rows in enumerate(hidden_states.split(rows_per_expert)):
                if len(rows):
                    hidden = base._activate(self._product(rows, into, into_bias, self.first, expert))
                    outputs.append(self._product(hidden, down, down_bias, "down_proj", expert))
            return torch.cat(outputs)
        if rows_per_expert is not None:
            rows_ECD = hidden_states.to(into.dtype).view(base.num_experts, rows_per_expert, -1)
            hidden_ECI = base._activate(self._product(rows_ECD, into, into_bias, self.first))
            return self._product(hidden_ECI, down, down_bias, "down_proj").flatten(0, 1)
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= base.num_experts:  # a place without a pair
                continue
            token, slot = torch.where(top_k_index == expert)
            hidden = base._activate(self._product(hidden_states[token], into, into_bias, self.first, expert))
            hidden = self._product(hidden, down, down_bias, "down_proj", expert) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, hidden.to(output.dtype))
        return output

    def _product(self, rows: Tensor, weight: Tensor, bias: Tensor | None, name: str, expert: Any = ...) -> Tensor:
        """Rows through the matrices of a stack, [E, W, D] or [E, D, I], and through its adapters: [E, C, D or I]
        through all, [R, D or I] through one expert's."""
        product = _through(rows, weight) if expert is ... else through_expert(rows, weight, expert)
        if bias is not None:
            product = product + bias[expert].unsqueeze(-2).to(product.dtype)
        for outer, inner, scaling in self.factors.get(name, ()):  # [E, W or D, r] and [E, r, D or I]
            product = product + scaling * _through(_through(rows, inner[expert]), outer[expert])
        return product


def _through(rows: Tensor, weight: Tensor) -> Tensor:
    return linear(rows, weight) if weight.dim() == 2 else torch.bmm(rows, weight.mT)


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to be asked when the module is called: offloading, sharding, a parallel plan."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
