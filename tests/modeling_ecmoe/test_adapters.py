"""PEFT's adapters on the stacked experts, row by row: the outputs and gradients of PEFT's way, and no stack rebuilt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpointing import recompute_layers
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM

from modeling_ecmoe import sparse_blocks, use_inference_routing
from modeling_ecmoe.adapters_ecmoe import by_rows

pytestmark = pytest.mark.skipif(
    not hasattr(ParamWrapper, "get_delta_factors"), reason="an older PEFT, whose adapters are left to its own way"
)

TOKEN_CHOICE = {"routing": "token_choice", "inference_routing": "token_choice"}
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def adapted(model: Any, adapters: int = 1, **fields: Any) -> Any:
    """The model with random adapters on both stacks, and the router's thresholds beside them."""
    names = [
        f"mlp.experts.{name}" for name, weight in blocks_of(model)[0].experts.named_parameters() if weight.dim() == 3
    ]
    for number in range(adapters):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=3 + number, lora_alpha=8, target_parameters=names, target_modules=[], **fields
        )
        model = peft.get_peft_model(model, config) if number == 0 else model
        if number:
            model.add_adapter(f"more{number}", config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if adapters > 1:
        model.base_model.set_adapter(list(model.peft_config))
    return model.eval()


def blocks_of(model: Any) -> list[Any]:
    return list(sparse_blocks(model).values())


@pytest.mark.parametrize("way", ["PeftModel", "AutoModel", "trained here", "base"])
def test_a_text_that_the_thresholds_are_not_from_is_forgotten(
    way: str, make_routed_model: Callable, make_tokens: Callable, tmp_path: Path
) -> None:
    """Where adapters bring thresholds of their own, or training has moved them; not where they are the base's."""
    base = make_routed_model("Llama")
    base.config.thresholds_from = "letters of 1912"
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["gate"])
    config.base_model_name_or_path = str(tmp_path / "base")
    trained = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    assert trained.config.thresholds_from == "letters of 1912"
    if way != "base":
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=1e-3)
        ids = make_tokens(2, 32)
        trained.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert trained.config.thresholds_from is None
    trained.save_pretrained(tmp_path / "adapter")
    if way == "AutoModel":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert loaded.config.thresholds_from is None
        return
    if way != "trained here":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        trained = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    merged = trained.merge_and_unload()
    assert merged.config.thresholds_from == ("letters of 1912" if way == "base" else None)
    merged.save_pretrained(tmp_path / "merged")
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.thresholds_from
        == merged.config.thresholds_from
    )


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stacks that PEFT has rebuilt since."""
    rebuilt: list[str] = []
    activate = ParamWrapper._activate_lora

    def count(self: ParamWrapper, *args: Any) -> Any:
        rebuilt.append(self.parameter_name)
        return activate(self, *args)

    monkeypatch.setattr(ParamWrapper, "_activate_lora", count)
    return rebuilt


@pytest.fixture
def peft_s_way(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets whether the block leaves the adapters to PEFT."""

    def choose(is_peft_s: bool) -> None:
        monkeypatch.setattr("modeling_ecmoe.block_ecmoe.by_rows", (lambda experts: experts) if is_peft_s else by_rows)

    return choose


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "Phi3"])
def test_row_by_row_is_what_peft_computes(
    family: str,
    adapters: int,
    make_routed_model: Callable,
    make_tokens: Callable,
    stacks: list[str],
    peft_s_way: Callable,
) -> None:
    """In eval mode, by top-k routes, in `generate` and merged; and no stack is touched."""
    model, ids = adapted(make_routed_model(family).to(torch.float64), adapters), make_tokens(2, 9)
    found, text = {}, {}
    for is_peft_s in (True, False):
        peft_s_way(is_peft_s)
        stacks.clear()
        with torch.no_grad():
            found[is_peft_s] = [model.eval()(ids).logits]
            with use_inference_routing(model, "expert_choice"):
                found[is_peft_s].append(model(ids).logits)
            with model.disable_adapter():
                plain = model(ids).logits
        text[is_peft_s] = model.train().generate(input_ids=ids, **GREEDY)
        assert bool(stacks) == is_peft_s
    for row_by_row, expected in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(row_by_row, expected, atol=1e-9, rtol=1e-9)
        assert (plain - row_by_row).abs().max() > 1e-3
    assert torch.equal(text[False], text[True])
    assert torch.equal(model.merge_and_unload().eval().generate(input_ids=ids, **GREEDY), text[True])


@pytest.mark.parametrize("fields", [{}, {"capacity_factor": 2} | TOKEN_CHOICE], ids=["expert", "token"])
@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
def test_the_gradients_are_peft_s(
    family: str, fields: dict, make_model: Callable, make_tokens: Callable, peft_s_way: Callable, stacks: list
) -> None:
    """Of adapters and of all that lies below them, by expert choice and by token choice, recomputed or not."""
    model, ids = adapted(make_model(family, **fields).to(torch.float64)), make_tokens(2, 9)
    embedding = model.get_input_embeddings().weight.requires_grad_()
    gradients = []
    for is_peft_s, recomputes in ((True, False), (False, False), (False, True)):
        peft_s_way(is_peft_s)
        if recomputes:
            recompute_layers(model.get_base_model(), use_reentrant=False)
        stacks.clear()
        model.zero_grad()
        model.train()(ids, labels=ids).loss.backward()
        assert bool(stacks) == is_peft_s
        gradients.append([embedding.grad, *(p.grad for name, p in model.named_parameters() if "lora_" in name)])
    expected, *others = gradients
    for found in others:
        for one, other in zip(found, expected, strict=True):
            assert other.abs().max() > 0
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


def test_whoever_is_asked_when_the_experts_are_called_is_asked(
    make_routed_model: Callable, make_tokens: Callable
) -> None:
    """A hook, merged adapters and weights that are trained themselves go PEFT's way."""
    model, ids = adapted(make_routed_model("Llama")), make_tokens(2, 9)
    experts = blocks_of(model)[0].experts
    with torch.no_grad():
        expected = model(ids).logits
        assert by_rows(experts) is not experts
        for hooked in (experts, experts.base_layer, experts.get_base_layer()):
            called: list[Any] = []
            handle = hooked.register_forward_hook(lambda *_, called=called: called.append(1))
            assert by_rows(experts) is experts
            torch.testing.assert_close(model(ids).logits, expected)
            assert called
            handle.remove()
        model.merge_adapter()
        assert by_rows(experts) is experts
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        model.unmerge_adapter()
    experts.get_base_layer().down_proj.requires_grad_()
    assert by_rows(experts) is experts


def test_adapters_in_another_precision(
    make_routed_model: Callable, make_tokens: Callable, peft_s_way: Callable, stacks: list[str]
) -> None:
    """PEFT keeps adapters in float32 beside weights of bfloat16."""
    model, ids = adapted(make_routed_model("Llama").to(torch.bfloat16)), make_tokens(2, 9)
    with torch.no_grad():
        found = model(ids).logits.float()
        assert not stacks
        peft_s_way(True)
        expected = model(ids).logits.float()
    assert stacks and (found - expected).abs().mean() < 0.05 * expected.abs().mean()
