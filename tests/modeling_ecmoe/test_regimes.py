"""The other ways to route - token choice, threshold training, bounds, jitter - and the router's losses: the oracle."""

import math
from collections.abc import Callable

import hypothesis
import oracle
import pytest
import torch
from blocks import (
    BATCH,
    LENGTH,
    TOLERANCE,
    assert_matches_oracle,
    build_block,
    oracle_pairs,
    parameters_of,
    random_hidden,
)
from families import CORE
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from modeling_ecmoe import use_inference_routing
from modeling_ecmoe.calibration_ecmoe import sparse_blocks
from modeling_ecmoe.routing_ecmoe import choose_by_threshold, choose_experts, choose_tokens

TOKEN_CHOICE = {"routing": "token_choice", "inference_routing": "token_choice", "capacity_factor": 2}
THRESHOLD = {"routing": "threshold"}
OPTIONS = {
    "plain": {},
    "sigmoid": {"router_score_function": "sigmoid"},
    "normalised": {"normalize_combine_weights": True},
    "complement normalised": {
        "shared_expert_intermediate_size": 6,
        "shared_expert_weighting": "complement",
        "normalize_combine_weights": True,
    },
}
BOUNDS = {
    "at most 2": {"max_experts_per_token": 2},
    "at least 1": {"min_experts_per_token": 1},
    "1 to 2": {"min_experts_per_token": 1, "max_experts_per_token": 2},
    "balanced": {"min_experts_per_token": 2, "max_experts_per_token": 2, "capacity_factor": 2},
}


def padding(kind: str | None) -> Tensor | None:
    """[2, 7] bool with 4 and 6 real tokens, or none at all in the second row."""
    position_S = torch.arange(LENGTH)
    lengths_B1 = torch.tensor([[4], [0 if kind == "empty row" else 6]])
    if kind is None:
        return None
    return position_S >= LENGTH - lengths_B1 if kind == "left" else position_S < lengths_B1


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("capacity", [None, 1.0, 1.25])
@pytest.mark.parametrize("mask", [None, "left", "empty row"])
def test_token_choice_matches_oracle(options: str, capacity: float | None, mask: str | None) -> None:
    block = build_block(token_choice_capacity_factor=capacity, **TOKEN_CHOICE, **OPTIONS[options]).train()
    block.token_mask = padding(mask)
    assert_matches_oracle(block, random_hidden(), block.token_mask)
    assert block.gate.pending[-1] == 0  # it learns no threshold


def test_token_choice_drops_by_hand() -> None:
    """Three tokens, two experts, two choices: room for ceil(0.6 * 2 * 3 / 2) = 2, first choices before second ones."""
    scores_TE = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    expert_TK, is_kept_TK = choose_experts(scores_TE, 2, 0.6, None)
    assert expert_TK.tolist() == [[0, 1], [1, 0], [0, 1]]
    # Expert 0: tokens 0 and 2 by first choice, so that 1 finds it full. Expert 1: token 1, then 0, and 2 is dropped.
    assert is_kept_TK.tolist() == [[True, True], [True, False], [True, False]]
    _, is_kept_TK = choose_experts(scores_TE, 2, 0.6, torch.tensor([False, True, True]))
    assert is_kept_TK.tolist() == [[False, False], [True, True], [True, True]]  # of two tokens the room is still 2
    _, is_kept_TK = choose_experts(scores_TE, 2, None, None)
    assert is_kept_TK.all()


@pytest.mark.parametrize("capacity", [1.0, 1.25])
def test_token_choice_drops_in_training_alone(capacity: float) -> None:
    dropping = build_block(token_choice_capacity_factor=capacity, **TOKEN_CHOICE)
    dropless = build_block(**TOKEN_CHOICE)
    hidden = random_hidden(4, 9) + 1  # a common direction, so that some experts are in demand
    torch.testing.assert_close(dropping.eval()(hidden), dropless.eval()(hidden), rtol=0, atol=0)
    torch.testing.assert_close(dropless.train()(hidden), dropless.eval()(hidden), rtol=0, atol=0)
    assert (dropping.train()(hidden) - dropless(hidden)).abs().max() > 1e-3
    with use_inference_routing(dropping):
        torch.testing.assert_close(dropping(hidden), dropless(hidden), rtol=0, atol=0)


