"""Expert choice with bounds on the experts of a token: at least a, at most b, and every expert exactly its share.

Zhou et al. 2022 (arXiv 2202.09368, section 4.3 and appendix) cap the experts of a token by a linear programme,

    maximise  <S, A> + lambda H(A)   with   sum_t A[t, e] = C,   a <= sum_e A[t, e] <= b,   0 <= A <= 1,

solved by Dykstra's projections; the lower bound is ours. [0, b] is the paper's capped variant, [1, b] leaves no
token without an expert, [c, c] is balanced token choice (BASE layers, arXiv 2103.16716). The solution is almost a
0/1 matrix; its prices then steer an exact rounding. Letters as in routing_ecmoe.py; all shapes are static and
nothing is read back to the host.
"""

import math

import torch
from torch import Tensor

from .routing_ecmoe import (
    ExpertChoice,
    as_choice,
    expert_capacity,
    mean_over_pools,
    real_capacity,
    routes_by_threshold,
)

REGULARISATION = 1e-3  # lambda, the paper's
ROUNDS = 100  # the paper's
SAMPLE = 1024  # tokens of a pool without padding that prices are found on
SWEEPS = 20  # of the calibration at most; a few suffice
# Unlike in the paper, the regularisation starts at the size of a score and shrinks to lambda, and the
# experts' steps are over-relaxed. A hundred rounds at lambda from the start end up to 15 % below the optimum.
_START = 1.0
_RELAXATION = 1.5
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_FAR = 1e9  # stands for infinity where infinities would cancel to NaN
_LIFT = 16.0  # more than two margins differ by, and small enough that their order in float32 survives the addition


def choose_tokens_within_bounds(
    scores_PNE: Tensor,
    capacity_factor: float,
    min_experts: int,
    max_experts: int | None,
    token_mask_PN: Tensor | None = None,
) -> ExpertChoice:
    """As `routing_ecmoe.choose_tokens`, with at least `min_experts` and at most `max_experts` for every real token.

    The threshold of the choice is the expert's price in the programme, which the bounded rule at inference ranks by.
    """
    num_tokens, num_experts = scores_PNE.shape[1:]
    most = num_experts if max_experts is None else max_experts
    num_slots = expert_capacity(num_tokens, num_experts, capacity_factor)
    capacity_P, num_real_P = real_capacity(scores_PNE, capacity_factor, token_mask_PN)
    share_PE = expert_shares(capacity_P, num_real_P, num_experts, most)
    index_PEC, is_chosen_PEC, price_PE = assign(
        scores_PNE.detach(), share_PE, num_slots, min_experts, most, token_mask_PN
    )
    # An expert without a share points at its best real token, as every unused slot does.
    ranking_PNE = scores_PNE.detach()
    if token_mask_PN is not None:
        ranking_PNE = ranking_PNE.masked_fill(~token_mask_PN[..., None], -_FAR)
    best_PE1 = ranking_PNE.argmax(1)[..., None]
    index_PEC = torch.where(is_chosen_PEC[..., :1], index_PEC, best_PE1)
    return as_choice(scores_PNE, index_PEC, is_chosen_PEC, mean_over_pools(price_PE, num_real_P))


# Scores times experts of a pool up to which the rounding is polished.
_EXCHANGE_SIZE = 1 << 16


def expert_shares(num_slots_P: Tensor, num_real_P: Tensor, num_experts: int, max_experts: int) -> Tensor:
    """[P, E] tokens of each expert: C each, or less where even b experts for every token would not fill them all.

    Only rounding brings that about (b = c, and T no multiple of E); the shares then differ by one at most.
    """
    total_P1 = torch.minimum(num_slots_P * num_experts, num_real_P * max_experts)[:, None]
    first = torch.arange(num_experts, device=total_P1.device) < total_P1 % num_experts
    return total_P1 // num_experts + first


