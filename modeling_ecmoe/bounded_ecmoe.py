"""Expert choice with bounds on the experts of a token: at least a, at most b, and every expert exactly its share.

Zhou et al. 2022 (arXiv 2202.09368, section 4.3 and appendix) cap the experts of a token by a linear programme,

    maximise  <S, A>   with   sum_t A[t, e] = C,   a <= sum_e A[t, e] <= b,   0 <= A <= 1;

the lower bound is ours. [0, b] is the paper's capped variant, [1, b] leaves no token without an expert, [c, c] is
balanced token choice (BASE layers, arXiv 2103.16716). The paper adds an entropy term and takes a hundred of Dykstra's
projections. The dual is solved here: a price for each expert, each a quantile, as in plain expert choice. The prices
then steer an exact rounding, and are the thresholds that inference routes by. Letters as in routing_ecmoe.py, and K the
places of a list, G groups of experts; all shapes are static and nothing is read back to the host.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .graphs_ecmoe import replay
from .routing_ecmoe import (
    ExpertChoice,
    as_choice,
    expert_capacity,
    in_groups,
    mean_over_pools,
    out_of_groups,
    real_capacity,
    routes_by_threshold,
)

ROUNDS = 4  # of the prices; twice as many where every token has exactly c experts, and each price hangs on all others
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
    in_graph: bool = False,
    num_groups: int = 1,
) -> ExpertChoice:
    """As `routing_ecmoe.choose_tokens`, with at least `min_experts` and at most `max_experts` for every real token.

    The threshold of the choice is the expert's price in the programme, which the bounded rule at inference ranks by.
    An expert's tokens come in the order of the text.

    in_graph: whether a GPU launches the hundreds of operations as one CUDA graph.
    num_groups: G; with bounds that hold in each group of experts (`routing_ecmoe.in_groups`), the groups are
        programmes of their own, each with its G-th part of bounds and capacity.
    """
    most = scores_PNE.shape[2] if max_experts is None else max_experts
    options = _of_group(num_groups, capacity_factor, min_experts, most)
    found = []
    for scores_PNE_of_group in in_groups(scores_PNE.detach(), num_groups).unbind(-2):
        tensors = scores_PNE_of_group.contiguous(), token_mask_PN
        found.append(replay(chosen_places, tensors, *options) if in_graph else chosen_places(*tensors, *options))
    index, is_chosen, threshold = (torch.stack(parts) for parts in zip(*found, strict=True))
    places = (_of_all_groups(index, 2), _of_all_groups(is_chosen, 2), _of_all_groups(threshold, 1))
    return as_choice(scores_PNE, *places)


def _of_group(num_groups: int, capacity_factor: float, least: int, most: int) -> tuple[Any, int, int]:
    """The G-th part of capacity factor and bounds; no third of a decimal is one."""
    capacity = Fraction(str(capacity_factor)) / num_groups if num_groups > 1 else capacity_factor
    return capacity, least // num_groups, most // num_groups


def _of_all_groups(parts: Tensor, dim: int) -> Tensor:
    """[G, ...] with the experts of each group at `dim` -> [...] with all experts there, one of each group in turn."""
    return parts.movedim(0, dim).flatten(dim - 1, dim)


def chosen_places(
    scores_PNE: Tensor, token_mask_PN: Tensor | None, capacity_factor: float, min_experts: int, max_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of each expert's slots [P, E, C], which slots are used, and the experts' thresholds [E]."""
    shares = expert_shares(scores_PNE, capacity_factor, max_experts, token_mask_PN)
    ranking_PEN = scores_PNE.transpose(1, 2).contiguous()
    if token_mask_PN is not None:  # whatever stands at padding
        ranking_PEN = ranking_PEN.masked_fill(~token_mask_PN[:, None, :], 0)
    prices = Prices(capacity_factor, min_experts, max_experts, shares, token_mask_PN)
    price_PE = prices.of(ranking_PEN)
    chosen_PEN = assign(ranking_PEN - price_PE[..., None], shares, min_experts, max_experts, token_mask_PN)
    index_PEC = _places_of(chosen_PEN, shares.num_slots)
    is_chosen_PEC = torch.arange(shares.num_slots, device=index_PEC.device) < shares.share_PE[..., None]
    # Unused slots point at the expert's first token; of an expert without a share at its best real one.
    if token_mask_PN is not None:
        best_PE1 = ranking_PEN.masked_fill(~token_mask_PN[:, None, :], -_FAR).argmax(2, keepdim=True)
        index_PEC = torch.where(is_chosen_PEC[..., :1], index_PEC, best_PE1)
    threshold_PE = prices.thresholds(ranking_PEN, price_PE)
    return index_PEC, is_chosen_PEC, mean_over_pools(threshold_PE, shares.num_real_P)


