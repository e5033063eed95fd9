"""Bounds that hold in groups of experts: shards of one FFN are a group each, and a token has as many of each."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_ecmoe import calibrate_thresholds, routing_report, sparse_blocks
from modeling_ecmoe.bounded_ecmoe import balanced_thresholds, choose_tokens_within_bounds
from modeling_ecmoe.routing_ecmoe import choose_experts, in_groups, out_of_groups, router_scores, routes_by_threshold

T, E = 96, 12
# Groups, capacity factor, bounds.
CASES = [(2, 2, 2, None), (2, 2, 2, 2), (3, 3, 3, None), (3, 5, 3, 9), (4, 4, 4, 8), (2, 3, 0, 4)]


@pytest.fixture(name="scores_TE")
def scores() -> Tensor:
    torch.manual_seed(0)
    return router_scores(2 * torch.randn(T, E), "softmax")


def test_in_and_out_of_groups(scores_TE: Tensor) -> None:
    grouped = in_groups(scores_TE, 3)
    assert torch.equal(grouped[:, 1], scores_TE[:, 1::3])
    assert torch.equal(out_of_groups(grouped), scores_TE)


@pytest.mark.parametrize(("groups", "factor", "least", "most"), CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_groups_choose_by_themselves(
    scores_TE: Tensor, groups: int, factor: int, least: int, most: int | None, padded: bool
) -> None:
    """What each group chooses is what it would choose alone; its tokens keep the bounds there."""
    real_PN = (torch.arange(T) < T - 12 * padded)[None] if padded else None
    choice = choose_tokens_within_bounds(scores_TE[None], factor, least, most, real_PN, num_groups=groups)
    count_TE = torch.zeros(T, E, dtype=torch.long).scatter_add(0, choice.token_index.T, choice.is_chosen.T.long())
    each = (least // groups, None if most is None else most // groups)
    for group in range(groups):
        part_PNE, share = scores_TE[None, :, group::groups].contiguous(), Fraction(factor, groups)
        alone = choose_tokens_within_bounds(part_PNE, share, *each, real_PN)  # type: ignore[arg-type]
        assert torch.equal(choice.token_index[group::groups], alone.token_index)
        assert torch.equal(choice.is_chosen[group::groups], alone.is_chosen)
        assert torch.equal(choice.threshold[group::groups], alone.threshold)
        of_group = count_TE[: T - 12 * padded, group::groups].sum(1)
        assert (of_group >= each[0]).all()
        assert most is None or (of_group <= each[1]).all()


@pytest.mark.parametrize(("groups", "factor", "least", "most"), CASES)
def test_routes_of_groups(scores_TE: Tensor, groups: int, factor: int, least: int, most: int | None) -> None:
    """Inference: the bounds in each group, each expert near its share, and every row reads itself alone."""
    threshold_E = balanced_thresholds(scores_TE, factor, least, most or E, groups)
    routes_TE = routes_by_threshold(scores_TE, threshold_E, least, most, groups)
    of_groups = in_groups(routes_TE, groups).sum(-1)
    assert (of_groups >= least // groups).all()
    assert most is None or (of_groups <= most // groups).all()
    assert (routes_TE.sum(0) - factor * T / E).abs().max() <= 3
    alone = [routes_by_threshold(row, threshold_E, least, most, groups) for row in scores_TE.split(1)]
    assert torch.equal(torch.cat(alone), routes_TE)


def test_a_third_of_a_decimal_is_exact() -> None:
    """5 / 3 as a float is above five thirds, and would round 20 tokens of each expert up to 21."""
    scores_TE = router_scores(torch.randn(48, 12, generator=torch.Generator().manual_seed(0)), "softmax")
    choice = choose_tokens_within_bounds(scores_TE[None], 5, 3, None, num_groups=3)
    assert choice.is_chosen.sum(1).tolist() == [20] * 12


def test_token_choice_of_groups(scores_TE: Tensor) -> None:
    expert_TK, is_kept_TK = choose_experts(scores_TE, 6, None, None, num_groups=3)
    assert is_kept_TK.all()
    assert torch.equal(expert_TK % 3, torch.tensor([0, 1, 2, 0, 1, 2]).expand(T, 6))  # the best of each first
    for group in range(3):
        best_TK = scores_TE[:, group::3].topk(2).indices * 3 + group
        assert torch.equal(expert_TK[:, group::3], best_TK)


REFUSED = {
    "num_expert_groups=3 must be at least 1 and divide num_experts=8": {"num_expert_groups": 3},
    "num_expert_groups=0 must be": {"num_expert_groups": 0},
    "min_experts_per_token=1 must be a multiple of num_expert_groups=2": {"min_experts_per_token": 1},
    "max_experts_per_token=3 must be a multiple": {"max_experts_per_token": 3},
    "capacity_factor=1 must be a multiple": {
        "capacity_factor": 1,
        "routing": "token_choice",
        "inference_routing": "token_choice",
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_divide_is_refused(make_config, message: str) -> None:
    with pytest.raises(Exception, match=message):
        make_config("Llama", **({"num_expert_groups": 2, "capacity_factor": 2, "num_experts": 8} | REFUSED[message]))


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_a_model_of_groups(make_model, make_tokens, routing: str) -> None:
    """Training, calibration and inference give every token one expert of each group, whatever the router has become."""
    fields = {"min_experts_per_token": 2} if routing == "expert_choice" else {"inference_routing": "token_choice"}
    model: PreTrainedModel = make_model(
        "Llama", num_experts=8, num_expert_groups=2, capacity_factor=2, routing=routing, **fields
    )
    ids = make_tokens(4, 32)
    seen: list[Tensor] = []
    for block in sparse_blocks(model).values():
        choose = block.choose_in_pools

        def watched(scores_PNE: Tensor, *arguments: object, choose=choose, **more: object) -> object:
            choice = choose(scores_PNE, *arguments, **more)
            count_TE = torch.zeros(scores_PNE.shape[1:], dtype=torch.long)
            seen.append(count_TE.scatter_add(0, choice.token_index.T, choice.is_chosen.T.long()))
            return choice

        block.choose_in_pools = watched
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all((in_groups(count_TE, 2).sum(-1) == 1).all() for count_TE in seen)
    assert len(seen) == (0 if routing == "token_choice" else len(sparse_blocks(model)))
    model.eval()
    if routing == "expert_choice":
        calibrate_thresholds(model, [{"input_ids": ids}])
    report = routing_report(model, [{"input_ids": ids}])
    assert report["summary"]["experts_per_token"] == 2
    for block in sparse_blocks(model).values():
        scores_TE = router_scores(torch.randn(50, 8), "softmax")
        of_groups = in_groups(block.routes(scores_TE), 2).sum(-1)
        assert (of_groups >= 1).all() and (routing == "expert_choice" or (of_groups == 1).all())
