"""Who meets whom, as lists: (token, expert) pairs, or a fixed number of slots for every token.

Shapes: T tokens, E experts, C slots per expert, R pairs, K slots of one token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .routing_ecmoe import ExpertChoice, combine_weights


class Pairs(NamedTuple):
    """R (token, expert) pairs.

    token, expert: [R] long. weight: [R], the combine weights in the router's precision, 0 in an unused slot.
    weight_sum: [T], of each token; None where nobody asked. rows_per_expert: C where each expert has so many in turn,
        in the order of the experts; a list where their numbers differ and the host knows them; None where it does not.
        is_meeting: [R] bool, False in a place without a pair, whose expert is E; None where all are pairs.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    weight_sum: Tensor | None
    rows_per_expert: int | list[int] | None = None
    is_meeting: Tensor | None = None


class Slots(NamedTuple):
    """K experts for every token, an unused slot weighted 0.

    expert, weight: [T, K]. weight_sum: [T].
    """

    expert: Tensor
    weight: Tensor
    weight_sum: Tensor


def pairs_of_choice(choice: ExpertChoice, num_tokens: int, normalize: bool) -> Pairs:
    """The same number of pairs for every expert, in the order of the experts: static shapes, nothing to exchange."""
    num_experts, rows_per_expert = choice.token_index.shape
    token_R = choice.token_index.flatten()
    weight_R = choice.scores.masked_fill(~choice.is_chosen, 0).flatten()
    expert_R = torch.arange(num_experts, device=token_R.device).repeat_interleave(rows_per_expert)
    weight_R, sum_T = combine_weights(weight_R, token_R, num_tokens, normalize, expert_R, num_experts)
    return Pairs(token_R, expert_R, weight_R, sum_T, rows_per_expert)


def pairs_of_routes(
    routes_TE: Tensor, scores_TE: Tensor, normalize: bool, with_sums: bool = True, with_counts: bool = False
) -> Pairs:
    """One pair per route [T, E], expert after expert: as much work as there are routes, and their number is read by the
    host.

    with_sums: whether the sum of each token's weights is wanted too; with_counts: the rows of each expert.
    """
    expert_R, token_R = routes_TE.T.nonzero(as_tuple=True)
    counts = routes_TE.sum(0).tolist() if with_counts else None
    weight_R = scores_TE[token_R, expert_R]
    if len(token_R) == 0:  # one pair of weight 0: back-ends want a row, and every parameter its gradient
        token_R = expert_R = torch.zeros(1, dtype=torch.long, device=scores_TE.device)
        weight_R = scores_TE[0, :1] * 0
        counts = None
    if not normalize and not with_sums:
        return Pairs(token_R, expert_R, weight_R, None, counts)
    weight_R, sum_T = combine_weights(weight_R, token_R, len(scores_TE), normalize, expert_R, scores_TE.shape[1])
    return Pairs(token_R, expert_R, weight_R, sum_T, counts)


def static_pairs_of_routes(routes_TE: Tensor, scores_TE: Tensor, normalize: bool) -> Pairs:
    """A place for each expert and token, in that order, whether they meet or not: static shapes, nothing is read back.
    A back-end that sorts rows by expert has no product for those of an expert beyond the last."""
    num_tokens, num_experts = routes_TE.shape
    token_R = torch.arange(num_tokens, device=routes_TE.device).repeat(num_experts)
    expert_R = torch.arange(num_experts, device=routes_TE.device).repeat_interleave(num_tokens)
    routes_R = routes_TE.T.flatten()
    weight_R = (scores_TE * routes_TE).T.flatten()
    weight_R, sum_T = combine_weights(weight_R, token_R, num_tokens, normalize, expert_R, num_experts)
    return Pairs(token_R, expert_R.masked_fill(~routes_R, num_experts), weight_R, sum_T, is_meeting=routes_R)


def slots_of_routes(
    routes_TE: Tensor, scores_TE: Tensor, threshold_E: Tensor, num_slots: int, normalize: bool
) -> Slots:
    """The routes [T, E] of every token in as many slots, those furthest above the threshold first: static shapes."""
    margin_TE = (scores_TE - threshold_E).masked_fill(~routes_TE, -torch.inf)
    expert_TK = margin_TE.topk(num_slots, dim=-1).indices
    weight_TK = (scores_TE * routes_TE).gather(-1, expert_TK)
    # An unused slot repeats the best expert of its token, so that no other weights are read for it.
    expert_TK = torch.where(routes_TE.gather(-1, expert_TK), expert_TK, expert_TK[:, :1])
    return weighted_slots(expert_TK, weight_TK, normalize)


def weighted_slots(expert_TK: Tensor, weight_TK: Tensor, normalize: bool) -> Slots:
    """Slots with these experts, their weights divided by the token's sum where they are normalised."""
    sum_T = weight_TK.sum(-1)
    if normalize:
        weight_TK = weight_TK / torch.where(sum_T > 0, sum_T, 1)[:, None]
        sum_T = (sum_T > 0).to(weight_TK.dtype)
    return Slots(expert_TK, weight_TK, sum_T)