WARM_UP = {"never": (0, 0), "at once": (0, 1), "not yet": (5, 4), "just now": (5, 5)}  # after steps, steps done


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("warm_up", WARM_UP)
@pytest.mark.parametrize("mask", [None, "left", "empty row"])
def test_threshold_training_matches_oracle(options: str, warm_up: str, mask: str | None) -> None:
    after, done = WARM_UP[warm_up]
    block = build_block(threshold_after_steps=after, **THRESHOLD, **OPTIONS[options]).train()
    block.gate.threshold_updates.fill_(done)
    block.token_mask = padding(mask)
    before = block.gate.threshold.clone()
    assert_matches_oracle(block, random_hidden(), block.token_mask)
    # What the average is to follow is the threshold of C tokens, warm or not.
    scores_TE = oracle.scores(random_hidden().flatten(0, 1), block.gate.weight, block.config.router_score_function)
    is_real = None if block.token_mask is None else block.token_mask.flatten().tolist()
    expected = oracle.choice_threshold(scores_TE, 1.5, [list(range(BATCH * LENGTH))], is_real)
    found = block.gate.pending[:-1] / block.gate.pending[-1]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-6)
    assert torch.equal(block.gate.threshold, before)


@pytest.mark.parametrize("clamp", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("level", "side"), [(-1.0, "above"), (2.0, "below")])
def test_threshold_training_clamps_the_load(clamp: float, level: float, side: str) -> None:
    """A threshold that all scores, or none, exceed: from (1 - g) C to (1 + g) C tokens, here C = 6 of 14."""
    block = build_block(threshold_capacity_clamp=clamp, **THRESHOLD).train()
    block.gate.threshold_updates.fill_(1)
    block.gate.threshold.fill_(level)
    scores_TE = block.gate(random_hidden().flatten(0, 1))[1]
    pairs = oracle_pairs(block, scores_TE, BATCH, LENGTH)
    taken = 6 + (1 if side == "above" else -1) * round(clamp * 6)
    assert [sum(expert == e for e, _ in pairs) for expert in range(4)] == [taken] * 4
    if taken:
        assert_matches_oracle(block, random_hidden())
    else:
        assert (block(random_hidden()) == 0).all()


def test_warm_thresholds_change_the_training_routes() -> None:
    """Negative control: before and after the warm-up a block routes differently."""
    block = build_block(threshold_after_steps=3, **THRESHOLD).train()
    block.gate.threshold_updates.fill_(2)
    cold = block(random_hidden())
    torch.testing.assert_close(cold, build_block().train()(random_hidden()), **TOLERANCE)
    block.gate.threshold_updates.fill_(3)
    assert (block(random_hidden()) - cold).abs().max() > 1e-3


CLAMPS = [(0.5, 7), (0.1, 10), (0.25, 12), (0.9, 10), (0.7, 30), (0.04, 100)]
ROUNDED_DOWN = [(0.3, 90), (0.04, 225)]


