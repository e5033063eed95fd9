"""Expert choice with bounds on the experts of a token: at least a, at most b, and every expert exactly its share.

Zhou et al. 2022 (arXiv 2202.09368, section 4.3 and appendix) cap the experts of a token by a linear programme,

    maximise  <S, A>   with   sum_t A[t, e] = C,   a <= sum_e A[t, e] <= b,   0 <= A <= 1;

the lower bound is ours. [0, b] is the paper's capped variant, [1, b] leaves no token without an expert, [c, c] is
balanced token choice (BASE layers, arXiv 2103.16716). The paper adds an entropy term and takes a hundred of Dykstra's
projections. The dual is solved here: a price for each expert, each a quantile, as in plain expert choice. The prices
then steer an exact rounding, and are the thresholds that inference routes by. Letters as in routing_ecmoe.py; all
shapes are static and nothing is read back to the host.
"""

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

ROUNDS = 8  # of the prices
SWEEPS = 100  # rounds of the calibration at most; a few suffice
_HAIR = 1e-6  # of a score, below which ties are
_FAR = 1e9  # stands for infinity where infinities would cancel to NaN
# Where c exceeds a by less, all prices together hang on few tokens, and rounds that move them one by one crawl.
_NEARLY = 0.25


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
    ranking_PNE = scores_PNE.detach()
    if token_mask_PN is not None:  # whatever stands at padding
        ranking_PNE = ranking_PNE.masked_fill(~token_mask_PN[..., None], 0)
    prices = Prices(capacity_factor, min_experts, most, share_PE, num_slots, num_tokens, token_mask_PN)
    price_PE = prices.of(ranking_PNE, ROUNDS)
    threshold_PE = prices.thresholds(ranking_PNE, price_PE)
    index_PEC, is_chosen_PEC = assign(ranking_PNE, threshold_PE, share_PE, num_slots, min_experts, most, token_mask_PN)
    # An expert without a share points at its best real token, as every unused slot does.
    if token_mask_PN is not None:
        ranking_PNE = ranking_PNE.masked_fill(~token_mask_PN[..., None], -_FAR)
    best_PE1 = ranking_PNE.argmax(1)[..., None]
    index_PEC = torch.where(is_chosen_PEC[..., :1], index_PEC, best_PE1)
    return as_choice(scores_PNE, index_PEC, is_chosen_PEC, mean_over_pools(threshold_PE, num_real_P))


# Scores times experts of a pool up to which the rounding is polished.
_EXCHANGE_SIZE = 1 << 16


def expert_shares(num_slots_P: Tensor, num_real_P: Tensor, num_experts: int, max_experts: int) -> Tensor:
    """[P, E] tokens of each expert: C each, or less where even b experts for every token would not fill them all.

    Only rounding brings that about (b = c, and T no multiple of E); the shares then differ by one at most.
    """
    total_P1 = torch.minimum(num_slots_P * num_experts, num_real_P * max_experts)[:, None]
    first = torch.arange(num_experts, device=total_P1.device) < total_P1 % num_experts
    return total_P1 // num_experts + first


