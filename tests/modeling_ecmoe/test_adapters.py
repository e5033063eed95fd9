"""PEFT's adapters on the stacked experts, row by row where nothing is learned: same outputs, and no stack rebuilt."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from modeling_ecmoe import sparse_blocks, use_inference_routing
from modeling_ecmoe.adapters_ecmoe import by_rows

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


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "Phi3"])
def test_row_by_row_is_what_peft_computes(
    family: str, adapters: int, make_routed_model: Callable, make_tokens: Callable, stacks: list[str]
) -> None:
    """With gradients PEFT adds the adapters to the stacks; without, and in `generate`, no stack is touched."""
    assert family in FAMILIES
    model = adapted(make_routed_model(family).to(torch.float64), adapters)
    ids = make_tokens(2, 9)
    expected = model(ids).logits.detach()
    assert len(stacks) == 2 * len(blocks_of(model))
    stacks.clear()
    with torch.no_grad():
        found = model(ids).logits
        with model.disable_adapter():
            plain = model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert (plain - found).abs().max() > 1e-3
    text = model.generate(input_ids=ids, **GREEDY)
    model.train()
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), text)
    assert not stacks
    assert torch.equal(model.merge_and_unload().eval().generate(input_ids=ids, **GREEDY), text)


def test_whoever_is_asked_when_the_experts_are_called_is_asked(
    make_routed_model: Callable, make_tokens: Callable, stacks: list[str]
) -> None:
    """A hook, merged adapters, a pass that learns, and top-k routing, which reads every expert, go PEFT's way."""
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
        stacks.clear()
        with use_inference_routing(model, "expert_choice"):
            model(ids)
        assert len(stacks) == 2 * len(blocks_of(model))
        model.merge_adapter()
        assert by_rows(experts) is experts
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        model.unmerge_adapter()
    stacks.clear()
    loss: Tensor = model.train()(ids, labels=ids).loss
    loss.backward()
    assert len(stacks) == 2 * len(blocks_of(model))
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_adapters_in_another_precision(make_routed_model: Callable, make_tokens: Callable, stacks: list[str]) -> None:
    """PEFT keeps adapters in float32 beside weights of bfloat16."""
    model = adapted(make_routed_model("Llama").to(torch.bfloat16))
    ids = make_tokens(2, 9)
    expected = model(ids).logits.detach().float()
    stacks.clear()
    with torch.no_grad():
        found = model(ids).logits.float()
    assert not stacks and (found - expected).abs().mean() < 0.05 * expected.abs().mean()