@pytest.mark.parametrize(
    ("clamp", "share"),
    CLAMPS + ROUNDED_DOWN,
)
def test_clamp_is_taken_as_the_decimal_that_was_written(clamp: float, share: int) -> None:
    """1.3 * 90 is 117, as the capacity factor is exact, too."""
    scores_TE = torch.rand(4 * share, 2, generator=torch.Generator().manual_seed(0))
    for level, is_real in ((-1.0, None), (2.0, None), (-1.0, [True] * (4 * share))):
        mask_PN = None if is_real is None else torch.tensor([is_real])
        threshold_E = torch.full((2,), level)
        choice = choose_by_threshold(scores_TE[None], 0.5, threshold_E, torch.tensor(True), clamp, mask_PN)
        pairs = oracle.threshold_training(scores_TE, 0.5, [level] * 2, clamp, is_warm=True)
        assert choice.is_chosen.sum(1).tolist() == [len(pairs) // 2] * 2


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("pool", ["batch", "sequence"])
@pytest.mark.parametrize("mask", [None, "left", "empty row"])
def test_bounded_choice_matches_oracle(options: str, bounds: str, pool: str, mask: str | None) -> None:
    block = build_block(routing_pool=pool, **BOUNDS[bounds], **OPTIONS[options]).train()
    block.token_mask = padding(mask)
    assert_matches_oracle(block, random_hidden(), block.token_mask)


@pytest.mark.parametrize("fields", [{}, THRESHOLD, TOKEN_CHOICE, BOUNDS["1 to 2"]])
def test_jitter_is_seeded_noise_on_the_routers_input(fields: dict) -> None:
    block = build_block(router_jitter_noise=0.2, **fields).train()
    block.gate.threshold_updates.fill_(1)
    calm = build_block(**fields).train()
    calm.gate.threshold_updates.fill_(1)
    torch.manual_seed(7)
    noise_TD = torch.empty(BATCH * LENGTH, 12, dtype=torch.float64).uniform_(0.8, 1.2)
    hidden = random_hidden()
    scores_TE = oracle.scores(hidden.flatten(0, 1) * noise_TD, block.gate.weight, "softmax")
    pairs = oracle_pairs(block, scores_TE, BATCH, LENGTH)
    torch.manual_seed(7)
    output = assert_matches_oracle(block, hidden, noise_TD=noise_TD, pairs=pairs)
    torch.manual_seed(7)
    assert torch.equal(block(hidden), output)
    assert (block(hidden) - output).abs().max() > 1e-6  # the next noise is another one
    assert (calm(hidden) - output).abs().max() > 1e-6
    torch.testing.assert_close(block.eval()(hidden), calm.eval()(hidden), rtol=0, atol=0)
    block.train()
    with use_inference_routing(block):
        torch.testing.assert_close(block(hidden), calm(hidden), rtol=0, atol=0)


REGIMES = {
    "expert choice": {},
    "by sequence": {"routing_pool": "sequence"},
    "threshold": THRESHOLD,
    "token choice": {**TOKEN_CHOICE, "capacity_factor": 1},
    "token choice, dropping": {**TOKEN_CHOICE, "capacity_factor": 1, "token_choice_capacity_factor": 1.0},
    "bounded": {"min_experts_per_token": 1},
    "balanced": {"min_experts_per_token": 1, "max_experts_per_token": 1, "capacity_factor": 1},
}


@hypothesis.given(
    regime=st.sampled_from(sorted(REGIMES)),
    score_function=st.sampled_from(["softmax", "sigmoid"]),
    normalize=st.booleans(),
    experts=st.integers(1, 5),
    factor=st.integers(100, 500),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    masking=st.sampled_from(["none", "random", "all"]),
    ties=st.booleans(),
    is_warm=st.booleans(),
    seed=st.integers(0, 2**31),
)
@hypothesis.settings(max_examples=120, deadline=None)
def test_generated_cases_match_oracle(
    regime: str,
    score_function: str,
    normalize: bool,
    experts: int,
    factor: int,
    shape: tuple[int, int],
    masking: str,
    ties: bool,
    is_warm: bool,
    seed: int,
) -> None:
    """Among them fewer tokens than experts, one expert, experts that take all, padding alone, and equal tokens."""
    fields = {"capacity_factor": min(factor / 100, experts)} | REGIMES[regime]
    block = build_block(
        hidden_size=4,
        intermediate_size=3,
        num_experts=experts,
        router_score_function=score_function,
        normalize_combine_weights=normalize,
        **fields,
    ).train()
    block.gate.threshold_updates.fill_(int(is_warm))
    hidden = random_hidden(*shape, hidden_size=4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    real_BS = torch.ones(shape, dtype=torch.bool)
    if masking != "none":
        real_BS = torch.rand(shape, generator=generator) < (0.0 if masking == "all" else 0.7)
        block.token_mask = real_BS
    pairs = None
    if ties:  # which of the equal tokens is taken is free, and then everything else follows from it
        with torch.no_grad():
            hidden[:, shape[1] // 2 :] = hidden[:1, :1].clone()
        pairs = chosen_pairs(block, hidden)
        assert_as_good(block, hidden, pairs)
    assert_matches_oracle(block, hidden, real_BS, pairs=pairs)


def chosen_pairs(block: nn.Module, hidden_BSD: Tensor) -> oracle.Pairs:
    """The pairs that the block chooses in training, by its own pure functions."""
    config = block.config
    batch, length = hidden_BSD.shape[:2]
    scores_TE = block.gate(hidden_BSD.detach().flatten(0, 1))[1]
    mask_T = None if block.token_mask is None else block.token_mask.flatten()
    if config.bounds_experts_per_token:
        return oracle_pairs(block, scores_TE, batch, length)
    if config.routing == "token_choice":
        expert_TK, is_kept_TK = choose_experts(
            scores_TE, int(config.capacity_factor), config.token_choice_capacity_factor, mask_T
        )
        return {(int(expert_TK[token, slot]), int(token)) for token, slot in is_kept_TK.nonzero()}
    pools = batch if config.routing_pool == "sequence" else 1
    mask_PN = None if mask_T is None else mask_T.view(pools, -1)
    scores_PNE = scores_TE.view(pools, -1, config.num_experts)
    if config.routing == "threshold":
        is_warm = block.gate.threshold_updates >= 1
        clamp = config.threshold_capacity_clamp
        choice = choose_by_threshold(scores_PNE, config.capacity_factor, block.gate.threshold, is_warm, clamp, mask_PN)
    else:
        choice = choose_tokens(scores_PNE, config.capacity_factor, mask_PN)
    return {(int(e), int(choice.token_index[e, slot])) for e, slot in choice.is_chosen.nonzero()}


def assert_as_good(block: nn.Module, hidden_BSD: Tensor, pairs: oracle.Pairs) -> None:
    """As many pairs as the oracle chooses, of the same scores; of padding none."""
    scores_TE = oracle.scores(hidden_BSD.detach().flatten(0, 1), block.gate.weight.detach(), block.gate.score_function)
    expected = oracle_pairs(block, scores_TE, *hidden_BSD.shape[:2])
    found, wanted = (sorted(float(scores_TE[token, expert]) for expert, token in each) for each in (pairs, expected))
    assert found == pytest.approx(wanted)
    if block.token_mask is not None:
        assert all(block.token_mask.flatten()[token] for _, token in pairs)


@pytest.mark.parametrize("wrong", ["capacity", "clamp", "warm-up", "jitter", "choices"])
def test_oracle_tells_a_wrong_regime(wrong: str) -> None:
    """Negative control: a block with one wrong setting does not match."""
    fields = TOKEN_CHOICE if wrong in ("capacity", "choices") else THRESHOLD
    block = build_block(**fields).train()
    block.gate.threshold_updates.fill_(1)
    block.gate.threshold.fill_(2.0)
    hidden = random_hidden()
    scores_TE = block.gate(hidden.flatten(0, 1))[1]
    pairs = oracle_pairs(block, scores_TE, BATCH, LENGTH)
    if wrong == "capacity":
        block.config.token_choice_capacity_factor = 0.5
    elif wrong == "choices":
        block.config.capacity_factor = 1
    elif wrong == "clamp":
        block.config.threshold_capacity_clamp = 0.2
    elif wrong == "warm-up":
        block.config.threshold_after_steps = 2
    else:
        block.gate.jitter = 0.3
    with pytest.raises(AssertionError):
        assert_matches_oracle(block, hidden, pairs=pairs)
    assert set(parameters_of(block)) == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}


LOSSES = {
    "z": {"router_z_loss_coef": 0.1},
    "balance": {"router_aux_loss_coef": 0.3, **TOKEN_CHOICE},
    "both": {"router_z_loss_coef": 0.1, "router_aux_loss_coef": 0.3, **TOKEN_CHOICE},
    "z of one dense layer": {"router_z_loss_coef": 0.1, "mlp_layer_types": ["dense", "sparse"]},
    "both, sigmoid": {
        "router_z_loss_coef": 0.1,
        "router_aux_loss_coef": 0.3,
        "router_score_function": "sigmoid",
        **TOKEN_CHOICE,
    },
}


def cross_entropy(logits: Tensor, labels: Tensor, items: int | None = None) -> Tensor:
    total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / (int((labels[:, 1:] != -100).sum()) if items is None else items)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("padded", [False, True])
def test_router_losses_join_the_loss(
    family: str, losses: str, padded: bool, make_model: Callable, make_tokens: Callable
) -> None:
    model = make_model(family, **LOSSES[losses]).double().train()
    ids = make_tokens(2, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 5:] = 0  # not left: Transformers' eager attention gives fully masked rows NaN in float64
    labels = ids.masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    is_real = mask.flatten().bool().tolist()
    assert len(output.router_logits) == model.config.mlp_layer_types.count("sparse")
    z_loss = oracle.z_loss(output.router_logits, is_real)
    expected = model.config.router_z_loss_coef * z_loss
    if losses in ("z", "z of one dense layer"):
        assert output.aux_loss is None
    else:
        balance = oracle.balance_loss(output.router_logits, 2, is_real)
        torch.testing.assert_close(output.aux_loss.double(), balance, rtol=1e-6, atol=1e-6)
        of_layers = [load_balancing_loss_func((logits,), 4, 2, mask) for logits in output.router_logits]
        torch.testing.assert_close(output.aux_loss, torch.stack(of_layers).mean(), rtol=0, atol=0)
        expected = expected + 0.3 * balance
    added = output.loss - cross_entropy(output.logits, labels)
    assert expected > 0.01
    torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(
        output.loss, model.config.dense_ffn.layers_of(model)[1].mlp.gate.weight, retain_graph=True
    )[0]
    wanted = torch.autograd.grad(
        cross_entropy(output.logits, labels) + expected, model.config.dense_ffn.layers_of(model)[1].mlp.gate.weight
    )[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("losses", ["z", "both"])
def test_router_losses_stay_out_of_the_rest(losses: str, make_model: Callable, make_tokens: Callable) -> None:
    """Not in eval mode, not without labels; without the coefficients the loss is the cross-entropy alone."""
    model = make_model("Llama", **LOSSES[losses])
    ids = make_tokens(2, 9)
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits, ids))
    assert output.aux_loss is None
    assert output.router_logits is None
    model.train()
    assert model(ids).loss is None
    output = model(ids, labels=ids)
    assert output.loss > cross_entropy(output.logits, ids) + 0.01
    assert output.router_logits is None  # they were not asked for
    model.config.router_z_loss_coef = model.config.router_aux_loss_coef = 0.0
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits, ids))


