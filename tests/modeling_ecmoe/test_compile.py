"""A compiled or checkpointed training step is the plain one: loss, every gradient, pending thresholds."""

from collections.abc import Callable, Iterator

import pytest
import torch
from checkpointing import recompute_layers
from families import SHARED_KEYS
from torch import Tensor
from transformers import PreTrainedModel

from modeling_ecmoe.calibration_ecmoe import sparse_blocks


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def training_step(model: PreTrainedModel, forward: Callable, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, gradients and what the routers wait to average, after one backward pass from nothing."""
    model.zero_grad()
    loss = forward(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    step = {"loss": loss.detach()} | {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters()}
    for name, block in sparse_blocks(model).items():
        gate = block.gate
        assert gate.has_pending
        step[f"{name} pending"] = gate.pending[:-1] / gate.pending[-1]
        gate.pending[:-1].zero_()
        gate.pending[-1].zero_()
        gate.has_pending = False
    return step


def assert_equal_steps(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=tolerance, msg=name)


def make_inputs(make_tokens: Callable, padded: bool) -> dict[str, Tensor]:
    inputs = {"input_ids": make_tokens(2, 9)}
    if padded:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, :4] = 0
    return inputs


FIELDS = {
    "plain": {},
    "shared, normalised, by sequence": {
        "shared_expert_intermediate_size": 16,
        "shared_expert_weighting": "complement",
        "normalize_combine_weights": True,
        "routing_pool": "sequence",
    },
}
REGIMES = {
    "bounded": {"min_experts_per_token": 1, "max_experts_per_token": 2, "normalize_combine_weights": True},
    "threshold": {"routing": "threshold", "threshold_after_steps": 1},
    "z-loss": {"router_z_loss_coef": 0.1},
}


def compiled_and_plain(
    model: PreTrainedModel, inputs: dict[str, Tensor], backend: str, checkpointing: bool | None = None
) -> None:
    """Compares the compiled step with the plain one, twice: the second call reuses the graph."""
    model.config.use_cache = False
    model.train()
    plain = training_step(model, model, inputs)
    if checkpointing is not None:
        recompute_layers(model, use_reentrant=checkpointing)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        assert_equal_steps(training_step(model, compiled, inputs), plain)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_step_is_the_plain_step(family: str, make_model: Callable, make_tokens: Callable) -> None:
    compiled_and_plain(make_model(family, num_hidden_layers=1), make_inputs(make_tokens, True), "aot_eager")


@pytest.mark.parametrize("regime", REGIMES)
def test_compiled_step_of_other_regimes(regime: str, make_model: Callable, make_tokens: Callable) -> None:
    model = make_model("Llama", num_hidden_layers=1, **REGIMES[regime])
    compiled_and_plain(model, make_inputs(make_tokens, True), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("regime", [regime for regime in REGIMES if regime != "z-loss"])
def test_compiled_checkpointed_step_of_other_regimes(
    checkpointing: bool, regime: str, make_model: Callable, make_tokens: Callable
) -> None:
    """Not the router losses: Transformers records outputs in a list, which a compiled checkpoint may not touch."""
    model = make_model("Llama", **REGIMES[regime])
    compiled_and_plain(model, make_inputs(make_tokens, True), "aot_eager", checkpointing)


def test_router_losses_refuse_reentrant_checkpointing(make_model: Callable, make_tokens: Callable) -> None:
    """The logits it records are those of the pass without gradients; a loss on them would train nothing, silently."""
    model = make_model("Qwen3", use_cache=False, router_z_loss_coef=0.1).train()
    recompute_layers(model, use_reentrant=True)
    ids = make_tokens(2, 9)
    with pytest.raises(ValueError, match="use_reentrant"):
        model(ids, labels=ids)


@pytest.mark.parametrize(
    ("regime", "use_reentrant"),
    [(regime, False) for regime in (*REGIMES, "token choice", "jitter")]
    + [(regime, True) for regime in ("bounded", "threshold", "jitter")],
)
def test_checkpointed_step_of_other_regimes(
    regime: str, use_reentrant: bool, make_model: Callable, make_tokens: Callable
) -> None:
    """With jitter both passes draw the same noise. Token choice keeps no threshold."""
    token_choice = {"routing": "token_choice", "inference_routing": "token_choice", "capacity_factor": 2}
    others = {"jitter": {"router_jitter_noise": 0.2}, "token choice": token_choice | {"router_aux_loss_coef": 0.1}}
    model = make_model("Qwen3", use_cache=False, **(REGIMES | others)[regime]).train()
    for block in sparse_blocks(model).values():
        block.gate.threshold_updates.fill_(2)
        block.gate.threshold.fill_(0.25)
    steps = []
    for checkpointed in (False, True):
        if checkpointed:
            recompute_layers(model, use_reentrant=use_reentrant)
        torch.manual_seed(5)
        steps.append(training_step(model, model, make_inputs(make_tokens, True)))
    for name, tensor in steps[1].items():
        if not name.endswith("pending"):
            assert torch.equal(tensor, steps[0][name]), name
        elif regime != "token choice":
            torch.testing.assert_close(tensor, steps[0][name], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_compiled_checkpointed_step_is_the_plain_step(
    use_reentrant: bool, make_model: Callable, make_tokens: Callable
) -> None:
    model = make_model("Llama", num_hidden_layers=1)
    compiled_and_plain(model, make_inputs(make_tokens, True), "aot_eager", use_reentrant)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fields", FIELDS)
def test_compiled_step_with_every_option(
    family: str, checkpointing: bool | None, padded: bool, fields: str, make_model: Callable, make_tokens: Callable
) -> None:
    model = make_model(family, **FIELDS[fields])
    compiled_and_plain(model, make_inputs(make_tokens, padded), "aot_eager", checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_inductor_step_is_the_plain_step(
    family: str, checkpointing: bool | None, make_model: Callable, make_tokens: Callable
) -> None:
    torch.use_deterministic_algorithms(False)
    compiled_and_plain(make_model(family), make_inputs(make_tokens, padded=True), "inductor", checkpointing)


def test_compiled_optimizer_steps_move_the_thresholds(make_model: Callable, make_tokens: Callable) -> None:
    """Two steps, so that the hook after an optimiser step and the next forward pass meet."""
    found = []
    for is_compiled in (False, True):
        model = make_model("Llama", num_hidden_layers=1, use_cache=False).train()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if is_compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for seed in range(2):
            ids = make_tokens(2, 9, seed=seed)
            forward(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(block.gate.threshold_updates == 2 for block in sparse_blocks(model).values())
        found.append({name: block.gate.threshold.clone() for name, block in sparse_blocks(model).items()})
    for name, threshold in found[0].items():
        torch.testing.assert_close(found[1][name], threshold, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bounds", [{}, {"min_experts_per_token": 1, "max_experts_per_token": 2}])
def test_compiled_inference_is_plain_inference(
    bounds: dict, make_routed_model: Callable, make_tokens: Callable
) -> None:
    model = make_routed_model("Llama", use_cache=False, num_hidden_layers=1, **bounds)
    ids = make_tokens(2, 9)
    with torch.no_grad():
        plain = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("padded", [False, True])
def test_checkpointed_step_is_exactly_the_plain_step(
    family: str, use_reentrant: bool, fields: str, padded: bool, make_model: Callable, make_tokens: Callable
) -> None:
    model = make_model(family, use_cache=False, **FIELDS[fields]).train()
    inputs = make_inputs(make_tokens, padded)
    plain = training_step(model, model, inputs)
    recompute_layers(model, use_reentrant=use_reentrant)
    if use_reentrant and family in SHARED_KEYS:
        with pytest.raises(ValueError, match="use_reentrant=True: num_kv_shared_layers=1 "):
            model(**inputs)
        return
    checkpointed = training_step(model, model, inputs)
    for name, tensor in checkpointed.items():
        if not name.endswith("pending"):
            assert torch.equal(tensor, plain[name]), name
    assert_equal_steps(checkpointed, plain, tolerance=1e-7)


def test_a_different_step_is_told_apart(make_model: Callable, make_tokens: Callable) -> None:
    """Negative control: the comparison sees a padding mask that does not reach the routers."""
    model = make_model("Llama").train()
    inputs = make_inputs(make_tokens, padded=True)
    plain = training_step(model, model, inputs)
    everything = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    unmasked = training_step(model, model, inputs | {"token_mask": everything})
    with pytest.raises(AssertionError):
        assert_equal_steps(unmasked, plain)
