"""Scores, each expert's choice, thresholds and combine weights against the float64 oracle."""

import math

import hypothesis
import oracle
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from modeling_ecmoe.routing_ecmoe import (
    ExpertChoice,
    choose_tokens,
    combine_weights,
    expert_capacity,
    router_scores,
    routes_by_threshold,
    totals_of_experts,
)


def pairs_of(choice: ExpertChoice) -> oracle.Pairs:
    """The chosen (expert, token) pairs; a pair chosen twice is an error."""
    num_experts = choice.token_index.shape[0]
    pairs = [
        (expert, int(token))
        for expert in range(num_experts)
        for token, chosen in zip(choice.token_index[expert], choice.is_chosen[expert], strict=True)
        if chosen
    ]
    assert len(pairs) == len(set(pairs))
    return set(pairs)


def pairs_of_routes(routes_TE: Tensor) -> oracle.Pairs:
    return {(int(expert), int(token)) for token, expert in routes_TE.nonzero()}


def random_scores(pools: int, tokens: int, experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(pools, tokens, experts, generator=generator, dtype=torch.float64).sigmoid()


def pool_lists(pools: int, tokens: int) -> list[list[int]]:
    return [list(range(pool * tokens, (pool + 1) * tokens)) for pool in range(pools)]


def test_three_experts_and_six_tokens_by_hand() -> None:
    scores_NE = torch.tensor(
        [
            [0.70, 0.20, 0.10],
            [0.60, 0.10, 0.30],
            [0.10, 0.50, 0.40],
            [0.80, 0.15, 0.05],
            [0.25, 0.40, 0.35],
            [0.34, 0.33, 0.33],
        ]
    )
    choice = choose_tokens(scores_NE[None], capacity_factor=1.0)
    assert choice.token_index.tolist() == [[3, 0], [2, 4], [2, 4]]  # C = ceil(1 * 6 / 3) = 2, best first
    assert choice.is_chosen.all()
    torch.testing.assert_close(choice.scores, torch.tensor([[0.80, 0.70], [0.50, 0.40], [0.40, 0.35]]))
    # midpoints of 0.70 | 0.60, 0.40 | 0.33 and 0.35 | 0.33
    torch.testing.assert_close(choice.threshold, torch.tensor([0.65, 0.365, 0.34]))

    weights, total = combine_weights(choice.scores.flatten(), choice.token_index.flatten(), 6, normalize=False)
    torch.testing.assert_close(weights, choice.scores.flatten())
    torch.testing.assert_close(total, torch.tensor([0.70, 0.0, 0.90, 0.80, 0.75, 0.0]))
    weights, total = combine_weights(choice.scores.flatten(), choice.token_index.flatten(), 6, normalize=True)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 5 / 9, 8 / 15, 4 / 9, 7 / 15]))
    assert total.tolist() == [1, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_scores_match_oracle(score_function: str) -> None:
    hidden_TD, weight_ED = torch.randn(7, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    expected = oracle.scores(hidden_TD, weight_ED, score_function)
    torch.testing.assert_close(router_scores(hidden_TD @ weight_ED.T, score_function), expected)


def test_unknown_score_function_is_refused() -> None:
    with pytest.raises(ValueError, match="router_score_function='tanh'"):
        router_scores(torch.zeros(2, 2), "tanh")


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "capacity_factor", "slots"),
    [
        (80, 8, 1.1, 11),  # 1.1 * 80 is 88.00000000000001 in binary
        (100, 10, 1.1, 11),
        (30, 3, 0.7, 7),
        (30, 10, 0.1, 1),
        (7, 4, 1.0, 2),
        (7, 4, 4.0, 7),
        (7, 4, 4, 7),
        (1, 64, 1.0, 1),
        (5, 1, 1.0, 5),
        (3, 1, 2.0, 3),  # at most all tokens
        (1000, 3, 0.3, 100),
        (10, 4, 1e-05, 1),
    ],
)
def test_capacity(num_tokens: int, num_experts: int, capacity_factor: float, slots: int) -> None:
    assert expert_capacity(num_tokens, num_experts, capacity_factor) == slots
    assert oracle.capacity(num_tokens, num_experts, capacity_factor) == slots


