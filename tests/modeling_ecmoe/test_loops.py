"""Training loops that are not the plain one: skipped steps, optimisers inside the backward pass, Trainer's losses,
mixed precision that casts buffers. And passes that share a model or a cache."""

import threading
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_ecmoe import sparse_blocks
from modeling_ecmoe.router_ecmoe import EcMoeRouter


def gates(model: torch.nn.Module) -> list[EcMoeRouter]:
    return [block.gate for block in sparse_blocks(model).values()]


def thresholds(model: torch.nn.Module) -> list[Tensor]:
    return [gate.threshold.clone() for gate in gates(model)]


@pytest.mark.parametrize("skips_the_step", [True, False])
def test_a_micro_batch_that_overflows_leaves_no_trace(
    skips_the_step: bool, make_model: Callable, make_tokens: Callable
) -> None:
    """As under a GradScaler, whose first steps overflow: the thresholds are those of the other micro-batches."""
    model, other = (make_model("Llama").train() for _ in range(2))
    optimizers = [torch.optim.SGD(either.parameters(), lr=0.0) for either in (model, other)]
    good, bad = make_tokens(2, 9, seed=1), make_tokens(2, 9, seed=2)
    handle = model.model.layers[0].self_attn.register_forward_hook(
        lambda _m, _i, outputs: (outputs[0] * torch.inf, *outputs[1:])
    )
    loss = model(bad, labels=bad).loss
    handle.remove()
    assert loss.isnan()
    if not skips_the_step:
        optimizers[0].step()
        assert all((gate.threshold == 0).all() and gate.threshold_updates == 0 for gate in gates(model))
    for either, optimizer in zip((model, other), optimizers, strict=True):
        either(good, labels=good).loss.backward()
        optimizer.step()
    for found, expected in zip(thresholds(model), thresholds(other), strict=True):
        assert torch.equal(found, expected) and found.all()
    assert all(gate.threshold_updates == 1 for gate in gates(model))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_an_optimiser_inside_the_backward_pass(
    checkpointing: bool, make_routed_model: Callable, make_tokens: Callable
) -> None:
    """One optimiser per parameter, stepped as its gradient arrives: recomputed layers route as they did before."""
    model, other = (make_routed_model("Llama", routing="threshold", threshold_decay=0.5).train() for _ in range(2))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.0) for parameter in model.parameters()}
    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(lambda parameter: optimizers[parameter].step())
    before, ids = thresholds(model), make_tokens(4, 32)
    for either in (model, other):
        either(ids, labels=ids).loss.backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    torch.optim.SGD(other.parameters(), lr=0.0).step()
    for found, expected, old in zip(thresholds(model), thresholds(other), before, strict=True):
        torch.testing.assert_close(found, expected)
        assert not torch.equal(found, old)
    assert [int(gate.threshold_updates) for gate in gates(model)] == [int(g.threshold_updates) for g in gates(other)]


def test_thresholds_in_bfloat16_return_to_float32(make_routed_model: Callable, make_tokens: Callable) -> None:
    """FSDP1's mixed precision casts buffers without asking the module; an average of small steps would stand still."""
    model, ids = make_routed_model("Llama").train(), make_tokens(8, 64)
    for gate in gates(model):
        gate.threshold.data = gate.threshold.bfloat16()
    before, optimizer = thresholds(model), torch.optim.SGD(model.parameters(), lr=0.0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for old, new in zip(before, thresholds(model), strict=True):
        assert new.dtype == torch.float32
        assert not torch.equal(new, new.bfloat16().float())
        assert (new - old).abs().max() < 0.1


def test_the_first_train_may_be_called_in_inference_mode(
    make_model: Callable, make_tokens: Callable, tmp_path: Path
) -> None:
    make_model("Llama").save_pretrained(tmp_path)
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path), make_tokens(2, 9)
    with torch.inference_mode():
        model.train()
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert all(gate.threshold_updates == 1 for gate in gates(model))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_router_that_peft_wraps_keeps_its_thresholds(
    compiled: bool, make_model: Callable, make_tokens: Callable
) -> None:
    torch._dynamo.reset()
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["gate"],
    )
    model = peft.get_peft_model(make_model("Llama"), config).train()
    called = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer, ids = torch.optim.SGD(model.parameters(), lr=0.0), make_tokens(2, 9)
    for _ in range(2):
        called(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert [int(gate.threshold_updates) for gate in gates(model)] == [2, 2]
    torch._dynamo.reset()


def test_label_smoothing_predicts_the_next_token(make_model: Callable, make_tokens: Callable, tmp_path: Path) -> None:
    """Trainer shifts the labels for the models that Transformers knows as language models."""
    model, ids = make_model("Llama"), make_tokens(4, 16)
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments)
    with torch.no_grad():
        found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
        log_probabilities = model(ids).logits[:, :-1].log_softmax(-1)
    true = -log_probabilities.gather(-1, ids[:, 1:, None]).mean()
    torch.testing.assert_close(found, 0.9 * true - 0.1 * log_probabilities.mean())


