"""Routing as pure tensor functions: scores, capacity, who chooses whom, thresholds.

Nothing here knows of a model. Letters in names and docstrings:

    T  tokens            P  pools (the sets of tokens an expert chooses among)
    N  tokens per pool   E  experts
    C  slots per expert and pool (the static upper bound of the expert capacity)

The order is the paper's (Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing",
arXiv 2202.09368, section 3.2): scores, then each expert's choice, then the combine weights.
Inference replaces the choice by a threshold per expert (Expert Threshold routing, arXiv 2603.11535),
so that a token's route depends on no other token.
"""

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn


class ExpertChoice(NamedTuple):
    """What each expert chose in training: E experts, P pools, C slots each.

    token_index: [E, P * C] long, the chosen token's row in the flat [T] order; in each pool best first, or within
        bounds in the order of the text.
    scores: [E, P * C] float, the token's score; differentiable.
    is_chosen: [E, P * C] bool, False marks a slot beyond the capacity of the pool's real tokens.
    threshold: [E] float32, detached, the score that separates chosen from refused, mean over pools.
    """

    token_index: Tensor
    scores: Tensor
    is_chosen: Tensor
    threshold: Tensor


def expert_capacity(num_tokens: int, num_experts: int, capacity_factor: float) -> int:
    """Tokens each expert takes: C = ceil(c * T / E), at most T (arXiv 2202.09368, section 3.2).

    The capacity factor is taken as the decimal that was written, so that 1.1 * 80 / 8 is 11 and not 12.

    Raises:
        ValueError: when a number is not positive.
    """
    if num_tokens < 1 or num_experts < 1 or capacity_factor <= 0:
        raise ValueError(
            f"expert capacity needs positive numbers, got num_tokens={num_tokens}, "
            f"num_experts={num_experts}, capacity_factor={capacity_factor}"
        )
    factor = Fraction(str(capacity_factor))
    slots = -(-factor.numerator * num_tokens // (factor.denominator * num_experts))
    return min(slots, num_tokens)


def router_scores(router_logits: Tensor, score_function: str) -> Tensor:
    """Scores in (0, 1) of router_logits [..., E]: `softmax` over the experts, or `sigmoid` of each.

    Never a softmax over tokens: a score must not depend on other tokens, or inference could not be causal.
    """
    if score_function == "softmax":
        return router_logits.softmax(dim=-1)
    if score_function == "sigmoid":
        return router_logits.sigmoid()
    raise ValueError(f"router_score_function={score_function!r} is unknown; use 'softmax' or 'sigmoid'")


def choose_tokens(scores_PNE: Tensor, capacity_factor: float, token_mask_PN: Tensor | None = None) -> ExpertChoice:
    """Each expert takes the C highest scores of its column, in each pool (arXiv 2202.09368, equation 2).

    Without padding every slot is used. With padding the slots stay static (C counts all N positions) and the
    surplus over ceil(c * real / E) is masked, so no size is read back to the host. A masked slot points at the
    expert's best token, so that no padding token ever enters an expert.

    Args:
        scores_PNE: [P, N, E] float, router scores.
        capacity_factor: mean experts per token, c.
        token_mask_PN: [P, N] bool, True for real tokens; None when all are.
    """
    num_tokens, num_experts = scores_PNE.shape[1:]
    num_slots = expert_capacity(num_tokens, num_experts, capacity_factor)
    ranking_PEN = scores_PNE.detach().transpose(1, 2)
    if token_mask_PN is not None:
        ranking_PEN = ranking_PEN.masked_fill(~token_mask_PN[:, None, :], -torch.inf)
    capacity_P, num_real_P = real_capacity(scores_PNE, capacity_factor, token_mask_PN)

    # One more than the slots: the best refused score is the other side of the threshold.
    ranked_PER, order_PER = ranking_PEN.topk(min(num_slots + 1, num_tokens), dim=-1)
    index_PEC = order_PER[..., :num_slots]
    is_chosen_PEC = torch.arange(num_slots, device=index_PEC.device) < capacity_P[:, None, None].expand_as(index_PEC)
    threshold = _choice_threshold(ranked_PER, capacity_P, num_real_P)
    return as_choice(scores_PNE, index_PEC, is_chosen_PEC, threshold)


def choose_by_threshold(
    scores_PNE: Tensor,
    capacity_factor: float,
    threshold_E: Tensor,
    is_warm: Tensor,
    clamp: float,
    token_mask_PN: Tensor | None = None,
) -> ExpertChoice:
    """Threshold training: each expert takes the tokens above its threshold, from (1 - g) C to (1 + g) C of them.

    Before `is_warm` ([] bool) it takes exactly C, as in `choose_tokens`. The count is a tensor, the slots are static.
    The threshold that is returned is that of C tokens, which the running average follows (arXiv 2603.11535, section
    3 and the capacity guard g).
    """
    num_tokens, num_experts = scores_PNE.shape[1:]
    capacity_P, num_real_P = real_capacity(scores_PNE, capacity_factor, token_mask_PN)
    guard = Fraction(str(clamp))  # as numbers of parts, which are exact: (1 + 0.3) * 90 is 117
    below, above, parts = guard.denominator - guard.numerator, guard.denominator + guard.numerator, guard.denominator
    num_slots = min(above * expert_capacity(num_tokens, num_experts, capacity_factor) // parts, num_tokens)
    ranking_PEN = scores_PNE.detach().transpose(1, 2)
    if token_mask_PN is not None:
        ranking_PEN = ranking_PEN.masked_fill(~token_mask_PN[:, None, :], -torch.inf)
    ranked_PER, order_PER = ranking_PEN.topk(min(num_slots + 1, num_tokens), dim=-1)
    index_PEC = order_PER[..., :num_slots]
    above_PE = (ranking_PEN > threshold_E[:, None]).sum(-1)
    least_P1 = -(-below * capacity_P // parts)[:, None]
    most_P1 = torch.minimum(above * capacity_P // parts, num_real_P)[:, None]
    taken_PE = torch.where(is_warm, above_PE.clamp(least_P1, most_P1), capacity_P[:, None])
    is_chosen_PEC = torch.arange(num_slots, device=index_PEC.device) < taken_PE[..., None]
    return as_choice(scores_PNE, index_PEC, is_chosen_PEC, _choice_threshold(ranked_PER, capacity_P, num_real_P))


def choose_experts(
    scores_TE: Tensor,
    num_choices: int,
    capacity_factor: float | None,
    token_mask_T: Tensor | None,
    threshold_E: Tensor | None = None,
    num_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Token choice: the k best experts [T, K] of each token, and which of these choices an expert had room for.

    With thresholds the best are those furthest above theirs (a correction bias, arXiv 2408.15664, is minus that).
    Of groups of experts each token takes its k / G best of each.

    With a capacity an expert keeps the first ceil(capacity_factor * k * T / E) tokens in the order of the batch and
    drops the rest (GShard, arXiv 2006.16668, section 2.2); first choices come before second ones. Padding is never
    kept and takes no room.
    """
    num_tokens, num_experts = scores_TE.shape
    ranking_TE = scores_TE.detach() if threshold_E is None else scores_TE.detach() - threshold_E
    expert_TGK = in_groups(ranking_TE, num_groups).topk(num_choices // num_groups, dim=-1).indices
    group_G1 = torch.arange(num_groups, device=expert_TGK.device)[:, None]
    expert_TK = (expert_TGK * num_groups + group_G1).mT.flatten(1)
    is_real_T = torch.ones_like(scores_TE[:, 0], dtype=torch.bool) if token_mask_T is None else token_mask_T
    is_kept_TK = is_real_T[:, None].expand_as(expert_TK)
    if capacity_factor is None:
        return expert_TK, is_kept_TK
    factor = Fraction(str(capacity_factor)) * num_choices
    capacity = -(-factor.numerator * is_real_T.sum() // (factor.denominator * num_experts))
    # [K * T, E]: all first choices in the order of the batch, then all second ones.
    taken_RE = nn.functional.one_hot(expert_TK.T.flatten(), num_experts) * is_kept_TK.T.flatten()[:, None]
    place_R = (taken_RE.cumsum(0) * taken_RE).sum(-1)
    is_kept_R = (place_R > 0) & (place_R <= capacity)
    return expert_TK, is_kept_R.view(num_choices, num_tokens).T


def router_z_loss(router_logits: tuple[Tensor, ...], token_mask_T: Tensor | None) -> Tensor:
    """Mean over real tokens and layers of logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv 2202.08906,
    equation 5). router_logits: one [T, E] for each layer."""
    squares_LT = torch.stack([logits.logsumexp(-1).square().to(router_logits[0].device) for logits in router_logits])
    if token_mask_T is None:
        return squares_LT.mean()
    weight_T = token_mask_T.to(squares_LT)
    return (squares_LT * weight_T).sum() / (weight_T.sum() * len(router_logits)).clamp(min=1)


def real_capacity(scores_PNE: Tensor, capacity_factor: float, token_mask_PN: Tensor | None) -> tuple[Tensor, Tensor]:
    """[P] capacity and [P] number of the real tokens of each pool, in integers and without reading them back."""
    num_pools, num_tokens, num_experts = scores_PNE.shape
    if token_mask_PN is None:
        num_real_P = torch.full((num_pools,), num_tokens, device=scores_PNE.device)
    else:
        num_real_P = token_mask_PN.sum(dim=-1)
    factor = Fraction(str(capacity_factor))
    capacity_P = -(-factor.numerator * num_real_P // (factor.denominator * num_experts))
    return torch.minimum(capacity_P, num_real_P), num_real_P


def as_choice(scores_PNE: Tensor, index_PEC: Tensor, is_chosen_PEC: Tensor, threshold: Tensor) -> ExpertChoice:
    """Slots per pool and expert to rows per expert; a slot that is not used points at the expert's first one."""
    num_pools, num_tokens, _ = scores_PNE.shape
    index_PEC = torch.where(is_chosen_PEC, index_PEC, index_PEC[..., :1])
    scores_PEC = scores_PNE.transpose(1, 2).gather(-1, index_PEC)
    pool_offset_P11 = torch.arange(num_pools, device=index_PEC.device)[:, None, None] * num_tokens
    return ExpertChoice(
        token_index=_experts_first(index_PEC + pool_offset_P11),
        scores=_experts_first(scores_PEC),
        is_chosen=_experts_first(is_chosen_PEC),
        threshold=threshold,
    )


def _experts_first(slots_PEC: Tensor) -> Tensor:
    """[P, E, C] -> [E, P * C]: rows of one expert side by side, as the stacked products want them."""
    return slots_PEC.transpose(0, 1).flatten(1)


def _choice_threshold(ranked_PER: Tensor, capacity_P: Tensor, num_real_P: Tensor) -> Tensor:
    """[E] midpoint of the last chosen and the best refused score, averaged over pools by their real tokens.

    `score > threshold` then repeats the choice on the same pool (of tokens tied at the border it takes none).
    Where an expert takes every token there is no refused score, and half its lowest score stands in.
    """
    ranked_PER = ranked_PER.float()
    last_slot = ranked_PER.shape[-1] - 1
    last_P11 = (capacity_P - 1).clamp(0, last_slot)[:, None, None]
    next_P11 = capacity_P.clamp(0, last_slot)[:, None, None]
    num_experts = ranked_PER.shape[1]
    last_chosen_PE = ranked_PER.gather(-1, last_P11.expand(-1, num_experts, -1)).squeeze(-1)
    best_refused_PE = ranked_PER.gather(-1, next_P11.expand(-1, num_experts, -1)).squeeze(-1)
    takes_all_P1 = (capacity_P >= num_real_P)[:, None]
    best_refused_PE = torch.where(takes_all_P1, torch.zeros_like(best_refused_PE), best_refused_PE)
    midpoint_PE = between(last_chosen_PE, best_refused_PE)
    # Without a real token in the pool there is no score to learn from, and -inf would poison the mean.
    return mean_over_pools(torch.where(num_real_P[:, None] > 0, midpoint_PE, torch.zeros_like(midpoint_PE)), num_real_P)


# Scores that are nearer to each other than this, relatively, are one score but for rounding; and how far above it a
# threshold lies then.
_SAME, _ABOVE = 1e-6, 1e-4


def between(chosen: Tensor, refused: Tensor) -> Tensor:
    """Midway between the last chosen and the best refused score, of one shape.

    Where the two are one score the threshold is a little above it: equal tokens have equal scores in a first layer
    whose FFN sees the embedding alone, and on the score itself a rounding error would decide for each of them.
    """
    return torch.where(chosen - refused > _SAME * chosen.abs(), (chosen + refused) / 2, above(chosen))


def above(score: Tensor) -> Tensor:
    """A threshold that this score, and what is that score but for rounding, does not exceed."""
    return score + _ABOVE * score.abs()


def off_the_scores(threshold_E: Tensor, scores_TE: Tensor) -> Tensor:
    """[E] thresholds, a little higher where one lies on a score."""
    is_on_E = ((scores_TE - threshold_E).abs() <= _SAME * threshold_E.abs()).any(0)
    return torch.where(is_on_E, above(threshold_E), threshold_E)


def mean_over_pools(values_PE: Tensor, num_real_P: Tensor) -> Tensor:
    """[E] float32 mean over the pools, weighted by their real tokens."""
    weight_P1 = num_real_P[:, None].float()
    return (values_PE.float() * weight_P1).sum(0) / weight_P1.sum(0).clamp(min=1)


def in_groups(values_XE: Tensor, num_groups: int) -> Tensor:
    """[..., E] -> [..., G, E / G]: the experts of each group, whose numbers are the same modulo G."""
    return values_XE.unflatten(-1, (-1, num_groups)).mT


def out_of_groups(values_XGE: Tensor) -> Tensor:
    """[..., G, E / G] -> [..., E], the way back of `in_groups`."""
    return values_XGE.mT.flatten(-2)


def routes_by_threshold(
    scores_TE: Tensor,
    threshold_E: Tensor,
    min_experts: int = 0,
    max_experts: int | None = None,
    num_groups: int = 1,
) -> Tensor:
    """[T, E] bool: expert e takes token t when its score exceeds the expert's threshold (arXiv 2603.11535).

    With bounds the experts are ranked by score - threshold: a token keeps at most `max_experts` of those above
    their threshold and gets at least `min_experts`, its nearest ones. Causal: row t reads row t alone.

    num_groups: both bounds are divided by it and hold among the experts of each group (`in_groups`).
    """
    if max_experts is not None and max_experts >= scores_TE.shape[-1]:
        max_experts = None
    if min_experts == 0 and max_experts is None:
        return scores_TE > threshold_E
    if num_groups > 1:
        bounds = min_experts // num_groups, None if max_experts is None else max_experts // num_groups
        return out_of_groups(
            routes_by_threshold(in_groups(scores_TE, num_groups), in_groups(threshold_E, num_groups), *bounds)
        )
    margin_TE = scores_TE.detach() - threshold_E
    if min_experts == max_experts:  # so many whatever the thresholds say
        return _best_experts(margin_TE, min_experts)
    routes_TE = margin_TE > 0
    if max_experts is not None:
        routes_TE = routes_TE & _best_experts(margin_TE, max_experts)
    if min_experts > 0:
        routes_TE = routes_TE | _best_experts(margin_TE, min_experts)
    return routes_TE


def _best_experts(margin_TE: Tensor, num_best: int) -> Tensor:
    """[T, E] bool, True at the `num_best` largest margins of each token."""
    best_TK = margin_TE.topk(num_best, dim=-1).indices
    return torch.zeros_like(margin_TE, dtype=torch.bool).scatter(-1, best_TK, True)


def combine_weights(
    scores: Tensor,
    token_index: Tensor,
    num_tokens: int,
    normalize: bool,
    expert_index: Tensor | None = None,
    num_experts: int = 0,
) -> tuple[Tensor, Tensor]:
    """Combine weights of the chosen pairs and what each token's weights add up to.

    Args:
        scores: [R] float, scores of the chosen (expert, token) pairs, zero at masked slots.
        token_index: [R] long, the token of each pair.
        num_tokens: T.
        normalize: divide by the token's sum, so that its weights add up to one.
        expert_index: [R] long, the expert of each pair, one of num_experts; with it a GPU adds up in the same order
            every time.

    Returns:
        weights [R] and their sum per token [T]; a token nobody chose has sum 0.
    """
    if scores.is_cuda and expert_index is not None:
        total_T = totals_of_experts(scores, token_index, num_tokens, expert_index, num_experts)
    else:
        total_T = scores.new_zeros(num_tokens).index_add(0, token_index, scores)
    if not normalize:
        return scores, total_T
    # where, not clamp: a masked slot of an otherwise unchosen token must give 0 / 1 and no gradient. Nor do scores so
    # small that a gradient over them might overflow, as of a token that only experts it does not care for took.
    is_tiny_T = total_T < torch.finfo(scores.dtype).tiny ** 0.5
    scores = torch.where(is_tiny_T[token_index], scores.detach(), scores)
    divisor_T = torch.where(is_tiny_T, torch.where(total_T > 0, total_T, 1).detach(), total_T)
    return scores / divisor_T[token_index], (total_T > 0).to(scores.dtype)


def totals_of_experts(
    scores: Tensor, token_index: Tensor, num_tokens: int, expert_index: Tensor, num_experts: int
) -> Tensor:
    """[T] each token's sum of its pairs' scores, expert by expert.

    Where a GPU adds atomically, here every place gets at most one number that is not 0, and the order is no matter.
    """
    places = scores.new_zeros(num_tokens * num_experts)
    return places.index_add(0, token_index * num_experts + expert_index, scores).view(num_tokens, num_experts).sum(-1)
