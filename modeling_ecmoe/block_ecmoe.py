"""The expert-choice FFN: router, experts, and the block that brings tokens and experts together.

It reads top to bottom like the paper (Zhou et al. 2022, arXiv 2202.09368): scores, choice, dispatch, experts,
combine. In training the experts choose their tokens among a pool; in eval mode and in `generate` a token goes to
every expert whose threshold its score exceeds (arXiv 2603.11535), so no other token is looked at.

Shapes: B batch, S sequence, T = B * S tokens, D hidden size, E experts, C slots per expert, I expert width,
R chosen (expert, token) pairs, K experts of one token.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .bounded_ecmoe import choose_tokens_within_bounds
from .experts_ecmoe import EcMoeExperts
from .router_ecmoe import EcMoeRouter
from .routing_ecmoe import (
    ExpertChoice,
    choose_by_threshold,
    choose_experts,
    choose_tokens,
    combine_weights,
    routes_by_threshold,
)


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
        dropout = config.dense_ffn.dropout
        if config.shared_expert_intermediate_size:
            shared_config = copy.copy(config)
            shared_config.intermediate_size = config.shared_expert_intermediate_size
            if dropout is not None:
                setattr(shared_config, dropout, 0.0)  # below, once for the whole block
            self.shared_expert = dense_mlp_class(shared_config)
        self.dropout = nn.Dropout(0.0 if dropout is None else getattr(config, dropout))
        # Set around a call: the real tokens by the model, another routing by `use_inference_routing`.
        self.token_mask: Tensor | None = None
        self.routing_overrides: list[str] = []

    @property
    def routing_override(self) -> str | None:
        """The routing that was asked for last, by whoever still holds `use_inference_routing` open."""
        return self.routing_overrides[-1] if self.routing_overrides else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, S, D] -> [B, S, D]."""
        tokens_TD = hidden_states.flatten(0, -2)
        learning = self.training and self.routing_override is None
        _, scores_TE, threshold_E = self.gate(tokens_TD, jitter=learning)
        routing = self.routing_override or (self.config.routing if self.training else self.config.inference_routing)
        if routing == "token_choice":
            routed_TD, total_T = self._tokens_choose(tokens_TD, scores_TE, learning)
        elif routing == "expert_choice" or learning:
            routed_TD, total_T = self._experts_choose(tokens_TD, scores_TE, hidden_states.shape[:-1], learning)
        elif self._wants_slots():
            routed_TD, total_T = self._thresholds_in_slots(tokens_TD, scores_TE, threshold_E)
        else:
            routed_TD, total_T = self._rows(tokens_TD, scores_TE, self.routes(scores_TE, threshold_E))
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(tokens_TD)
            if self.config.shared_expert_weighting == "complement":
                shared_TD = (1 - total_T)[:, None] * shared_TD
            routed_TD = routed_TD + shared_TD
        return self.dropout(routed_TD.to(hidden_states.dtype).view_as(hidden_states))

    def _experts_choose(
        self, tokens_TD: Tensor, scores_TE: Tensor, batch_shape: torch.Size, learning: bool
    ) -> tuple[Tensor, Tensor]:
        """Expert choice among the tokens of the pool: [T, D] and the sum of each token's combine weights [T]."""
        num_tokens, num_experts = scores_TE.shape
        mask_T = None if self.token_mask is None else self.token_mask.flatten()
        if self.config.routing_pool == "global" and learning and num_ranks() > 1:
            routes_TE, threshold = self._choose_globally(scores_TE, mask_T)
            self._record(threshold, num_tokens if mask_T is None else mask_T.sum())
            return self._rows(tokens_TD, scores_TE, routes_TE)

        num_pools = batch_shape[0] if self.config.routing_pool == "sequence" else 1
        mask_PN = None if mask_T is None else mask_T.view(num_pools, -1)
        choice = self._choose(scores_TE.view(num_pools, -1, num_experts), mask_PN, learning)
        if learning:
            self._record(choice.threshold, num_tokens if mask_T is None else mask_T.sum())
        index_R = choice.token_index.flatten()
        weight_R = choice.scores.masked_fill(~choice.is_chosen, 0).flatten()
        weight_R, total_T = combine_weights(weight_R, index_R, num_tokens, self.config.normalize_combine_weights)
        slots = choice.token_index.shape[1]
        expert_R = torch.arange(num_experts, device=index_R.device).repeat_interleave(slots)
        rows_RD = self._equal_rows(tokens_TD.index_select(0, index_R), expert_R, slots)
        return _combine(rows_RD, weight_R, index_R, num_tokens), total_T

    def _equal_rows(self, rows_RD: Tensor, expert_R: Tensor, rows_per_expert: int) -> Tensor:
        """The same number of rows for every expert, in the order of the experts; unweighted.

        Under Transformers' expert parallelism `experts.forward` is a dispatcher with the contract's three arguments.
        """
        ones_R1 = torch.ones_like(rows_RD[:, :1])
        if getattr(self.experts, "_is_expert_parallel", False):
            self.experts.rows_per_expert = rows_per_expert
            try:
                return self.experts(rows_RD, expert_R[:, None], ones_R1)
            finally:
                self.experts.rows_per_expert = None
        return self.experts(rows_RD, expert_R[:, None], ones_R1, rows_per_expert=rows_per_expert)

    def _choose(self, scores_PNE: Tensor, mask_PN: Tensor | None, learning: bool) -> ExpertChoice:
        """Each expert's tokens in each pool: by its threshold, within bounds on the experts of a token, or plainly."""
        config = self.config
        if config.routing == "threshold" and learning:
            is_warm = self.gate.threshold_updates >= max(config.threshold_after_steps, 1)
            clamp = config.threshold_capacity_clamp
            return choose_by_threshold(scores_PNE, config.capacity_factor, self.gate.threshold, is_warm, clamp, mask_PN)
        if config.bounds_experts_per_token:
            bounds = config.min_experts_per_token, config.max_experts_per_token
            return choose_tokens_within_bounds(scores_PNE, config.capacity_factor, *bounds, mask_PN)
        return choose_tokens(scores_PNE, config.capacity_factor, mask_PN)

    def _choose_globally(self, scores_TE: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """The local part [T, E] of the routes that experts choose among the tokens of all ranks, and the thresholds.

        Scores travel, tokens do not. How many rows an expert gets on one rank is no longer fixed.
        """
        num_tokens = len(scores_TE)
        mask_T = torch.ones_like(scores_TE[:, 0], dtype=torch.bool) if mask_T is None else mask_T
        longest = torch.tensor(num_tokens, device=scores_TE.device)
        torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
        size = int(longest)  # ranks may differ in batch shape; what is filled in counts as padding
        padded_NF = torch.cat([scores_TE.detach(), mask_T[:, None].to(scores_TE.dtype)], dim=1)
        padded_NF = nn.functional.pad(padded_NF, (0, 0, 0, size - num_tokens))
        gathered = [torch.empty_like(padded_NF) for _ in range(num_ranks())]
        torch.distributed.all_gather(gathered, padded_NF.contiguous())
        everyone_NF = torch.cat(gathered)
        choice = self._choose(everyone_NF[None, :, :-1], everyone_NF[None, :, -1] > 0, learning=True)
        routes_NE = torch.zeros_like(everyone_NF[:, :-1], dtype=torch.long)
        routes_NE.scatter_add_(0, choice.token_index.T, choice.is_chosen.T.long())
        first = torch.distributed.get_rank() * size
        return routes_NE[first : first + num_tokens] > 0, choice.threshold

    def _record(self, threshold: Tensor, num_tokens: Tensor | int) -> None:
        """Not without gradients: the first pass of reentrant checkpointing, or a pass that learns nothing."""
        if torch.is_grad_enabled():
            self.gate.record_threshold(threshold, num_tokens)

    def _rows(self, tokens_TD: Tensor, scores_TE: Tensor, routes_TE: Tensor) -> tuple[Tensor, Tensor]:
        """One row per route [T, E]: as much work as there are routes, and their number is read by the host."""
        index_R, expert_R = routes_TE.nonzero(as_tuple=True)
        if len(index_R) == 0:  # one row of weight 0: back-ends want a row, and every parameter its gradient
            index_R = expert_R = torch.zeros(1, dtype=torch.long, device=tokens_TD.device)
        weight_R = (scores_TE * routes_TE)[index_R, expert_R]
        weight_R, total_T = combine_weights(weight_R, index_R, len(scores_TE), self.config.normalize_combine_weights)
        ones_R1 = torch.ones_like(weight_R)[:, None]  # weighted below, in the router's precision
        rows_RD = self.experts(tokens_TD.index_select(0, index_R), expert_R[:, None], ones_R1)
        return _combine(rows_RD, weight_R, index_R, len(scores_TE)), total_T

    def _wants_slots(self) -> bool:
        """Whether every token gets as many slots: for static shapes, where a bound makes them few, and for a server.

        vLLM and SGLang put a kernel of their own in place of the experts, which wants `config.num_experts_per_tok`
        slots of every token. Its weights have other names; adapters and quantisers keep ours, and take any rows.
        """
        if torch.compiler.is_compiling() or self.config.max_experts_per_token is not None:
            return True
        if isinstance(self.experts, EcMoeExperts):
            return False
        return not any("down_proj" in name for name, _ in self.experts.named_parameters())

    def _thresholds_in_slots(self, tokens_TD: Tensor, scores_TE: Tensor, threshold_E: Tensor) -> tuple[Tensor, Tensor]:
        """Threshold routing with a fixed number of slots per token, the unused ones weighted 0: static shapes."""
        routes_TE = self.routes(scores_TE, threshold_E)
        num_slots = self.config.num_experts_per_tok
        margin_TE = (scores_TE - threshold_E).masked_fill(~routes_TE, -torch.inf)
        expert_TK = margin_TE.topk(num_slots, dim=-1).indices
        weight_TK = (scores_TE * routes_TE).gather(-1, expert_TK)
        # An unused slot repeats the best expert of its token, so that no other weights are read for it.
        expert_TK = torch.where(routes_TE.gather(-1, expert_TK), expert_TK, expert_TK[:, :1])
        return self._slots(tokens_TD, expert_TK, weight_TK)

    def _tokens_choose(self, tokens_TD: Tensor, scores_TE: Tensor, learning: bool) -> tuple[Tensor, Tensor]:
        """Token choice, the baseline: each token takes its k best experts. Nothing is dropped outside training, where
        padding takes nothing away either: no mask is read, so that threads may share a model."""
        capacity_factor = self.config.token_choice_capacity_factor if learning else None
        mask_T = self.token_mask.flatten() if learning and self.token_mask is not None else None
        expert_TK, is_kept_TK = choose_experts(scores_TE, int(self.config.capacity_factor), capacity_factor, mask_T)
        return self._slots(tokens_TD, expert_TK, scores_TE.gather(-1, expert_TK) * is_kept_TK)

    def _slots(self, tokens_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        """K experts for every token, weighted by the contract of the experts back-ends."""
        total_T = weight_TK.sum(-1)
        if self.config.normalize_combine_weights:
            weight_TK = weight_TK / torch.where(total_T > 0, total_T, 1)[:, None]
            total_T = (total_T > 0).to(weight_TK.dtype)
        return self.experts(tokens_TD, expert_TK, weight_TK).to(weight_TK.dtype), total_T

    def routes(self, scores_TE: Tensor, threshold_E: Tensor | None = None) -> Tensor:
        """[T, E] bool, the routes that inference takes: by threshold, or the k best of a token-choice model."""
        if self.config.inference_routing == "token_choice":
            expert_TK, _ = choose_experts(scores_TE, int(self.config.capacity_factor), None, None)
            return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(-1, expert_TK, True)
        self.gate.warn_uncalibrated()
        threshold_E = self.gate.threshold if threshold_E is None else threshold_E
        return routes_by_threshold(
            scores_TE, threshold_E, self.config.min_experts_per_token, self.config.max_experts_per_token
        )


def num_ranks() -> int:
    """Processes of the distributed run, 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _combine(rows_RD: Tensor, weight_R: Tensor, index_R: Tensor, num_tokens: int) -> Tensor:
    """Adds the weighted rows up at their tokens: [T, D] in the weights' precision, float32 or float64.

    Low precision would round each weighted row by itself, and copies of one FFN would no longer add up to it.
    """
    output_TD = weight_R.new_zeros(num_tokens, rows_RD.shape[-1])
    return output_TD.index_add(0, index_R, rows_RD * weight_R[:, None])


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
    blocks = [block for layer in model.layers for block in _blocks_of(layer)]
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