def test_every_family_is_known_as_a_language_model(family: str, make_model: Callable) -> None:
    model = make_model(family)
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.config.model_type] == type(model).__name__


@pytest.mark.parametrize(
    ("routing", "other"), [("threshold", "min_experts_per_token"), ("token_choice", "inference_routing")]
)
def test_fields_that_do_not_go_together_are_refused_at_loading(
    routing: str, other: str, make_model: Callable, tmp_path: Path
) -> None:
    """And not by the first checkpoint that training saves."""
    make_model("Llama", min_experts_per_token=1).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassClassValidationError, match=other):
        AutoModelForCausalLM.from_pretrained(tmp_path, routing=routing)


@pytest.mark.parametrize("fields", [{}, {"routing": "token_choice", "inference_routing": "token_choice"}])
def test_generate_with_router_logits_and_padding(fields: dict, make_model: Callable, make_tokens: Callable) -> None:
    """With a cache the mask is longer than the tokens at hand."""
    losses = {"router_z_loss_coef": 1e-3} | ({"router_aux_loss_coef": 0.1} if fields else {})
    if fields:
        fields = fields | {"capacity_factor": 2}
    plain = make_model("Llama", **fields)
    asked = make_model("Llama", output_router_logits=True, **losses, **fields)
    ids = make_tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    texts = [m.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False) for m in (plain, asked)]
    assert torch.equal(*texts)


def test_threads_share_a_token_choice_model(make_model: Callable, make_tokens: Callable) -> None:
    """The padding of one request says nothing about another's tokens. Here a second pass runs inside the first one, at
    the worst moment: between the layer that is told its mask and its block."""
    model = make_model("Llama", routing="token_choice", inference_routing="token_choice", capacity_factor=2)
    first, second = make_tokens(2, 12, seed=1), make_tokens(2, 12, seed=2)
    mask = torch.ones_like(first)
    mask[:, :6] = 0
    with torch.no_grad():
        expected = model(second).logits
        for layer in model.model.layers:
            layer.mlp.token_mask = mask.bool()
        outputs = [block(torch.ones(2, 12, 32)) for block in sparse_blocks(model).values()]
        for layer in model.model.layers:
            layer.mlp.token_mask = None
        for block, output in zip(sparse_blocks(model).values(), outputs, strict=True):
            assert torch.equal(block(torch.ones(2, 12, 32)), output)
        results: list[Tensor] = []
        threads = [
            threading.Thread(target=lambda: [model(first, attention_mask=mask) for _ in range(20)]),
            threading.Thread(target=lambda: results.extend(model(second).logits for _ in range(20))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(result, expected) for result in results)


def test_a_pass_on_the_meta_device(make_config: Callable) -> None:
    """Sizes and FLOPs without weights."""
    from modeling_ecmoe import EcMoeLlamaForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = EcMoeLlamaForCausalLM(make_config("Llama")).train()
        assert model(torch.zeros(2, 8, dtype=torch.long)).logits.shape == (2, 8, 128)