def sampled_prices(
    scores_PNE: Tensor, share_PE: Tensor, min_experts: int, max_experts: int, token_mask_PN: Tensor | None
) -> Tensor:
    """[P, E] as `assignment_prices`, of a large pool without padding by half the rounds on a sample of it.

    A price is a quantile of a kind, which `SAMPLE` tokens tell well enough: the rounding, which begins with it, still
    sees every token. The sample is spread over the pool by the golden ratio, so that no period of the text (the length
    of a row, a text that repeats itself) meets the same places again and again.
    """
    num_tokens = scores_PNE.shape[1]
    if token_mask_PN is not None or num_tokens < 2 * SAMPLE:
        mask_PN = torch.ones_like(scores_PNE[..., 0], dtype=torch.bool) if token_mask_PN is None else token_mask_PN
        return assignment_prices(scores_PNE, share_PE, min_experts, max_experts, mask_PN)
    turns = torch.arange(SAMPLE, dtype=torch.float64, device=scores_PNE.device) * _GOLDEN_RATIO
    sample_PNE = scores_PNE.index_select(1, (turns.frac() * num_tokens).long())
    share_PE = share_PE * (SAMPLE / num_tokens)
    everyone_PN = torch.ones_like(sample_PNE[..., 0], dtype=torch.bool)
    return assignment_prices(sample_PNE, share_PE, min_experts, max_experts, everyone_PN, ROUNDS // 2)


def assignment_prices(
    scores_PNE: Tensor,
    share_PE: Tensor,
    min_experts: int,
    max_experts: int,
    token_mask_PN: Tensor,
    rounds: int = ROUNDS,
) -> Tensor:
    """[P, E] the experts' prices in the regularised programme: its dual variables of the shares.

    A token that neither bound holds back gets the experts whose price its score exceeds; one that would get too few
    or too many, its best ones by score - price.
    """
    real_PN1 = token_mask_PN[..., None]
    scores_PNE = scores_PNE.masked_fill(~real_PN1, -_FAR)
    log_share_P1E = share_PE.clamp(min=1).to(scores_PNE.dtype).log()[:, None, :]
    least = math.log(min_experts) if min_experts else -math.inf
    most = math.log(max_experts)
    price_P1E = torch.zeros_like(log_share_P1E)
    grant_PN1 = torch.zeros_like(scores_PNE[..., :1])
    clip_PNE = torch.zeros_like(scores_PNE)
    for number in range(rounds):
        scale = max(_START * (REGULARISATION / _START) ** (number / (0.8 * rounds)), REGULARISATION)
        # Every expert gets its share: an equality, which needs no correction in Dykstra's scheme. The first token
        # grants come from prices that know nothing of them, so later steps go further than the projection.
        worth_PNE = scores_PNE + grant_PN1 - clip_PNE
        projected_P1E = scale * ((worth_PNE / scale).logsumexp(dim=1, keepdim=True) - log_share_P1E)
        price_P1E = torch.lerp(price_P1E, projected_P1E, _RELAXATION if number else 1.0)
        # Every token between a and b: the last correction is taken back before the new one is made.
        worth_PNE = scores_PNE - price_P1E - clip_PNE
        sum_PN1 = (worth_PNE / scale).logsumexp(dim=2, keepdim=True)
        grant_PN1 = (scale * (sum_PN1.clamp(least, most) - sum_PN1)).masked_fill(~real_PN1, 0)
        # No pair twice: what would exceed 1 is its correction.
        clip_PNE = (scores_PNE - price_P1E + grant_PN1).clamp(min=0)
    return price_P1E.squeeze(1)


def assign(
    scores_PNE: Tensor,
    share_PE: Tensor,
    num_slots: int,
    min_experts: int,
    max_experts: int,
    token_mask_PN: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Assigns every expert exactly its share of tokens, every token at least a and at most b experts.

    The experts choose in turn, each the tokens with the highest margin (score - price) over the bar that the experts
    still to come set for them. Counts of what those will need say how many tokens are forced or held back; because
    every pair is allowed and the shares are equal, that is all feasibility takes (Gale-Ryser), so that the last
    expert comes out right, too.

    Returns:
        token_index: [P, E, num_slots] long; is_chosen: [P, E, num_slots] bool; price: [P, E], see above.
    """
    num_experts = scores_PNE.shape[-1]
    price_PE = sampled_prices(scores_PNE, share_PE, min_experts, max_experts, token_mask_PN)
    if token_mask_PN is None:
        token_mask_PN = torch.ones_like(scores_PNE[..., 0], dtype=torch.bool)
    margin_PNE = scores_PNE - price_PE[:, None, :]
    need_PN = token_mask_PN.long() * min_experts
    room_PN = token_mask_PN.long() * max_experts
    depth = _depth(num_experts, min_experts, max_experts)
    indices, chosen = [], []
    for expert in range(num_experts):
        after = num_experts - expert - 1
        demand_P1 = share_PE[:, expert + 1 :].sum(1, keepdim=True)
        key_PN = margin_PNE[..., expert] - _bar(margin_PNE[..., expert + 1 :], need_PN, room_PN, depth)
        can_PN = room_PN > 0
        # A token that needs every expert from this one on must be taken, and so many of the needy in all.
        must_PN = need_PN > after
        owed_P1 = need_PN.sum(1, keepdim=True) - demand_P1
        if max_experts < num_experts:
            # A token with no more room than there are experts after this one is missed by them: so many can be spared.
            lifted_PN = key_PN
            if min_experts:
                lifted_PN = key_PN + _LIFT * _forced(key_PN, must_PN, can_PN & (need_PN > 0), owed_P1)
            scarce_PN = can_PN & (room_PN <= after)
            spare_P1 = room_PN.clamp(max=after).sum(1, keepdim=True) - demand_P1
            can_PN = can_PN & (~scarce_PN | (_rank(lifted_PN, among=scarce_PN) < spare_P1))
        if min_experts:
            key_PN = key_PN + _LIFT * _forced(key_PN, must_PN, can_PN & (need_PN > 0), owed_P1)
        best_PC = key_PN.masked_fill(~can_PN, -_FAR).topk(num_slots, dim=-1)
        is_chosen_PC = torch.arange(num_slots, device=best_PC.indices.device) < share_PE[:, expert, None]
        taken_PN = torch.zeros_like(need_PN).scatter_add(1, best_PC.indices, is_chosen_PC.long())
        need_PN = (need_PN - taken_PN).clamp(min=0)
        room_PN = room_PN - taken_PN
        indices.append(best_PC.indices)
        chosen.append(is_chosen_PC)
    index_PEC, is_chosen_PEC = torch.stack(indices, 1), torch.stack(chosen, 1)
    # Rounding costs about one token per expert, which is nothing in a large pool and much in a tiny one.
    if scores_PNE[0].numel() * num_experts <= _EXCHANGE_SIZE:
        index_PEC = _exchange(scores_PNE, index_PEC, is_chosen_PEC)
    return index_PEC, is_chosen_PEC, price_PE


def _exchange(scores_PNE: Tensor, index_PEC: Tensor, is_chosen_PEC: Tensor) -> Tensor:
    """Lets pairs of experts trade one token for another, the best trade of the pool first, 2 E times.

    Shares and the number of each token's experts stay as they are; a trade without gain is not made.
    """
    num_pools, _, num_experts = scores_PNE.shape
    pools = torch.arange(num_pools, device=scores_PNE.device)
    for _ in range(2 * num_experts):
        has_PEN = torch.zeros_like(scores_PNE.transpose(1, 2), dtype=torch.long)
        has_PNE = has_PEN.scatter_add(2, index_PEC, is_chosen_PEC.long()).transpose(1, 2) > 0
        # [P, N, E, F]: what moving a token of expert e to expert f gains, where e has it and f has not.
        gain_PNEF = scores_PNE[:, :, None, :] - scores_PNE[:, :, :, None]
        gain_PNEF = gain_PNEF.masked_fill(~(has_PNE[..., None] & ~has_PNE[:, :, None, :]), -_FAR)
        gain_PEF, token_PEF = gain_PNEF.max(1)
        trade_P, pair_P = (gain_PEF + gain_PEF.transpose(1, 2)).flatten(1).max(1)
        giver_P, taker_P = pair_P // num_experts, pair_P % num_experts
        given_P, taken_P = token_PEF[pools, giver_P, taker_P], token_PEF[pools, taker_P, giver_P]
        for expert_P, old_P, new_P in ((giver_P, given_P, taken_P), (taker_P, taken_P, given_P)):
            row_PC = index_PEC[pools, expert_P]
            swapped_PC = torch.where((row_PC == old_P[:, None]) & (trade_P > 0)[:, None], new_P[:, None], row_PC)
            index_PEC = index_PEC.index_put((pools, expert_P), swapped_PC)
    return index_PEC


def _depth(num_experts: int, min_experts: int, max_experts: int) -> int:
    """How many of a token's best experts a bar can depend on; a bound of all experts is none."""
    return max_experts if max_experts < num_experts else min_experts


def _bar(margin_PNE: Tensor, need_PN: Tensor, room_PN: Tensor, depth: int) -> Tensor:
    """[P, N] what an expert's margin has to exceed to be worth one of the token's places, the other margins given.

    Room for r: the r-th best of the others, as far as it is above 0. Need of n: no more than their n-th best.
    """
    best_PNK = margin_PNE.topk(min(depth, margin_PNE.shape[-1]), dim=-1).values
    far_PN1 = best_PNK.new_full((*best_PNK.shape[:-1], 1), _FAR)
    ladder_PNE = torch.cat([far_PN1, best_PNK, -far_PN1], dim=-1)  # the 0-th best is beaten by none
    last = ladder_PNE.shape[-1] - 1
    room_bar_PN = ladder_PNE.gather(-1, room_PN.clamp(max=last)[..., None]).squeeze(-1).clamp(min=0)
    need_bar_PN = ladder_PNE.gather(-1, need_PN.clamp(max=last)[..., None]).squeeze(-1)
    return torch.minimum(room_bar_PN, need_bar_PN)


def _forced(key_PN: Tensor, must_PN: Tensor, needy_PN: Tensor, owed_P1: Tensor) -> Tensor:
    """[P, N] bool: the needy tokens an expert has to take, the best ones of them as many as are owed."""
    return must_PN | (needy_PN & (_rank(key_PN + _LIFT * must_PN, among=needy_PN) < owed_P1))


def _rank(key_PN: Tensor, among: Tensor) -> Tensor:
    """[P, N] long, 0 for the highest key among the marked tokens."""
    order_PN = key_PN.masked_fill(~among, -_FAR).argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order_PN).scatter_(
        1, order_PN, torch.arange(key_PN.shape[1], device=key_PN.device).expand_as(order_PN)
    )


def balanced_thresholds(scores_TE: Tensor, share: int, min_experts: int, max_experts: int) -> Tensor:
    """[E] thresholds at which the bounded threshold rule gives every expert its share of these tokens.

    It begins at the prices of the assignment and goes on expert by expert, the others' thresholds held: a token goes
    to the expert when score - threshold exceeds a bar that the token's other experts set, so the threshold is an
    exact quantile of score - bar. That is a coordinate ascent on the programme's dual; it ends when every load is
    within one percent of the share, or after `SWEEPS` times all experts (64 experts, one each: then within 3 %).
    """
    num_tokens, num_experts = scores_TE.shape
    if share >= num_tokens:
        return scores_TE.new_zeros(num_experts)
    need_T = torch.full((num_tokens,), min_experts, device=scores_TE.device)
    room_T = torch.full_like(need_T, max_experts)
    depth = _depth(num_experts, min_experts, max_experts)
    share_1E = torch.full_like(scores_TE[:1], share, dtype=torch.long)
    everyone_1T = torch.ones_like(scores_TE[None, :, 0], dtype=torch.bool)
    threshold_E = assignment_prices(scores_TE[None], share_1E, min_experts, max_experts, everyone_1T)[0]
    for _ in range(SWEEPS):
        for expert in range(num_experts):
            others = [other for other in range(num_experts) if other != expert]
            bar_T = _bar((scores_TE - threshold_E)[:, others], need_T, room_T, depth)
            beats_T = (scores_TE[:, expert] - bar_T).sort(descending=True).values
            threshold_E[expert] = (beats_T[share - 1] + beats_T[share]) / 2  # on the border rounding would decide
        load_E = routes_by_threshold(scores_TE, threshold_E, min_experts, max_experts).sum(0)
        if (load_E - share).abs().max() <= max(1, share // 100):
            break
    return threshold_E