@hypothesis.given(st.integers(1, 300), st.integers(1, 16), st.integers(1, 400))
@hypothesis.settings(max_examples=100, deadline=None)
def test_capacity_matches_decimal_arithmetic(num_tokens: int, num_experts: int, hundredths: int) -> None:
    factor = hundredths / 100
    assert expert_capacity(num_tokens, num_experts, factor) == oracle.capacity(num_tokens, num_experts, factor)


@pytest.mark.parametrize("wrong", [(0, 2, 1.0), (2, 0, 1.0), (2, 2, 0.0), (2, 2, -1.0)])
def test_capacity_refuses_what_is_not_positive(wrong: tuple) -> None:
    with pytest.raises(ValueError, match="capacity_factor"):
        expert_capacity(*wrong)


CASES = [  # pools, tokens per pool, experts, capacity factor
    (1, 7, 3, 1.0),
    (1, 13, 5, 1.7),
    (1, 5, 5, 1.0),  # C = 1
    (1, 6, 3, 3.0),  # C = N
    (1, 9, 1, 1.0),  # E = 1, takes all
    (1, 9, 1, 0.5),
    (1, 1, 4, 1.0),  # one token
    (3, 7, 4, 1.3),
    (2, 11, 3, 0.4),
    (4, 1, 2, 1.0),
    (2, 6, 2, 3.0),  # more slots than tokens
]


@pytest.mark.parametrize(("pools", "tokens", "experts", "factor"), CASES)
@pytest.mark.parametrize("padding", ["none", "left", "right", "mixed", "one pool empty"])
def test_choice_matches_oracle(pools: int, tokens: int, experts: int, factor: float, padding: str) -> None:
    scores_PNE = random_scores(pools, tokens, experts, seed=tokens)
    mask_PN = make_mask(padding, pools, tokens)
    choice = choose_tokens(scores_PNE, factor, mask_PN)
    flat_TE = scores_PNE.flatten(0, 1)
    is_real = None if mask_PN is None else mask_PN.flatten().tolist()
    pairs = pairs_of(choice)
    assert pairs == oracle.expert_choice(flat_TE, factor, pool_lists(pools, tokens), is_real)
    expert_E1 = torch.arange(experts)[:, None].expand_as(choice.token_index)
    torch.testing.assert_close(choice.scores, flat_TE[choice.token_index, expert_E1])
    expected = oracle.choice_threshold(flat_TE, factor, pool_lists(pools, tokens), is_real)
    torch.testing.assert_close(choice.threshold.double(), torch.tensor(expected).double(), atol=1e-6, rtol=1e-6)
    assert choice.threshold.dtype == torch.float32

    weight_R = choice.scores.masked_fill(~choice.is_chosen, 0).flatten()
    for normalize in (False, True):
        weights, total = combine_weights(weight_R, choice.token_index.flatten(), len(flat_TE), normalize)
        by_pair = oracle.combine(flat_TE, pairs, normalize)
        found = dict.fromkeys(by_pair, 0.0)
        for weight, token, chosen, expert in zip(
            weights, choice.token_index.flatten(), choice.is_chosen.flatten(), expert_E1.flatten(), strict=True
        ):
            if chosen:
                found[int(expert), int(token)] = float(weight)
            else:
                assert weight == 0
        assert found == pytest.approx({pair: float(weight) for pair, weight in by_pair.items()})
        sums = [math.fsum(float(w) for (_, t), w in by_pair.items() if t == token) for token in range(len(flat_TE))]
        torch.testing.assert_close(total, torch.tensor(sums, dtype=torch.float64))


def make_mask(padding: str, pools: int, tokens: int) -> Tensor | None:
    """[pools, tokens] bool; each pool another number of real tokens, at least one."""
    if padding == "none":
        return None
    position_N = torch.arange(tokens)
    if padding == "one pool empty":
        return torch.arange(pools)[:, None].expand(-1, tokens) > 0
    rows = []
    for pool in range(pools):
        length = max(1, tokens - 2 - pool)
        if padding == "left":
            rows.append(position_N >= tokens - length)
        elif padding == "right":
            rows.append(position_N < length)
        else:
            rows.append(position_N % 2 == pool % 2 if tokens > 1 else position_N >= 0)
    return torch.stack(rows)