@pytest.mark.parametrize("first_label", ["masked", "kept"])
@pytest.mark.parametrize("losses", ["z", "both"])
def test_micro_batches_add_up(first_label: str, losses: str, make_model: Callable, make_tokens: Callable) -> None:
    """With the step's items as the Trainer counts them: labels that are predicted, the first of a row is not."""
    model = make_model("Llama", num_hidden_layers=1, **LOSSES[losses]).double().train()
    whole = make_tokens(6, 9)
    labels = whole.clone()
    if first_label == "masked":
        labels[:, 0] = -100
    items = (labels[:, 1:] != -100).sum()
    parts = [slice(0, 2), slice(2, 6)]

    def added(rows: slice, items: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        given = {} if items is None else {"num_items_in_batch": items}
        output = model(whole[rows], labels=labels[rows], output_router_logits=True, **given)
        return output.loss - cross_entropy(output.logits, labels[rows], items), output.router_logits

    config, of_float32 = model.config, {"rtol": 1e-5, "atol": 5e-6}  # Transformers casts logits for its loss
    total, expected = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for rows, share in zip(parts, (1 / 3, 2 / 3), strict=True):
        loss, logits = added(rows, items)
        total = total + loss
        expected = expected + share * config.router_z_loss_coef * oracle.z_loss(logits)
        expected = expected + share * config.router_aux_loss_coef * oracle.balance_loss(logits, 2)
    torch.testing.assert_close(total, expected, **of_float32)
    if losses == "z":  # a mean over tokens, so that the parts are the whole; the balance of parts is another
        torch.testing.assert_close(total, added(slice(0, 6), None)[0], **of_float32)
    torch.testing.assert_close(added(slice(0, 6), items)[0], added(slice(0, 6), None)[0], **of_float32)


@torch.no_grad()
def test_token_choice_is_causal_and_batch_invariant(family: str, make_model: Callable, make_tokens: Callable) -> None:
    model = make_model(family, token_choice_capacity_factor=1.0, **TOKEN_CHOICE)
    ids = make_tokens(3, 12)
    logits = model(ids).logits
    other = ids.clone()
    other[:, 7:] = make_tokens(3, 5, seed=8)
    changed = (model(other).logits - logits).abs()
    tolerance = 1e-5 * logits.abs().max()
    assert changed[:, :7].max() <= tolerance
    assert changed[:, 7:].max() > 0.1
    for row in range(3):
        assert (model(ids[row : row + 1]).logits - logits[row : row + 1]).abs().max() <= tolerance
    padded = torch.cat([torch.zeros(3, 4, dtype=ids.dtype), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones_like(ids)], dim=1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with_padding = model(padded, attention_mask=mask, position_ids=position_ids).logits[:, 4:]
    assert (with_padding - logits).abs().max() <= tolerance
    model.train()
    with use_inference_routing(model):
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=0)
    dropped = (model(ids).logits - logits).abs()
    assert dropped.max() > 1e-3  # negative control: in training the batch decides who is dropped


def pending_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: block.gate.pending.clone() for name, block in sparse_blocks(model).items()}


