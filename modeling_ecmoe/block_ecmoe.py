"""The expert-choice FFN: router, experts, and the block that brings tokens and experts together.

It reads top to bottom like the paper (Zhou et al. 2022, arXiv 2202.09368): scores, choice, dispatch, experts,
combine. In training the experts choose their tokens among a pool; in eval mode and in `generate` a token goes to
every expert whose threshold its score exceeds (arXiv 2603.11535), so no other token is looked at.

Shapes: B batch, S sequence, T = B * S tokens, D hidden size, E experts, C slots per expert, I expert width,
R chosen (expert, token) pairs, K experts of one token.
"""

import contextlib
import copy
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .bounded_ecmoe import choose_tokens_within_bounds
from .routing_ecmoe import ExpertChoice, choose_tokens, combine_weights, router_scores, routes_by_threshold

_router_number = itertools.count()
_routers: "weakref.WeakSet[EcMoeRouter]" = weakref.WeakSet()


class EcMoeRouter(nn.Module):
    """Scores every token for every expert, and keeps the score at which each expert stops choosing.

    weight: [E, D] float. No bias.
    threshold: [E] float32 buffer, saved with the model whatever its dtype.
    threshold_updates: [] int64 buffer, how many optimiser steps the threshold averages; 0 is never calibrated.
    """

    threshold: Tensor
    threshold_updates: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.score_function = config.router_score_function
        self.threshold_decay = config.threshold_decay
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("threshold", torch.zeros(config.num_experts, dtype=torch.float32))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.int64))
        # Of this step's micro-batches: the token-weighted sum of their thresholds [E] and, last, their tokens. No
        # buffer, because DDP would overwrite every rank's with the first one's before each forward pass.
        self.pending: Tensor | None = None
        if not self.weight.is_meta:
            self._allocate_pending()
        self.has_pending = False
        self._enlist()

    def _enlist(self) -> None:
        self.number = next(_router_number)  # the same order on every rank
        _routers.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enlist()  # a deep copy is a router of its own

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [T, D] -> router logits [T, E] and scores [T, E], in float32 (float64 for a float64 model).

        Full precision whatever the model's dtype and autocast: a near tie that flips between two passes would
        send a token to another expert.
        """
        dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            router_logits = nn.functional.linear(hidden_states.to(dtype), self.weight.to(dtype))
            return router_logits, router_scores(router_logits, self.score_function)

    def _allocate_pending(self) -> Tensor:
        """The pending sums on the device the router is on; a model loaded from disk is built without them."""
        if self.pending is None or self.pending.device != self.weight.device:
            self.pending = torch.zeros(len(self.threshold) + 1, dtype=torch.float32, device=self.weight.device)
        return self.pending

    def train(self, mode: bool = True) -> "EcMoeRouter":
        if mode and not self.weight.is_meta:
            self._allocate_pending()
        return super().train(mode)

    @torch.no_grad()
    def record_threshold(self, threshold: Tensor, num_tokens: Tensor | int) -> None:
        """Adds one micro-batch's threshold [E] to what the next optimiser step averages.

        A layer recomputed under gradient checkpointing adds the same value with the same weight again, which
        leaves the mean of the step as it is.
        """
        pending = self._allocate_pending()
        pending[:-1] += threshold * num_tokens
        pending[-1] += num_tokens
        if not torch.compiler.is_compiling():  # there `announce_tokens` has said so
            self.has_pending = True

    @torch.no_grad()
    def update_threshold(self) -> None:
        """Folds the pending mean into the threshold: a bias-corrected moving average, as in Adam.

        With m_n = decay * m_(n-1) + (1 - decay) * x_n and threshold_n = m_n / (1 - decay^n), m need not be kept.
        """
        pending = self._allocate_pending()
        keep: Tensor | float = 0.0
        if self.threshold_decay > 0:
            # 1 - decay^n as expm1, which keeps its digits when decay is near 1.
            log_decay = math.log(self.threshold_decay)
            steps = self.threshold_updates.float()
            keep = self.threshold_decay * torch.expm1(steps * log_decay) / torch.expm1((steps + 1) * log_decay)
        seen = pending[-1] > 0
        mean = pending[:-1] / pending[-1].clamp(min=1)
        self.threshold.copy_(torch.where(seen, keep * self.threshold + (1 - keep) * mean, self.threshold))
        self.threshold_updates.add_(seen)
        pending.zero_()
        self.has_pending = False

    def _apply(self, fn: Any, recurse: bool = True) -> "EcMoeRouter":
        """Moves with the model, but a change of dtype leaves the float32 thresholds as they are."""
        threshold = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype != torch.float32:
            moved = self.threshold
            self.threshold = moved.float() if threshold.is_meta else threshold.to(moved.device)
        if self.pending is not None and not self.weight.is_meta:
            self.pending = self.pending.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"num_experts={self.weight.shape[0]}, hidden_size={self.weight.shape[1]}, score={self.score_function}"


def _update_thresholds(*_: Any) -> None:
    """Runs after every optimiser step, so that a model keeps its thresholds under any trainer.

    Every rank averages over the same routers in the same order; one collective carries them all.
    """
    routers = sorted((router for router in _routers if router.has_pending), key=lambda router: router.number)
    if not routers:
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        pending = [router._allocate_pending() for router in routers]
        summed = torch.cat([p.to(pending[0].device) for p in pending])
        torch.distributed.all_reduce(summed)
        for own, total in zip(pending, summed.split([len(p) for p in pending]), strict=True):
            own.copy_(total)
    for router in routers:
        router.update_threshold()


register_optimizer_step_post_hook(_update_thresholds)


@use_experts_implementation
class EcMoeRaggedExperts(nn.Module):
    """Gated FFNs with stacked weights, any number of rows each; the contract of Transformers' experts back-ends."""

    config: Any  # set, like `_apply_gate`, by the decorator
    _apply_gate: Callable[[Tensor], Tensor]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        hidden_size, width = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K] -> [T, D], one expert after the other."""
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if token.numel() == 0:
                continue
            hidden = self._apply_gate(nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]))
            hidden = nn.functional.linear(hidden, self.down_proj[expert]) * top_k_weights[token, slot, None]
            output.index_add_(0, token, hidden.to(output.dtype))
        return output


class EcMoeExperts(EcMoeRaggedExperts):
    """The experts, entered through `forward` alone: adapters, parallel plans and quantisers hook there."""

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        rows_per_expert: int | None = None,
    ) -> Tensor:
        """The contract of `EcMoeRaggedExperts`, with a short cut for expert choice.

        rows_per_expert: when given, hidden_states [E * C, D] holds C = rows_per_expert rows of each expert in
            turn, top_k_index and top_k_weights are not read, and the rows come back unweighted.
        """
        if rows_per_expert is not None:
            return self._equal_rows(hidden_states, rows_per_expert)
        if not self._suits_grouped_mm(hidden_states):
            # The body above, without the dispatch to a back-end that would refuse these tensors.
            eager = EcMoeRaggedExperts.forward.__wrapped__  # type: ignore[attr-defined]
            return eager(self, hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def _equal_rows(self, hidden_states: Tensor, rows_per_expert: int) -> Tensor:
        """Two batched products: no sorting, no sizes to exchange, static shapes."""
        dtype = self.gate_up_proj.dtype
        rows_ECD = hidden_states.to(dtype).view(self.num_experts, rows_per_expert, -1)
        hidden_ECI = self._apply_gate(torch.bmm(rows_ECD, self.gate_up_proj.transpose(1, 2)))
        return torch.bmm(hidden_ECI, self.down_proj.transpose(1, 2)).flatten(0, 1)

    def _suits_grouped_mm(self, hidden_states: Tensor) -> bool:
        """Whether torch's grouped product takes these tensors: no float64, rows on 16-byte borders."""
        if self.config._experts_implementation != "grouped_mm":
            return True
        row_bytes = [weight.shape[-1] * weight.element_size() for weight in (self.gate_up_proj, self.down_proj)]
        return self.gate_up_proj.dtype != torch.float64 and all(size % 16 == 0 for size in row_bytes)