class Prices:
    """The experts' prices [P, E]: the dual variables of their shares share_PE [P, E], at most num_slots.

    An expert wins a token whose score - price exceeds a bar that the token's other experts set (see `_bars`), so the
    price at which it wins exactly its share is a quantile of score - bar: coordinate ascent on the dual. All experts
    move at once, and by half of the way, since a token between two of them moves both.
    """

    def __init__(
        self,
        capacity_factor: float,
        min_experts: int,
        max_experts: int,
        share_PE: Tensor,
        num_slots: int,
        num_tokens: int,
        token_mask_PN: Tensor | None,
    ) -> None:
        self.least, self.most = min_experts, max_experts
        self.share_PE, self.num_slots, self.mask_PN = share_PE, num_slots, token_mask_PN
        # Where c is a bound every token has exactly c experts, and [c, c] is solved: its prices are soon found. At the
        # lower bound C must not have been rounded up; at the upper one `expert_shares` has taken that away.
        fits = token_mask_PN is None and num_slots * share_PE.shape[1] == min_experts * num_tokens
        self.each = max_experts if capacity_factor == max_experts else None
        self.each = min_experts if capacity_factor == min_experts and fits else self.each
        self.bounds = (min_experts, max_experts) if self.each is None else (self.each, self.each)
        self.is_nearly_least = self.each is None and capacity_factor - min_experts < _NEARLY

    def of(self, scores_PNE: Tensor, rounds: int = ROUNDS, price_PE: Tensor | None = None) -> Tensor:
        """The prices after so many rounds, begun with those given or with those of plain expert choice.

        scores_PNE: finite at padding, too.
        """
        if self.bounds[0] == scores_PNE.shape[-1]:  # nothing to choose, and no price that says so
            return torch.zeros_like(self.share_PE, dtype=scores_PNE.dtype)
        ranking_PEN = scores_PNE.transpose(1, 2)
        if self.mask_PN is not None:
            ranking_PEN = ranking_PEN.masked_fill(~self.mask_PN[:, None, :], -_FAR)
        if price_PE is None:
            price_PE = _quantile(ranking_PEN, self.share_PE, self.num_slots)
        for _ in range(rounds):
            if self.is_nearly_least:
                price_PE = price_PE + self._common(scores_PNE - price_PE[:, None, :])
            bar_PNE = _bars(scores_PNE - price_PE[:, None, :], *self.bounds)
            worth_PEN = ranking_PEN - bar_PNE.transpose(1, 2)
            price_PE = (price_PE + _quantile(worth_PEN, self.share_PE, self.num_slots)) / 2
        return price_PE

    def thresholds(self, scores_PNE: Tensor, price_PE: Tensor) -> Tensor:
        """[P, E] the prices, moved together to where the threshold rule gives every token exactly c experts if c is one
        of two bounds: above every token's next margin (c = a), which a fills up to, or below it (c = b), which b cuts.
        """
        if self.each is None or self.least == self.most or self.each == scores_PNE.shape[-1]:
            return price_PE
        margin_PNE = scores_PNE - price_PE[:, None, :]
        next_PN = margin_PNE.topk(self.each + 1, dim=-1).values[..., self.each]
        if self.each == self.least:
            return price_PE + next_PN.amax(1, keepdim=True)
        if self.mask_PN is not None:
            next_PN = next_PN.masked_fill(~self.mask_PN, 0)
        return price_PE + next_PN.amin(1, keepdim=True) - _HAIR

    def _common(self, margin_PNE: Tensor) -> Tensor:
        """[P, 1] by how much all prices together are too low: of the margins of each token beyond its a-th, as many lie
        above 0 then as the shares have places beyond a for every token."""
        beyond_PNK = margin_PNE.topk(self.most, dim=-1).values[..., self.least :]
        num_tokens = margin_PNE.shape[1]
        num_real_P1 = torch.full_like(self.share_PE[:, :1], num_tokens)
        if self.mask_PN is not None:
            beyond_PNK = beyond_PNK.masked_fill(~self.mask_PN[..., None], -_FAR)
            num_real_P1 = self.mask_PN.sum(1, keepdim=True)
        ranked_PR = beyond_PNK.flatten(1).sort(dim=1, descending=True).values
        last_P1, next_P1 = _border(ranked_PR, self.share_PE.sum(1, keepdim=True) - self.least * num_real_P1)
        next_P1 = torch.where(next_P1 < -_FAR / 2, last_P1, next_P1)
        return torch.where(num_real_P1 > 0, (last_P1 + next_P1) / 2, 0)


