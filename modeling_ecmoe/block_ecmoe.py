"""The expert-choice FFN: router, experts, and the block that brings tokens and experts together.

It reads top to bottom like the paper (Zhou et al. 2022, arXiv 2202.09368): scores, choice, dispatch, experts,
combine. In training the experts choose their tokens among a pool; in eval mode and in `generate` a token goes to
every expert whose threshold its score exceeds (arXiv 2603.11535), so no other token is looked at.

Shapes: B batch, S sequence, T = B * S tokens, D hidden size, E experts, P pools of N tokens, R chosen (expert, token)
pairs, K experts of one token.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .adapters_ecmoe import by_rows, forget_text
from .bounded_ecmoe import choose_tokens_within_bounds
from .experts_ecmoe import EcMoeExperts
from .global_pool_ecmoe import choose_among_all_ranks, num_ranks
from .kernels_ecmoe import combine, dispatch, kernels_run_on, list_pairs
from .pairs_ecmoe import (
    Pairs,
    Slots,
    pairs_of_choice,
    pairs_of_routes,
    slots_of_routes,
    static_pairs_of_routes,
    weighted_slots,
)
from .router_ecmoe import EcMoeRouter
from .routing_ecmoe import ExpertChoice, choose_by_threshold, choose_experts, choose_tokens, routes_by_threshold
from .serving_ecmoe import unweighted_rows, wants_counts, wants_places, wants_slots


class EcMoeSharedExpertGate(nn.Linear):
    """What the shared expert is weighted by, before the sigmoid: [T, D] -> [T, 1].

    A class of its own, since bitsandbytes takes what is `nn.Linear` itself: like the router it is not quantised, and
    PEFT's `modules_to_save=["gate"]`, which goes by the end of a name, trains it too.
    """


class EcMoeBlock(nn.Module):
    """The sparse FFN, in place of the dense one: y = sum over the experts that chose x of w * expert(x) [+ shared].

    A token nobody chose keeps the residual and the shared expert, if there is one.
    """

    gate: EcMoeRouter
    experts: EcMoeExperts

    def __init__(self, config: Any, make_ffn: Callable[[Any], nn.Module], width_multiple: int = 1) -> None:
        """make_ffn: makes a dense FFN from a config. width_multiple: of the experts' width in this layer."""
        super().__init__()
        self.config = config
        self.gate = EcMoeRouter(config)
        self.experts = EcMoeExperts(config, width_multiple)
        self.shared_expert = self.shared_expert_gate = None
        dropout = config.dense_ffn.dropout
        if config.shared_expert_intermediate_size:
            shared_config = copy.copy(config)
            shared_config.intermediate_size = config.shared_expert_intermediate_size
            if dropout is not None:
                setattr(shared_config, dropout, 0.0)  # below, once for the whole block
            self.shared_expert = make_ffn(shared_config)
            if config.shared_expert_weighting == "gate":
                self.shared_expert_gate = EcMoeSharedExpertGate(config.hidden_size, 1, bias=False)
        self.dropout = nn.Dropout(0.0 if dropout is None else getattr(config, dropout))
        # Set around a call (context_ecmoe.py): the real tokens by the model, another routing by its caller.
        self.token_mask: Tensor | None = None
        self.routing_overrides: list[str] = []
        self.register_load_state_dict_post_hook(forget_text)

    @property
    def routing_override(self) -> str | None:
        """The routing that was asked for last, by whoever still holds `use_inference_routing` open."""
        return self.routing_overrides[-1] if self.routing_overrides else None

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"experts per token: {config.mean_experts_per_token:g} on average, at most {config.most_experts_per_token}"
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, S, D] -> [B, S, D]."""
        tokens_TD = hidden_states.flatten(0, -2)
        learning = self.training and self.routing_override is None
        # Scores.
        _, scores_TE, threshold_E = self.gate(tokens_TD, jitter=learning)
        # Choice.
        chosen = self._choose(scores_TE, threshold_E, hidden_states.shape[:-1], learning)
        if self.config.routed_scaling_factor != 1:
            chosen = chosen._replace(weight=chosen.weight * self.config.routed_scaling_factor)
        # Dispatch, experts, combine; of slots a back-end does all three.
        experts = by_rows(self.experts)
        if isinstance(chosen, Slots):
            output_TD = experts(tokens_TD, chosen.expert, chosen.weight).to(chosen.weight.dtype)
        else:
            has_kernels = self.config.experts_kernels and kernels_run_on(tokens_TD)
            pairs = list_pairs(chosen.token, len(tokens_TD)) if has_kernels else None
            rows_RD = dispatch(tokens_TD, chosen.token, pairs)
            rows_RD = unweighted_rows(experts, rows_RD, chosen.expert, chosen.rows_per_expert)
            if chosen.is_meeting is not None:
                rows_RD = rows_RD.masked_fill(~chosen.is_meeting[:, None], 0)
            dtype = hidden_states.dtype if self.shared_expert is None else chosen.weight.dtype
            output_TD = combine(rows_RD, chosen.weight, chosen.token, len(tokens_TD), pairs, dtype)
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(tokens_TD)
            if self.config.shared_expert_weighting == "complement":
                assert chosen.weight_sum is not None  # there is a shared expert, so it was asked for
                shared_TD = (1 - chosen.weight_sum)[:, None] * shared_TD
            elif self.shared_expert_gate is not None:
                shared_TD = self.shared_expert_gate(tokens_TD).sigmoid() * shared_TD
            output_TD = output_TD + shared_TD
        return self.dropout(output_TD.to(hidden_states.dtype).view_as(hidden_states))

    def _choose(self, scores_TE: Tensor, threshold_E: Tensor, batch_shape: torch.Size, learning: bool) -> Pairs | Slots:
        """Who meets whom, by the routing of the config for this mode, or the one that was asked for."""
        config = self.config
        routing = self.routing_override or (config.routing if self.training else config.inference_routing)
        if routing == "token_choice":
            return self._tokens_choose(scores_TE, threshold_E, learning)
        if routing == "expert_choice" or learning:
            return self._experts_choose(scores_TE, batch_shape, learning)
        routes_TE = self.routes(scores_TE, threshold_E)
        normalize = config.normalize_combine_weights
        with_sums = self.shared_expert is not None
        if wants_counts(self.experts, routes_TE):
            return pairs_of_routes(routes_TE, scores_TE, normalize, with_sums, with_counts=True)
        if wants_slots(self.experts, config.max_experts_per_token):
            return slots_of_routes(routes_TE, scores_TE, threshold_E, config.most_experts_per_token, normalize)
        if wants_places(self.experts, routes_TE):
            return static_pairs_of_routes(routes_TE, scores_TE, normalize)
        return pairs_of_routes(routes_TE, scores_TE, normalize, with_sums)

    def _experts_choose(self, scores_TE: Tensor, batch_shape: torch.Size, learning: bool) -> Pairs:
        """Expert choice among the tokens of the pool, whose threshold is recorded while the router learns."""
        num_tokens, num_experts = scores_TE.shape
        mask_T = None if self.token_mask is None else self.token_mask.flatten()
        num_real = num_tokens if mask_T is None else mask_T.sum()
        if self.config.routing_pool == "global" and learning and num_ranks() > 1:
            routes_TE, threshold_E = choose_among_all_ranks(self.choose_in_pools, scores_TE, mask_T)
            self.record(threshold_E, num_real)
            return pairs_of_routes(routes_TE, scores_TE, self.config.normalize_combine_weights)
        num_pools = 1
        if self.config.routing_pool == "sequence":  # of a layer that flattens its rows the mask knows them
            num_pools = batch_shape[0] if len(batch_shape) > 1 else len(self.token_mask)
        mask_PN = None if mask_T is None else mask_T.view(num_pools, -1)
        choice = self.choose_in_pools(scores_TE.view(num_pools, -1, num_experts), mask_PN, learning)
        if learning:
            self.record(choice.threshold, num_real)
        return pairs_of_choice(choice, num_tokens, self.config.normalize_combine_weights)

    def choose_in_pools(self, scores_PNE: Tensor, mask_PN: Tensor | None, learning: bool) -> ExpertChoice:
        """Each expert's tokens in each pool: by its threshold, within bounds on the experts of a token, or plainly."""
        config = self.config
        if config.routing == "threshold" and learning:
            is_warm = self.gate.threshold_updates >= max(config.threshold_after_steps, 1)
            clamp = config.threshold_capacity_clamp
            return choose_by_threshold(scores_PNE, config.capacity_factor, self.gate.threshold, is_warm, clamp, mask_PN)
        if config.bounds_experts_per_token:
            bounds = config.min_experts_per_token, config.max_experts_per_token
            in_graph = config.experts_kernels and scores_PNE.is_cuda and not torch.compiler.is_compiling()
            options = *bounds, mask_PN, in_graph, config.num_expert_groups
            return choose_tokens_within_bounds(scores_PNE, config.capacity_factor, *options)
        return choose_tokens(scores_PNE, config.capacity_factor, mask_PN)

    def record(self, threshold_E: Tensor, num_tokens: Tensor | int) -> None:
        """Not without gradients: the first pass of reentrant checkpointing, or a pass that learns nothing."""
        if torch.is_grad_enabled():
            self.gate.record_threshold(threshold_E, num_tokens)

    def _tokens_choose(self, scores_TE: Tensor, threshold_E: Tensor, learning: bool) -> Slots:
        """Token choice, the baseline: each token takes its k best experts. Nothing is dropped outside training, where
        padding takes nothing away either: no mask is read, so that threads may share a model."""
        capacity_factor = self.config.token_choice_capacity_factor if learning else None
        mask_T = self.token_mask.flatten() if learning and self.token_mask is not None else None
        has_bias = self.config.token_choice_bias_update_rate is not None
        num_choices, bias_E = int(self.config.capacity_factor), threshold_E if has_bias else None
        groups = self.config.num_expert_groups
        expert_TK, is_kept_TK = choose_experts(scores_TE, num_choices, capacity_factor, mask_T, bias_E, groups)
        if learning and has_bias and torch.is_grad_enabled():
            self.gate.record_load(expert_TK, mask_T)
        weight_TK = scores_TE.gather(-1, expert_TK) * is_kept_TK
        return weighted_slots(expert_TK, weight_TK, self.config.normalize_combine_weights)

    def routes(self, scores_TE: Tensor, threshold_E: Tensor | None = None) -> Tensor:
        """[T, E] bool, the routes that inference takes: by threshold, or the k best of a token-choice model."""
        if self.config.inference_routing == "token_choice":
            has_bias = self.config.token_choice_bias_update_rate is not None
            bias_E = (self.gate.threshold if threshold_E is None else threshold_E) if has_bias else None
            num_choices, groups = int(self.config.capacity_factor), self.config.num_expert_groups
            expert_TK, _ = choose_experts(scores_TE, num_choices, None, None, bias_E, groups)
            return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(-1, expert_TK, True)
        self.gate.warn_uncalibrated()
        threshold_E = self.gate.threshold if threshold_E is None else threshold_E
        config = self.config
        bounds = config.min_experts_per_token, config.max_experts_per_token
        return routes_by_threshold(scores_TE, threshold_E, *bounds, config.num_expert_groups)