class EcMoeBlock(nn.Module):
    """The sparse FFN, in place of the dense one: y = sum over the experts that chose x of w * expert(x) [+ shared].

    A token nobody chose keeps the residual and the shared expert, if there is one.
    """

    gate: EcMoeRouter
    experts: EcMoeExperts

    def __init__(self, config: Any, dense_mlp_class: type[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.gate = EcMoeRouter(config)
        self.experts = EcMoeExperts(config)
        self.shared_expert = None
        if config.shared_expert_intermediate_size:
            shared_config = copy.copy(config)
            shared_config.intermediate_size = config.shared_expert_intermediate_size
            self.shared_expert = dense_mlp_class(shared_config)
        # Set around a call: the real tokens by the model, another routing by `use_inference_routing`.
        self.token_mask: Tensor | None = None
        self.routing_override: str | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, S, D] -> [B, S, D]."""
        tokens_TD = hidden_states.flatten(0, -2)
        _, scores_TE = self.gate(tokens_TD)
        routing = self.routing_override or (self.config.routing if self.training else self.config.inference_routing)
        if routing == "expert_choice":
            routed_TD, total_T = self._experts_choose(tokens_TD, scores_TE, hidden_states.shape[:-1])
        elif torch.compiler.is_compiling() or self.config.max_experts_per_token is not None:
            routed_TD, total_T = self._thresholds_in_slots(tokens_TD, scores_TE)
        else:
            routed_TD, total_T = self._thresholds_in_rows(tokens_TD, scores_TE)
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(tokens_TD)
            if self.config.shared_expert_weighting == "complement":
                shared_TD = (1 - total_T)[:, None] * shared_TD
            routed_TD = routed_TD + shared_TD
        return routed_TD.to(hidden_states.dtype).view_as(hidden_states)

    def _experts_choose(self, tokens_TD: Tensor, scores_TE: Tensor, batch_shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Expert choice among the tokens of the pool: [T, D] and the sum of each token's combine weights [T]."""
        num_tokens, num_experts = scores_TE.shape
        num_pools = batch_shape[0] if self.config.routing_pool == "sequence" else 1
        mask_PN = None if self.token_mask is None else self.token_mask.reshape(num_pools, -1)
        choice = self._choose(scores_TE.view(num_pools, -1, num_experts), mask_PN)
        # Not without gradients: the first pass of reentrant checkpointing, reference passes, evaluation.
        if self.training and self.routing_override is None and torch.is_grad_enabled():
            self.gate.record_threshold(choice.threshold, num_tokens if mask_PN is None else mask_PN.sum())

        index_R = choice.token_index.flatten()
        weight_R = choice.scores.masked_fill(~choice.is_chosen, 0).flatten()
        weight_R, total_T = combine_weights(weight_R, index_R, num_tokens, self.config.normalize_combine_weights)
        expert_R1 = torch.arange(num_experts, device=index_R.device).repeat_interleave(choice.token_index.shape[1])
        rows_RD = self.experts(
            tokens_TD[index_R], expert_R1[:, None], weight_R[:, None], rows_per_expert=choice.token_index.shape[1]
        )
        return _combine(rows_RD, weight_R, index_R, num_tokens), total_T

    def _choose(self, scores_PNE: Tensor, mask_PN: Tensor | None) -> ExpertChoice:
        """Each expert's tokens in each pool, within the bounds on the experts of a token if there are any."""
        factor, least = self.config.capacity_factor, self.config.min_experts_per_token
        if self.config.bounds_experts_per_token:
            return choose_tokens_within_bounds(scores_PNE, factor, least, self.config.max_experts_per_token, mask_PN)
        return choose_tokens(scores_PNE, factor, mask_PN)

    def _thresholds_in_rows(self, tokens_TD: Tensor, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Threshold routing, one row per chosen pair: as much work as there are routes."""
        index_R, expert_R = self.routes(scores_TE).nonzero(as_tuple=True)
        weight_R, total_T = combine_weights(
            scores_TE[index_R, expert_R], index_R, len(scores_TE), self.config.normalize_combine_weights
        )
        if len(index_R) == 0:  # back-ends need not take an empty product
            return tokens_TD.new_zeros(tokens_TD.shape, dtype=weight_R.dtype), total_T
        ones_R1 = torch.ones_like(weight_R)[:, None]  # weighted below, in the router's precision
        rows_RD = self.experts(tokens_TD[index_R], expert_R[:, None], ones_R1)
        return _combine(rows_RD, weight_R, index_R, len(scores_TE)), total_T

    def _thresholds_in_slots(self, tokens_TD: Tensor, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Threshold routing with a fixed number of slots per token, the unused ones weighted 0: static shapes."""
        routes_TE = self.routes(scores_TE)
        num_slots = self.config.max_experts_per_token or routes_TE.shape[1]
        margin_TE = (scores_TE - self.gate.threshold).masked_fill(~routes_TE, -torch.inf)
        expert_TK = margin_TE.topk(num_slots, dim=-1).indices
        weight_TK = (scores_TE * routes_TE).gather(-1, expert_TK)
        total_T = weight_TK.sum(-1)
        if self.config.normalize_combine_weights:
            weight_TK = weight_TK / torch.where(total_T > 0, total_T, 1)[:, None]
            total_T = (total_T > 0).to(weight_TK.dtype)
        return self.experts(tokens_TD, expert_TK, weight_TK).to(weight_TK.dtype), total_T

    def routes(self, scores_TE: Tensor) -> Tensor:
        """[T, E] bool, the routes that threshold inference takes."""
        return routes_by_threshold(
            scores_TE, self.gate.threshold, self.config.min_experts_per_token, self.config.max_experts_per_token
        )


def _combine(rows_RD: Tensor, weight_R: Tensor, index_R: Tensor, num_tokens: int) -> Tensor:
    """Adds the weighted rows up at their tokens: [T, D] in the weights' precision, float32 or float64.

    Low precision would round each weighted row by itself, and copies of one FFN would no longer add up to it.
    """
    output_TD = weight_R.new_zeros(num_tokens, rows_RD.shape[-1])
    return output_TD.index_add(0, index_R, rows_RD * weight_R[:, None])


@contextlib.contextmanager
def announce_tokens(model: nn.Module, token_mask: Tensor | None) -> Iterator[None]:
    """Tells the blocks of a base model which tokens [B, S] are real, before its layers are entered.

    In eager mode each decoder layer tells its block again, because a recomputed layer is entered without the
    model. A compiled layer under gradient checkpointing may not set attributes, and reads what was set here.
    """
    blocks = [module for module in model.modules() if isinstance(module, EcMoeBlock)]
    for block in blocks:
        block.token_mask = token_mask
        if model.training and torch.is_grad_enabled():
            block.gate._allocate_pending()
            block.gate.has_pending = True
    try:
        yield
    finally:
        for block in blocks:
            block.token_mask = None


@contextlib.contextmanager
def use_inference_routing(model: nn.Module, routing: str | None = None) -> Iterator[None]:
    """Routes as in eval mode while the context is open, also in a model that is left in train mode.

    routing: "threshold", or "expert_choice", which is not causal; None is each model's `inference_routing`.

    Raises:
        ValueError: for another routing.
    """
    if routing not in (None, "threshold", "expert_choice"):
        raise ValueError(f"routing={routing!r} is unknown; use 'threshold', 'expert_choice' or None")
    blocks = [module for module in model.modules() if isinstance(module, EcMoeBlock)]
    before = [block.routing_override for block in blocks]
    for block in blocks:
        block.routing_override = routing or block.config.inference_routing
    try:
        yield
    finally:
        for block, override in zip(blocks, before, strict=True):
            block.routing_override = override
