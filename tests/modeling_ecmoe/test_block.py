"""The sparse block: outputs and every gradient by name against the float64 oracle, padding, and the back-ends."""

from collections.abc import Callable

import oracle
import pytest
import torch
from blocks import BATCH, LENGTH, assert_matches_oracle, build_block, random_hidden
from families import CORE
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from modeling_ecmoe import use_inference_routing
from modeling_ecmoe.block_ecmoe import EcMoeBlock

MakeBlock = Callable[..., EcMoeBlock]


@pytest.fixture
def make_block() -> MakeBlock:
    return build_block


VARIANTS = {
    "plain": {},
    "sigmoid": {"router_score_function": "sigmoid"},
    "normalised": {"normalize_combine_weights": True},
    "shared": {"shared_expert_intermediate_size": 6},
    "complement": {"shared_expert_intermediate_size": 6, "shared_expert_weighting": "complement"},
    "complement normalised": {
        "shared_expert_intermediate_size": 6,
        "shared_expert_weighting": "complement",
        "normalize_combine_weights": True,
    },
    "biases": {"mlp_bias": True, "shared_expert_intermediate_size": 6, "shared_expert_weighting": "complement"},
    "ungated": {"family": "Starcoder2", "use_bias": False, "shared_expert_intermediate_size": 6},
    "ungated with biases": {"family": "Starcoder2"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pool", ["batch", "sequence"])
def test_training_matches_oracle(make_block: MakeBlock, variant: str, pool: str) -> None:
    block = make_block(routing_pool=pool, **VARIANTS[variant]).train()
    assert_matches_oracle(block, random_hidden())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pool", ["batch", "sequence"])
@pytest.mark.parametrize("variant", ["plain", "complement normalised"])
def test_training_with_padding_matches_oracle(make_block: MakeBlock, side: str, pool: str, variant: str) -> None:
    block = make_block(routing_pool=pool, **VARIANTS[variant]).train()
    block.token_mask = padding_mask(side)
    assert_matches_oracle(block, random_hidden(), block.token_mask)


@pytest.mark.parametrize("variant", VARIANTS)
def test_threshold_rows_match_oracle(make_block: MakeBlock, variant: str) -> None:
    block = make_block(**VARIANTS[variant]).eval()
    assert_routes_are_mixed(block, random_hidden())
    assert_matches_oracle(block, random_hidden())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("least", "most"), [(0, 1), (1, 2), (2, 2), (0, 4)])
def test_threshold_slots_match_oracle(make_block: MakeBlock, variant: str, least: int, most: int) -> None:
    block = make_block(min_experts_per_token=least, max_experts_per_token=most, **VARIANTS[variant]).eval()
    assert_matches_oracle(block, random_hidden())


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_and_slots_agree(make_block: MakeBlock, variant: str) -> None:
    rows = make_block(**VARIANTS[variant]).eval()
    slots = make_block(max_experts_per_token=4, **VARIANTS[variant]).eval()
    torch.testing.assert_close(rows(random_hidden()), slots(random_hidden()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_route_leaves_the_shared_expert(make_block: MakeBlock, variant: str) -> None:
    block = make_block(**VARIANTS[variant]).eval()
    block.gate.threshold.fill_(2.0)
    output = assert_matches_oracle(block, random_hidden()) if block.shared_expert else block(random_hidden())
    shared = block.shared_expert(random_hidden()) if block.shared_expert else torch.zeros_like(output)
    torch.testing.assert_close(output, shared)


def assert_routes_are_mixed(block: EcMoeBlock, hidden_BSD: Tensor) -> None:
    routes_TE = block.routes(block.gate(hidden_BSD.flatten(0, 1))[1])
    assert 0.1 < routes_TE.double().mean() < 0.9


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fields", [{}, {"router_score_function": "sigmoid", "normalize_combine_weights": True}])
def test_one_expert_that_takes_all_is_the_dense_ffn(make_block: MakeBlock, training: bool, fields: dict) -> None:
    block = make_block(num_experts=1, capacity_factor=1, **fields).train(training)
    block.gate.threshold.zero_()
    dense = LlamaMLP(block.config).double()
    gate, up = block.experts.gate_up_proj.detach()[0].chunk(2)
    dense.load_state_dict(
        {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": block.experts.down_proj.detach()[0]}
    )
    torch.testing.assert_close(block(random_hidden()), dense(random_hidden()))
    assert_matches_oracle(block, random_hidden())


@pytest.mark.parametrize("training", [True, False])
def test_complement_of_equal_copies_is_the_dense_ffn(make_block: MakeBlock, training: bool) -> None:
    """Whatever the routes: y = sum of w * ffn(x) + (1 - sum of w) * ffn(x) = ffn(x)."""
    block = make_block(shared_expert_intermediate_size=10, shared_expert_weighting="complement").train(training)
    shared = block.shared_expert
    with torch.no_grad():
        block.experts.gate_up_proj.copy_(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
        block.experts.down_proj.copy_(shared.down_proj.weight)
    torch.testing.assert_close(block(random_hidden()), shared(random_hidden()))


def padding_mask(side: str) -> Tensor:
    """[2, 7] bool with 4 and 6 real tokens."""
    position_S = torch.arange(LENGTH)
    lengths_B1 = torch.tensor([[4], [6]])
    return position_S >= LENGTH - lengths_B1 if side == "left" else position_S < lengths_B1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_gives_what_the_unpadded_pool_gives(make_block: MakeBlock, side: str, variant: str) -> None:
    mask_BS = padding_mask(side)
    padded, unpadded = (make_block(**VARIANTS[variant]).train() for _ in range(2))
    padded_hidden = random_hidden()
    real_hidden = padded_hidden.detach()[mask_BS][None].requires_grad_()
    padded.token_mask = mask_BS
    padded_output, real_output = padded(padded_hidden), unpadded(real_hidden)
    torch.testing.assert_close(padded_output[mask_BS], real_output[0])
    padded_output[mask_BS].square().sum().backward()
    real_output.square().sum().backward()
    torch.testing.assert_close(padded_hidden.grad[mask_BS], real_hidden.grad[0])
    assert (padded_hidden.grad[~mask_BS] == 0).all()
    for (name, found), wanted in zip(padded.named_parameters(), unpadded.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, msg=name)
    torch.testing.assert_close(padded.gate.pending, unpadded.gate.pending)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pool", ["batch", "sequence"])
def test_padding_is_never_chosen(make_block: MakeBlock, side: str, pool: str) -> None:
    """Without a shared expert a padding token gets zeros, however high its scores."""
    block = make_block(routing_pool=pool, router_score_function="sigmoid").train()
    block.token_mask = padding_mask(side)
    hidden = random_hidden().detach()
    hidden[~block.token_mask] = 40 * block.gate.weight.detach().sum(0)
    scores_BSE = block.gate(hidden.flatten(0, 1))[1].view(BATCH, LENGTH, -1)
    assert scores_BSE[~block.token_mask].mean() > scores_BSE[block.token_mask].mean()
    output = block(hidden)
    assert (output[~block.token_mask] == 0).all()
    assert (output[block.token_mask] != 0).any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["train", "rows", "slots"])
def test_nan_in_padding_does_not_reach_real_tokens(make_block: MakeBlock, variant: str, mode: str) -> None:
    fields = VARIANTS[variant] | ({"max_experts_per_token": 2} if mode == "slots" else {})
    block = make_block(**fields).train(mode == "train")
    block.token_mask = padding_mask("left")
    clean, dirty = random_hidden(), random_hidden()
    with torch.no_grad():
        dirty[~block.token_mask] = torch.nan
    expected, output = block(clean)[block.token_mask], block(dirty)[block.token_mask]
    torch.testing.assert_close(output, expected)
    expected.sum().backward()
    output.sum().backward()
    torch.testing.assert_close(dirty.grad[block.token_mask], clean.grad[block.token_mask])
    assert torch.isfinite(block.gate.pending[:-1]).all()


def test_sequence_of_padding_alone_changes_nothing(make_block: MakeBlock) -> None:
    block = make_block(routing_pool="sequence").train()
    block.token_mask = torch.tensor([[True] * LENGTH, [False] * LENGTH])
    output = block(random_hidden())
    pending, tokens = block.gate.pending[:-1].clone(), block.gate.pending[-1].clone()
    block.gate.update_threshold()
    block.token_mask = None
    alone = block(random_hidden()[:1])
    torch.testing.assert_close(output[:1], alone)
    torch.testing.assert_close(pending, block.gate.pending[:-1])
    assert tokens == block.gate.pending[-1] == LENGTH


@pytest.mark.parametrize("wrong", ["scores", "routes", "weights", "experts"])
def test_oracle_tells_a_wrong_block(make_block: MakeBlock, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a block with one wrong step does not match."""
    block = make_block().train()
    if wrong == "scores":
        block.gate.score_function = "sigmoid"
    elif wrong == "routes":
        block.token_mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        block.token_mask[0, 0] = False
        choose = oracle.expert_choice
        monkeypatch.setattr(oracle, "expert_choice", lambda *args: choose(*args[:3]))
    elif wrong == "weights":
        monkeypatch.setattr("modeling_ecmoe.block_ecmoe.combine", unweighted)
    else:
        block.experts.act_fn = nn.GELU()
    with pytest.raises(AssertionError):
        assert_matches_oracle(block, random_hidden())


def unweighted(rows_RD: Tensor, weight_R: Tensor, index_R: Tensor, num_tokens: int, *_: object) -> Tensor:
    return weight_R.new_zeros(num_tokens, rows_RD.shape[-1]).index_add(0, index_R, rows_RD)


def test_override_routes_a_training_block_as_in_eval_mode(make_block: MakeBlock) -> None:
    block = make_block().eval()
    expected = block(random_hidden())
    block.train()
    with use_inference_routing(block):
        torch.testing.assert_close(block(random_hidden()), expected, rtol=0, atol=0)
    assert block.gate.pending[-1] == 0
    assert (block(random_hidden()) - expected).abs().max() > 1e-3
    assert block.gate.pending[-1] == BATCH * LENGTH


@pytest.mark.parametrize("bounds", [{}, {"max_experts_per_token": 2}, {"min_experts_per_token": 1}])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_back_ends_agree(make_routed_model: Callable, make_tokens: Callable, bounds: dict, score_function: str) -> None:
    model = make_routed_model("Qwen3", router_score_function=score_function, **bounds)
    ids = make_tokens(2, 11)
    logits, gradients = {}, {}
    for backend in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(backend)
        assert model.config._experts_implementation == backend
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        logits[backend] = output.logits.detach()
        gradients[backend] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for backend in ("batched_mm", "grouped_mm"):
        torch.testing.assert_close(logits[backend], logits["eager"], atol=1e-5, rtol=1e-5)
        for name, gradient in gradients["eager"].items():
            torch.testing.assert_close(
                gradients[backend][name], gradient, atol=1e-5, rtol=1e-4, msg=f"{backend} {name}"
            )


def test_back_end_is_entered(
    make_routed_model: Callable, make_tokens: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eval mode reaches the function of the chosen back-end, and not the eager body."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = make_routed_model("Llama")
    calls = []
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping,
        "grouped_mm",
        lambda *args, **kwargs: calls.append(1) or grouped(*args, **kwargs),
    )
    model(make_tokens(1, 9))
    assert len(calls) == model.config.num_hidden_layers


@pytest.mark.parametrize("family", CORE)
def test_default_back_end_is_grouped_mm(family: str, make_model: Callable, tmp_path: object) -> None:
    model = make_model(family)
    assert model.config._experts_implementation == "grouped_mm"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._experts_implementation == "grouped_mm"
    block = loaded.config.dense_ffn.layers_of(loaded)[0].mlp
    assert block.experts.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("widths", [{"intermediate_size": 46}, {"intermediate_size": 47, "max_experts_per_token": 2}])
def test_widths_that_grouped_mm_refuses_run(make_routed_model: Callable, make_tokens: Callable, widths: dict) -> None:
    model = make_routed_model("Llama", **widths)
    logits = model(make_tokens(2, 9)).logits
    model.set_experts_implementation("eager")
    torch.testing.assert_close(model(make_tokens(2, 9)).logits, logits, atol=1e-5, rtol=1e-5)