def _border(ranked: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of values [..., R] in falling order the last that gets one of so many places [..., 1], and the next one."""
    end = ranked.shape[-1] - 1
    return ranked.gather(-1, (places - 1).clamp(0, end)), ranked.gather(-1, places.clamp(0, end))


def _quantile(worth_PEN: Tensor, share_PE: Tensor, num_slots: int) -> Tensor:
    """[P, E] halfway between what the last token of an expert's share is worth to it and what the next one would be.

    An expert that takes every token has no next one, and half its last one stands in.
    """
    ranked_PER = worth_PEN.topk(min(num_slots + 1, worth_PEN.shape[-1]), dim=-1).values
    last_PE, next_PE = (value.squeeze(-1) for value in _border(ranked_PER, share_PE[..., None]))
    takes_all_PE = (share_PE >= ranked_PER.shape[-1]) | (next_PE < -_FAR / 2)
    # Without a real token there is no price.
    return torch.where(last_PE < -_FAR / 2, 0, (last_PE + torch.where(takes_all_PE, 0, next_PE)) / 2)


def _bars(margin_PNE: Tensor, least: int, most: int) -> Tensor:
    """[P, N, E] what each expert's margin (score - price) has to exceed for the token to be its own, the others given.

    At most b: their b-th best margin, as far as it is above 0. At least a: no more than their a-th best.
    """
    num_experts = margin_PNE.shape[-1]
    deepest = max(least, most if most < num_experts else 0)
    if not deepest:
        return torch.zeros_like(margin_PNE)
    best_PNK = margin_PNE.topk(min(deepest + 1, num_experts), dim=-1).values

    def of_others(number: int) -> Tensor:
        above, at = best_PNK[..., number - 1, None], best_PNK[..., number, None]
        return torch.where(margin_PNE >= above, at, above)  # an expert among the best is none of the others

    bar_PNE = of_others(most).clamp(min=0) if most < num_experts else torch.zeros_like(margin_PNE)
    return torch.minimum(bar_PNE, of_others(least)) if least else bar_PNE


def assign(
    scores_PNE: Tensor,
    price_PE: Tensor,
    share_PE: Tensor,
    num_slots: int,
    min_experts: int,
    max_experts: int,
    token_mask_PN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Assigns every expert exactly its share of tokens, every token at least a and at most b experts.

    The experts choose in turn, each the tokens with the highest margin (score - price) over the bar that the experts
    still to come set for them. Counts of what those will need say how many tokens are forced or held back; because
    every pair is allowed and the shares are equal, that is all feasibility takes (Gale-Ryser), so that the last
    expert comes out right, too.

    Returns:
        token_index: [P, E, num_slots] long; is_chosen: [P, E, num_slots] bool.
    """
    num_experts = scores_PNE.shape[-1]
    if token_mask_PN is None:
        token_mask_PN = torch.ones_like(scores_PNE[..., 0], dtype=torch.bool)
    margin_EPN = (scores_PNE - price_PE[:, None, :]).permute(2, 0, 1).contiguous()
    need_PN, room_PN = token_mask_PN.long() * min_experts, token_mask_PN.long() * max_experts
    ladders = _ladders(margin_EPN, max_experts if max_experts < num_experts else min_experts)
    indices = []
    for expert in range(num_experts):
        after = num_experts - expert - 1
        demand_P1 = share_PE[:, expert + 1 :].sum(1, keepdim=True)
        key_PN = margin_EPN[expert] - _bar(
            ladders[expert], need_PN if min_experts else None, room_PN if max_experts < num_experts else None
        )
        # A token that needs every expert from this one on comes first, by its bar.
        order_PN = key_PN.masked_fill(room_PN == 0, -_FAR).argsort(dim=1, descending=True, stable=True)
        owed_P1 = need_PN.sum(1, keepdim=True) - demand_P1
        spare_P1 = room_PN.clamp(max=after).sum(1, keepdim=True) - demand_P1 if max_experts < num_experts else None
        place = _places_in_order(need_PN.gather(1, order_PN), room_PN.gather(1, order_PN), after, owed_P1, spare_P1)
        taken = (place > 0) & (place <= share_PE[:, expert, None])
        slot_PN = torch.where(taken, place - 1, num_slots)
        indices.append(order_PN.new_zeros(len(order_PN), num_slots + 1).scatter(1, slot_PN, order_PN)[:, :num_slots])
        taken_PN = torch.zeros_like(need_PN).scatter(1, order_PN, taken.long())
        need_PN, room_PN = (need_PN - taken_PN).clamp(min=0), room_PN - taken_PN
    index_PEC = torch.stack(indices, 1)
    is_chosen_PEC = torch.arange(num_slots, device=index_PEC.device) < share_PE[..., None]
    # Rounding costs about one token per expert, which is nothing in a large pool and much in a tiny one.
    if scores_PNE[0].numel() * num_experts <= _EXCHANGE_SIZE:
        index_PEC = _exchange(scores_PNE, index_PEC, is_chosen_PEC)
    return index_PEC, is_chosen_PEC


def _places_in_order(need: Tensor, room: Tensor, after: int, owed_P1: Tensor, spare_P1: Tensor | None) -> Tensor:
    """[P, N] long, the places 1, 2, ... at which one expert takes the tokens; 0 for those it must not take.

    need, room: [P, N], how many more experts a token has to have and may have, in the order of the expert's keys.
    after: how many experts are still to come. owed_P1: the need that is left over when these have served what they can.
    spare_P1: how many of the tokens that all of these miss can be spared; None without an upper bound.
    """
    needy = need > 0
    forced = (need > after) | (needy & (needy.cumsum(1) <= owed_P1))
    allowed = room > 0
    if spare_P1 is not None:
        scarce = allowed & (room <= after)
        allowed = allowed & (~scarce | (_places(scarce, first=forced) <= spare_P1))
    return _places(allowed, first=forced) * allowed


def _places(members: Tensor, first: Tensor) -> Tensor:
    """[P, N] long, 1 for the first of the members in their order, those that are marked before the others."""
    ahead, others = members & first, members & ~first
    return torch.where(first, ahead.cumsum(1), ahead.sum(1, keepdim=True) + others.cumsum(1))


def _ladders(margin_EPN: Tensor, depth: int) -> list[Tensor]:
    """For each expert [depth + 1, P, N] of the experts after it: infinity, and their best margins in falling order.

    All at once: (depth + 1) times the memory of the scores.
    """
    ladder = margin_EPN.new_full((depth + 1, *margin_EPN.shape[1:]), -_FAR)
    ladder[0] = _FAR  # the 0-th best is beaten by none
    ladders = [ladder]
    for margin_PN in reversed(margin_EPN[1:]):
        inserted = torch.maximum(ladder[1:], torch.minimum(ladder[:-1], margin_PN))
        ladder = torch.cat([ladder[:1], inserted])
        ladders.append(ladder)
    return ladders[::-1]


def _bar(ladder_KPN: Tensor, need_PN: Tensor | None, room_PN: Tensor | None) -> Tensor:
    """[P, N] what an expert's margin has to exceed to be worth one of the token's places; as in `_bars`, of the
    experts still to come, with what is left of the bounds. None is no bound."""
    bar_PN = torch.zeros_like(ladder_KPN[0])
    if room_PN is not None:
        bar_PN = ladder_KPN.gather(0, room_PN[None]).squeeze(0).clamp(min=0)
    if need_PN is not None:
        bar_PN = torch.minimum(bar_PN, ladder_KPN.gather(0, need_PN[None]).squeeze(0))
    return bar_PN


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


def balanced_thresholds(scores_TE: Tensor, capacity_factor: float, min_experts: int, max_experts: int) -> Tensor:
    """[E] thresholds at which the bounded threshold rule gives every expert its share of these tokens.

    The prices of the assignment, round after round until every load is within one percent of the share, or for
    `SWEEPS` rounds.
    """
    num_tokens, num_experts = scores_TE.shape
    share = expert_capacity(num_tokens, num_experts, capacity_factor)
    if share >= num_tokens:
        return scores_TE.new_zeros(num_experts)
    capacity_1, num_real_1 = (torch.tensor([number], device=scores_TE.device) for number in (share, num_tokens))
    share_1E = expert_shares(capacity_1, num_real_1, num_experts, max_experts)
    prices = Prices(capacity_factor, min_experts, max_experts, share_1E, share, num_tokens, None)
    price_1E = prices.of(scores_TE[None])
    for _ in range(SWEEPS):
        threshold_E = prices.thresholds(scores_TE[None], price_1E)[0]
        load_E = routes_by_threshold(scores_TE, threshold_E, min_experts, max_experts).sum(0)
        if (load_E - share_1E[0]).abs().max() <= max(1, share // 100):
            break
        price_1E = prices.of(scores_TE[None], 1, price_1E)
    return threshold_E