class Shares(NamedTuple):
    """How many tokens each expert takes.

    share_PE: [P, E], at most num_slots; are_even: all of them just as many. num_real_P: [P] of num_tokens in a pool.
    """

    share_PE: Tensor  # noqa: N815
    num_slots: int
    are_even: bool
    num_real_P: Tensor  # noqa: N815
    num_tokens: int


def expert_shares(scores_PNE: Tensor, capacity_factor: float, max_experts: int, token_mask_PN: Tensor | None) -> Shares:
    """C tokens for each expert, or less where even b experts for every token would not fill them all.

    Only rounding brings that about (b = c, and T no multiple of E); the shares then differ by one at most.
    """
    num_tokens, num_experts = scores_PNE.shape[1:]
    num_slots = expert_capacity(num_tokens, num_experts, capacity_factor)
    capacity_P, num_real_P = real_capacity(scores_PNE, capacity_factor, token_mask_PN)
    total_P1 = torch.minimum(capacity_P * num_experts, num_real_P * max_experts)[:, None]
    first = torch.arange(num_experts, device=total_P1.device) < total_P1 % num_experts
    are_even = token_mask_PN is None and num_slots * num_experts <= max_experts * num_tokens
    return Shares(total_P1 // num_experts + first, num_slots, are_even, num_real_P, num_tokens)


class Prices:
    """The experts' prices [P, E]: the dual variables of their shares.

    An expert wins a token whose score - price exceeds a bar that the token's other experts set (see `_bars`), so the
    price at which it wins exactly its share is a quantile of score - bar: coordinate ascent on the dual. All experts
    move at once, and by half of the way w, since a token between two of them moves both; from the second round on the
    last one corrects it: p + w / 2 - g (dp + dw / 2), with differences d to the last round and g = <dw, w> / <dw, dw>,
    kept from leaping (Anderson acceleration of depth one, Walker and Ni 2011, section 2).
    """

    def __init__(
        self,
        capacity_factor: float,
        min_experts: int,
        max_experts: int,
        shares: Shares,
        token_mask_PN: Tensor | None,
    ) -> None:
        self.least, self.most = min_experts, max_experts
        self.share_PE, self.num_slots, self.are_even, self.num_real_P, num_tokens = shares
        self.mask_PN = token_mask_PN
        # Where c is a bound every token has exactly c experts, and [c, c] is solved: its prices are soon found. At the
        # lower bound C must not have been rounded up; at the upper one `expert_shares` has taken that away.
        fits = token_mask_PN is None and self.num_slots * self.share_PE.shape[1] == min_experts * num_tokens
        self.each = max_experts if capacity_factor == max_experts else None
        self.each = min_experts if capacity_factor == min_experts and fits else self.each
        self.bounds = (min_experts, max_experts) if self.each is None else (self.each, self.each)
        self.is_nearly_least = self.each is None and capacity_factor - min_experts < _NEARLY

    def of(
        self, scores_PEN: Tensor, rounds: int | None = None, is_enough: Callable[[Tensor], bool] | None = None
    ) -> Tensor:
        """The prices after so many rounds, or after as many as are enough; begun with those of plain expert choice.

        scores_PEN: finite at padding, too. rounds: None for as many as `ROUNDS` says.
        """
        if self.bounds[0] == scores_PEN.shape[1]:  # nothing to choose, and no price that says so
            return torch.zeros_like(self.share_PE, dtype=scores_PEN.dtype)
        price_PE = self._quantile(scores_PEN)
        rounds = rounds or ROUNDS * (1 if self.each is None else 2)
        before_PE = way_before_PE = torch.zeros_like(price_PE)
        for number in range(rounds):
            if is_enough is not None and is_enough(price_PE):
                break
            way_PE = self._asked(scores_PEN, price_PE) - price_PE
            step_PE = way_PE / 2
            if number:
                turn_PE = way_PE - way_before_PE
                extent_P1 = turn_PE.square().sum(1, keepdim=True).clamp(min=torch.finfo(turn_PE.dtype).tiny)
                weight_P1 = ((turn_PE * way_PE).sum(1, keepdim=True) / extent_P1).clamp(-2, 0.5)
                step_PE = step_PE - weight_P1 * (price_PE - before_PE + turn_PE / 2)
            before_PE, way_before_PE, price_PE = price_PE, way_PE, price_PE + step_PE
        return price_PE

    def thresholds(self, scores_PEN: Tensor, price_PE: Tensor) -> Tensor:
        """[P, E] the prices, moved together to where the threshold rule gives every token exactly c experts if c is one
        of two bounds: above every token's next margin (c = a), which a fills up to, or below it (c = b), which b cuts.
        """
        if self.each is None or self.least == self.most or self.each == scores_PEN.shape[1]:
            return price_PE
        next_PN = _best(scores_PEN - price_PE[..., None], self.each + 1)[:, self.each]
        if self.each == self.least:
            return price_PE + next_PN.amax(1, keepdim=True)
        if self.mask_PN is not None:
            next_PN = next_PN.masked_fill(~self.mask_PN, 0)
        return price_PE + next_PN.amin(1, keepdim=True) - _HAIR

    def _asked(self, scores_PEN: Tensor, price_PE: Tensor) -> Tensor:
        """[P, E] the price at which each expert would win its share if the others' prices stayed."""
        margin_PEN = scores_PEN - price_PE[..., None]
        if self.is_nearly_least:
            margin_PEN = margin_PEN - self._common(margin_PEN)[..., None]
        return self._quantile(scores_PEN - _bars(margin_PEN, *self.bounds))

    def _quantile(self, worth_PEN: Tensor) -> Tensor:
        """[P, E] halfway between what the last token of an expert's share is worth to it and what the next would be.

        An expert that takes every token has no next one, and half its last one stands in.
        """
        if self.mask_PN is not None:
            worth_PEN = worth_PEN.masked_fill(~self.mask_PN[:, None, :], -_FAR)
        end = min(self.num_slots + 1, worth_PEN.shape[-1])
        ranked_PER = worth_PEN.topk(end, dim=-1, sorted=not self.are_even).values
        if self.are_even and end > self.num_slots:
            return ranked_PER.topk(2, dim=-1, largest=False).values.mean(-1)
        if self.are_even:
            return ranked_PER.amin(-1) / 2
        last_PE, next_PE = (value.squeeze(-1) for value in _border(ranked_PER, self.share_PE[..., None]))
        takes_all_PE = (self.share_PE >= end) | (next_PE < -_FAR / 2)
        # Without a real token there is no price.
        return torch.where(last_PE < -_FAR / 2, 0, (last_PE + torch.where(takes_all_PE, 0, next_PE)) / 2)

    def _common(self, margin_PEN: Tensor) -> Tensor:
        """[P, 1] by how much all prices together are too low: of the margins of each token beyond its a-th, as many lie
        above 0 then as the shares have places beyond a for every token."""
        beyond_PKN = _best(margin_PEN, self.most)[:, self.least :]
        num_real_P1 = self.num_real_P[:, None]
        if self.mask_PN is not None:
            beyond_PKN = beyond_PKN.masked_fill(~self.mask_PN[:, None, :], -_FAR)
        ranked_PR = beyond_PKN.flatten(1).sort(dim=1, descending=True).values
        last_P1, next_P1 = _border(ranked_PR, self.share_PE.sum(1, keepdim=True) - self.least * num_real_P1)
        next_P1 = torch.where(next_P1 < -_FAR / 2, last_P1, next_P1)
        return torch.where(num_real_P1 > 0, (last_P1 + next_P1) / 2, 0)


def _border(ranked: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of values [..., R] in falling order the last that gets one of so many places [..., 1], and the next one."""
    end = ranked.shape[-1] - 1
    return ranked.gather(-1, (places - 1).clamp(0, end)), ranked.gather(-1, places.clamp(0, end))


def _bars(margin_PEN: Tensor, least: int, most: int) -> Tensor:
    """[P, E, N] what each expert's margin (score - price) has to exceed for the token to be its own, the others given.

    At most b: their b-th best margin, as far as it is above 0. At least a: no more than their a-th best.
    """
    num_experts = margin_PEN.shape[1]
    deepest = max(least, most if most < num_experts else 0)
    if not deepest:
        return torch.zeros_like(margin_PEN)
    best_PKN = _best(margin_PEN, deepest + 1)

    def of_others(bar_PKN: Tensor, number: int) -> Tensor:
        is_best_PEN = margin_PEN >= best_PKN[:, number - 1, None]  # and so none of the others
        above, at = bar_PKN[:, number - 1, None], bar_PKN[:, number, None]
        return torch.lerp(above, at, is_best_PEN.to(above.dtype))  # where is not vectorised for it on a CPU

    bar_PEN = of_others(best_PKN.clamp(min=0), most) if most < num_experts else torch.zeros_like(margin_PEN[:, :1])
    return torch.minimum(bar_PEN, of_others(best_PKN, least)) if least else bar_PEN


def _best(margin_PEN: Tensor, number: int) -> Tensor:
    """[P, number, N] each token's best margins in falling order."""
    best_PGKN = _alone(margin_PEN)
    while best_PGKN.shape[1] > 1:
        best_PGKN = _merge_pairs(best_PGKN, number)
    return best_PGKN[:, 0, :number]


def _alone(margin_PEN: Tensor) -> Tensor:
    """[P, G, 1, N] lists of one expert each, filled up to a power of two by experts that no token takes."""
    filled = _power_of_two(margin_PEN.shape[1]) - margin_PEN.shape[1]
    return pad(margin_PEN, (0, 0, 0, filled), value=-torch.inf)[:, :, None]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _merge_pairs(best_PGKN: Tensor, number: int) -> Tensor:
    """Lists of the tokens' best margins within groups of experts -> within groups of twice as many; K, a power of two,
    doubles until it holds `number`. Both in falling order: a step of Batcher's bitonic sort (1968)."""
    first_PGKN, second_PGKN = best_PGKN.unflatten(1, (-1, 2)).unbind(2)
    second_PGKN = second_PGKN.flip(2)
    merged = torch.maximum(first_PGKN, second_PGKN)
    size = first_PGKN.shape[2]
    if size < number:
        merged = torch.cat([merged, torch.minimum(first_PGKN, second_PGKN)], 2)
    distance = size // 2
    while distance:
        above, below = merged.unflatten(2, (-1, 2, distance)).unbind(3)
        merged = torch.stack([torch.maximum(above, below), torch.minimum(above, below)], 3).flatten(2, 4)
        distance //= 2
    return merged


def assign(
    margin_PEN: Tensor, shares: Shares, min_experts: int, max_experts: int, token_mask_PN: Tensor | None
) -> Tensor:
    """[P, E, N] bool: exactly its share of tokens for every expert, at least a and at most b experts for every token.

    First how many experts each token gets: the highest margins (score - price) beyond everyone's a-th. Then the experts
    are halved, and every half again, down to one: of a token's number, as many go to the left half as gain by it over
    the right one, the highest gains of all tokens first, until the left half has what its experts' shares add up to.
    Because every pair is allowed and the shares differ by one at most, some way to fill both halves is always left
    (Gale-Ryser). Each step is the best one for the prices that the experts have.

    The lists take up to log2(E) + 1 times the memory of the margins, twice that for one expert above a power of two,
    since filled-in experts are halved with the others. They have no share, and margins of -inf, so that no token goes
    to them; n is at most the number of a group's own experts, hence never are both sides of a gain infinite.
    """
    num_experts = margin_PEN.shape[1]
    groups = [_alone(margin_PEN)]
    size = groups[0].shape[1]
    are_even = shares.are_even and size == num_experts
    share_PE = pad(shares.share_PE, (0, size - num_experts))
    while groups[-1].shape[1] > 1:
        groups.append(_merge_pairs(groups[-1], max_experts))
    number_PGN = _numbers_of_experts(groups.pop()[:, 0], shares, min_experts, max_experts, token_mask_PN)[:, None]
    while groups:
        halves = groups.pop()
        size //= 2
        left_PGKN, right_PGKN = halves.unflatten(1, (-1, 2))[..., :max_experts, :].unbind(2)
        # The k-th in the left half takes the place of the (n - k + 1)-th in the right one, if there is one; past the
        # right half's last it is forced, and past the token's number it may not be.
        right_PGKN = pad(pad(right_PGKN, (0, 0, 1, 0), value=torch.inf), (0, 0, 0, 1), value=-torch.inf)
        place_K1 = torch.arange(left_PGKN.shape[2], device=margin_PEN.device)[:, None]
        displaced_PGKN = (number_PGN[:, :, None] - place_K1).clamp(0, len(place_K1) + 1)
        gain_PGKN = left_PGKN - right_PGKN.gather(2, displaced_PGKN)
        del displaced_PGKN  # of eight bytes each
        share_PG = share_PE.view(len(share_PE), -1, 2, size).sum(3)[..., 0]
        left_PGN = _highest(gain_PGKN.flatten(2), share_PG, size * shares.num_slots, are_even).view_as(gain_PGKN).sum(2)
        number_PGN = torch.stack([left_PGN, number_PGN - left_PGN], 2).flatten(1, 2)
    return number_PGN[:, :num_experts] > 0


def _numbers_of_experts(
    best_PKN: Tensor, shares: Shares, least: int, most: int, token_mask_PN: Tensor | None
) -> Tensor:
    """[P, N] long, how many experts a token gets: a, and one more for each of the highest margins beyond its a-th."""
    is_real_PN = torch.ones_like(best_PKN[:, 0], dtype=torch.bool) if token_mask_PN is None else token_mask_PN
    number_PN = is_real_PN.long() * least
    beyond_PKN = best_PKN[:, least:most].masked_fill(~is_real_PN[:, None], -torch.inf)
    if not beyond_PKN.shape[1]:
        return number_PN
    left_P = shares.share_PE.sum(1) - number_PN.sum(1)
    most_left = shares.share_PE.shape[1] * shares.num_slots - (least * number_PN.shape[1] if shares.are_even else 0)
    return number_PN + _highest(beyond_PKN.flatten(1), left_P, most_left, shares.are_even).view_as(beyond_PKN).sum(1)


def _highest(values: Tensor, number: Tensor, most: int, is_same: bool) -> Tensor:
    """[..., R] bool, the highest `number` [...] of values [..., R], `most` at most or each time (is_same)."""
    index = values.topk(min(most, values.shape[-1]), dim=-1, sorted=not is_same).indices
    is_among = torch.arange(index.shape[-1], device=index.device) < number[..., None]
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, index, is_among)


def _places_of(chosen_PEN: Tensor, num_slots: int) -> Tensor:
    """[P, E, num_slots] long, where the True stand, in their order; 0 in slots that are left.

    Scores that are no numbers make other numbers of them, which must not be an index error.
    """
    slot_PEN = torch.where(chosen_PEN, chosen_PEN.cumsum(2) - 1, num_slots).clamp(max=num_slots)
    place_PEN = torch.arange(chosen_PEN.shape[2], device=chosen_PEN.device).expand_as(slot_PEN)
    index_PEC = slot_PEN.new_zeros(*slot_PEN.shape[:2], num_slots + 1)
    return index_PEC.scatter(2, slot_PEN, place_PEN)[..., :num_slots]


def balanced_thresholds(
    scores_TE: Tensor, capacity_factor: float, min_experts: int, max_experts: int, num_groups: int = 1
) -> Tensor:
    """[E] thresholds at which the bounded threshold rule gives every expert its share of these tokens.

    The prices of the assignment, round after round until every load is within one percent of the share, or for
    `SWEEPS` rounds.

    num_groups: of experts in each of which the bounds hold, as in `choose_tokens_within_bounds`.
    """
    if num_groups > 1:
        options = _of_group(num_groups, capacity_factor, min_experts, max_experts)
        groups = in_groups(scores_TE, num_groups).unbind(-2)
        return out_of_groups(torch.stack([balanced_thresholds(group, *options) for group in groups]))
    shares = expert_shares(scores_TE[None], capacity_factor, max_experts, None)
    if shares.num_slots >= len(scores_TE):
        return torch.zeros_like(scores_TE[0])
    prices = Prices(capacity_factor, min_experts, max_experts, shares, None)
    scores_1EN = scores_TE.T.contiguous()[None]

    def is_balanced(price_1E: Tensor) -> bool:
        threshold_E = prices.thresholds(scores_1EN, price_1E)[0]
        load_E = routes_by_threshold(scores_TE, threshold_E, min_experts, max_experts).sum(0)
        return bool((load_E - shares.share_PE[0]).abs().max() <= max(1, shares.num_slots // 100))

    return prices.thresholds(scores_1EN, prices.of(scores_1EN, SWEEPS, is_balanced))[0]