@pytest.mark.parametrize("fields", [THRESHOLD, TOKEN_CHOICE, BOUNDS["1 to 2"]])
def test_real_tokens_of_a_padded_step_are_the_unpadded_step(
    fields: dict, make_model: Callable, make_tokens: Callable
) -> None:
    """Also of the whole model, two layers deep, in training."""
    ids = make_tokens(2, 7)
    found = []
    for extra in (0, 5):
        model = make_model("Llama", **fields).double().train()
        padded = torch.cat([torch.zeros(2, extra, dtype=ids.dtype), ids], dim=1)
        mask = torch.cat([torch.zeros(2, extra, dtype=torch.long), torch.ones_like(ids)], dim=1)
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(padded, attention_mask=mask, position_ids=position_ids).logits[:, extra:]
        logits.square().mean().backward()
        found.append((logits, pending_of(model), {n: p.grad for n, p in model.named_parameters()}))
    (logits, pending, gradients), (padded_logits, padded_pending, padded_gradients) = found
    torch.testing.assert_close(padded_logits, logits, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient, rtol=1e-7, atol=1e-9, msg=name)
    for name, value in pending.items():
        torch.testing.assert_close(padded_pending[name], value, msg=name)


def test_losses_of_the_oracle_by_hand() -> None:
    logits_TE = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], dtype=torch.float64)
    # log(3 + 1) and log(1 + 1); scores 3/4, 1/4 and 1/2, 1/2, both tokens choose expert 0 (a tie goes to the first).
    assert float(oracle.z_loss([logits_TE])) == pytest.approx((math.log(4) ** 2 + math.log(2) ** 2) / 2)
    assert float(oracle.z_loss([logits_TE], [True, False])) == pytest.approx(math.log(4) ** 2)
    assert float(oracle.balance_loss([logits_TE], 1)) == pytest.approx(2 * 1 * (3 / 4 + 1 / 2) / 2)
