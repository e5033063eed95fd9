"""What a back-end, a parallel plan or a server wants of the experts, so that the block need not know of it.

Shapes: T tokens, R rows, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from .experts_ecmoe import EcMoeExperts


def unweighted_rows(experts: Any, rows_RD: Tensor, expert_R: Tensor, rows_per_expert: int | list[int] | None) -> Tensor:
    """Rows [R, D] through their experts, unweighted, by the contract of Transformers' experts back-ends with K = 1.

    rows_per_expert: the rows of every expert, or of each, in the order of the experts. Under Transformers' expert
        parallelism
        `experts.forward` is a dispatcher with the contract's three arguments, and reads it off the module.
    """
    ones_R1 = rows_RD.new_ones(len(rows_RD), 1)  # weighted afterwards, in the router's precision
    if rows_per_expert is None:
        return experts(rows_RD, expert_R[:, None], ones_R1)
    if not getattr(experts, "_is_expert_parallel", False):
        return experts(rows_RD, expert_R[:, None], ones_R1, rows_per_expert=rows_per_expert)
    experts.rows_per_expert = rows_per_expert
    try:
        return experts(rows_RD, expert_R[:, None], ones_R1)
    finally:
        experts.rows_per_expert = None


def wants_counts(experts: Any, routes_TE: Tensor) -> bool:
    """Whether inference tells the experts the rows of each: on a CPU, where the host reads them at no cost, and of
    experts that are ours, wrapped by an adapter or not."""
    device = routes_TE.device.type
    if device != "cpu" or device in _WAITING or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    return isinstance(experts, EcMoeExperts) and experts.takes_counts()


def wants_slots(experts: Any, max_experts_per_token: int | None) -> bool:
    """Whether inference gives every token as many slots: for static shapes, where a bound makes them few, and for a
    server.

    vLLM and SGLang put a kernel of their own in place of the experts, which wants `config.num_experts_per_tok` slots of
    every token. Its weights have other names; adapters and quantisers keep ours, and take any rows.
    """
    if torch.compiler.is_compiling() or max_experts_per_token is not None:
        return True
    if isinstance(experts, EcMoeExperts):
        return False
    return not any("down_proj" in name for name, _ in experts.named_parameters())


FEW_PLACES = 4096  # T * E, of a step of decoding; the rows of more would cost memory


def wants_places(experts: Any, routes_TE: Tensor) -> bool:
    """Whether inference gives every token and expert a place: on a GPU, where to count the routes of a layer the host
    would wait in every step of decoding, and with the back-end that leaves the other places out. Not where gradients
    are wanted: those of a place that is left out are undefined."""
    return (
        not torch.is_grad_enabled()
        and routes_TE.device.type in _WAITING
        and routes_TE.numel() <= FEW_PLACES
        and isinstance(experts, EcMoeExperts)
        and experts.leaves_rows_out()
    )


_WAITING = {"cuda"}