@pytest.mark.parametrize("padding", ["left", "right", "mixed"])
def test_masked_slots_repeat_the_best_token(padding: str) -> None:
    """Also where a pool has fewer real tokens than slots: no slot points at padding."""
    pools, tokens, experts = 3, 9, 2
    mask_PN = make_mask(padding, pools, tokens)
    mask_PN[0] = torch.arange(tokens) == 4
    choice = choose_tokens(random_scores(pools, tokens, experts), 1.9, mask_PN)
    slots = oracle.capacity(tokens, experts, 1.9)
    assert slots > mask_PN.sum(-1).min()
    assert mask_PN.flatten()[choice.token_index].all()
    by_pool = choice.token_index.view(experts, pools, slots)
    best = by_pool[..., :1].expand_as(by_pool)
    masked = ~choice.is_chosen.view_as(by_pool)
    assert masked.any()
    assert torch.equal(by_pool[masked], best[masked])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_of_padding_are_not_read(value: float) -> None:
    mask_PN = make_mask("left", 2, 9)
    scores_PNE = random_scores(2, 9, 3)
    expected = choose_tokens(scores_PNE, 1.0, mask_PN)
    choice = choose_tokens(scores_PNE.masked_fill(~mask_PN[..., None], value), 1.0, mask_PN)
    for name, tensor in choice._asdict().items():
        torch.testing.assert_close(tensor, getattr(expected, name), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("tokens", [8, 700])
def test_ties_are_broken_the_same_way_each_time(tokens: int) -> None:
    scores_PNE = torch.randint(0, 3, (2, tokens, 3), generator=torch.Generator().manual_seed(3)) / 4 + 0.1
    first = choose_tokens(scores_PNE, 1.0)
    for _ in range(3):
        again = choose_tokens(scores_PNE.clone(), 1.0)
        assert torch.equal(first.token_index, again.token_index)
    slots = oracle.capacity(tokens, 3, 1.0)
    for expert in range(3):
        for pool in range(2):
            column = scores_PNE[pool, :, expert]
            index = first.token_index[expert, pool * slots : (pool + 1) * slots] - pool * tokens
            assert len(set(index.tolist())) == slots
            refused = torch.ones(tokens, dtype=torch.bool).index_fill(0, index, False)
            assert column[index].min() >= column[refused].max()


@pytest.mark.parametrize(("tokens", "experts", "factor"), [(7, 3, 1.0), (64, 8, 1.1), (33, 4, 4.0), (5, 1, 1.0)])
@pytest.mark.parametrize("padded", [False, True])
def test_threshold_repeats_the_choice_on_its_pool(tokens: int, experts: int, factor: float, padded: bool) -> None:
    scores_PNE = random_scores(1, tokens, experts).float()
    mask_PN = torch.arange(tokens)[None] >= 2 if padded else None
    choice = choose_tokens(scores_PNE, factor, mask_PN)
    routes_TE = routes_by_threshold(scores_PNE[0], choice.threshold)
    if padded:
        routes_TE = routes_TE & mask_PN[0][:, None]
    assert pairs_of_routes(routes_TE) == pairs_of(choice)


@hypothesis.given(
    st.integers(1, 20),
    st.integers(1, 7),
    st.integers(0, 7),
    st.integers(1, 7),
    st.integers(0, 10_000),
    st.floats(-1, 1),
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_bounds_on_the_experts_of_a_token(
    tokens: int, experts: int, least: int, most: int, seed: int, level: float
) -> None:
    least, most = min(least, experts), min(most, experts)
    most = max(least, most)
    scores_TE = random_scores(1, tokens, experts, seed)[0]
    threshold_E = torch.rand(experts, generator=torch.Generator().manual_seed(seed)) * level
    free_TE = routes_by_threshold(scores_TE, threshold_E)
    assert pairs_of_routes(free_TE) == oracle.threshold_routes(scores_TE, threshold_E.tolist())
    assert torch.equal(free_TE, scores_TE > threshold_E)

    routes_TE = routes_by_threshold(scores_TE, threshold_E, least, most)
    assert pairs_of_routes(routes_TE) == oracle.threshold_routes(scores_TE, threshold_E.tolist(), least, most)
    assert torch.equal(routes_TE.sum(-1), free_TE.sum(-1).clamp(least, most))
    # The bounds only add or only remove: never an expert swapped for another.
    inside_T = (free_TE.sum(-1) >= least) & (free_TE.sum(-1) <= most)
    assert torch.equal(routes_TE[inside_T], free_TE[inside_T])
    for token in range(tokens):
        alone = routes_by_threshold(scores_TE[token : token + 1], threshold_E, least, most)
        assert torch.equal(alone[0], routes_TE[token])


@hypothesis.given(st.integers(1, 30), st.integers(1, 6), st.integers(10, 300), st.integers(0, 10_000))
@hypothesis.settings(max_examples=80, deadline=None)
def test_every_expert_takes_exactly_its_capacity(tokens: int, experts: int, hundredths: int, seed: int) -> None:
    factor = min(hundredths / 100, experts)
    real_N = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) > 0.3
    choice = choose_tokens(random_scores(1, tokens, experts, seed), factor, real_N[None])
    expected = oracle.capacity(int(real_N.sum()), experts, factor)
    assert choice.is_chosen.sum(-1).tolist() == [expected] * experts
    assert all(real_N[token] for _, token in pairs_of(choice))


@pytest.mark.parametrize("wrong", ["tokens choose", "worst first", "padding counted", "one slot more", "one pool"])
def test_oracle_tells_a_wrong_choice(wrong: str) -> None:
    """Negative control: what these variants choose differs from the oracle's choice."""
    pools, tokens, experts, factor = 2, 12, 4, 1.0
    scores_PNE = random_scores(pools, tokens, experts)
    mask_PN = make_mask("right", pools, tokens)
    flat_TE, is_real = scores_PNE.flatten(0, 1), mask_PN.flatten().tolist()
    expected = oracle.expert_choice(flat_TE, factor, pool_lists(pools, tokens), is_real)
    assert pairs_of(choose_tokens(scores_PNE, factor, mask_PN)) == expected
    if wrong == "tokens choose":
        found = {(int(row.argmax()), token) for token, row in enumerate(flat_TE) if is_real[token]}
    elif wrong == "worst first":
        found = pairs_of(choose_tokens(1 - scores_PNE, factor, mask_PN))
    elif wrong == "padding counted":
        found = pairs_of(choose_tokens(scores_PNE, factor))
    elif wrong == "one slot more":
        found = pairs_of(choose_tokens(scores_PNE, factor * 1.5, mask_PN))
    else:
        found = pairs_of(choose_tokens(flat_TE[None], factor, mask_PN.flatten()[None]))
    assert found != expected


def test_gradient_of_normalised_weights_with_masked_slots_is_finite() -> None:
    scores_R = torch.tensor([0.5, 0.0, 0.25, 0.0], dtype=torch.float64, requires_grad=True)
    index_R = torch.tensor([0, 1, 0, 2])
    weights, total = combine_weights(scores_R, index_R, 4, normalize=True)
    assert weights.tolist() == pytest.approx([2 / 3, 0, 1 / 3, 0])
    assert total.tolist() == [1, 0, 0, 0]
    weights[0].backward()
    assert torch.isfinite(scores_R.grad).all()


@pytest.mark.parametrize("gap", [20.0, 43.0, 44.0, 80.0, 87.3, 95.0, 100.0, 200.0])
def test_normalised_weights_of_vanishing_scores_have_finite_gradients(gap: float) -> None:
    """A bound gives a token to an expert it scores 1e-42 or 0; weight 1 or 0, and no NaN in any gradient."""
    logits = torch.tensor([[gap, 0.0], [0.0, 1.0]], requires_grad=True)
    scores = logits.softmax(-1)[[0, 1], [1, 0]]
    weights, total = combine_weights(scores, torch.tensor([0, 1]), 2, normalize=True)
    assert weights.tolist() == total.tolist() == [float(scores[0] > 0), 1.0]
    (weights * torch.tensor([65536.0, 3.0])).sum().backward()  # the first is a usual scale of a float16 loss
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_totals_that_no_order_can_change() -> None:
    """As a GPU adds them up: each place has one number and zeros, of masked slots, which repeat a pair."""
    scores_TE = torch.rand(7, 5, dtype=torch.float64)
    expert, token = (scores_TE.T > 0.4).nonzero(as_tuple=True)
    scores = scores_TE[token, expert]
    expected = torch.zeros(7, dtype=torch.float64).index_add(0, token, scores)
    repeated = [torch.cat([x, x[:3]]) for x in (token, expert)]
    masked = torch.cat([scores, torch.zeros(3, dtype=torch.float64)])
    found = totals_of_experts(masked, repeated[0], 7, repeated[1], 5)
    torch.testing.assert_close(found, expected, atol=1e-15, rtol=1e-15)
    order = torch.randperm(len(masked))
    again = totals_of_experts(masked[order], repeated[0][order], 7, repeated[1][order], 5)
    assert torch.equal(found, again)
