"""torchao in int8: attention and stacked experts, on disk and in memory; router and thresholds stay as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STORIES_TEXT
from converted import losses_of_steps
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from ecmoe.finetune import RecipeError
from ecmoe.finetune.adapters import add_lora
from modeling_ecmoe import calibrate_thresholds, sparse_blocks

pytest.importorskip("torchao", reason="torchao is not installed")

ATTENTION = r"re:.*\.(self_attn|shared_expert)\..*_proj"
EXPERTS = r"re:.*\.mlp\.experts\..*_proj"


def int8(*patterns: str) -> Any:
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    return FqnToConfig({pattern: Int8WeightOnlyConfig() for pattern in patterns})


def quantized(checkpoint: Path, **options: Any) -> Any:
    config = TorchAoConfig(int8(ATTENTION, EXPERTS))
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, **options)


def size_of(model: nn.Module) -> int:
    """Bytes of all parameters, those of torchao by their parts."""
    total = 0
    for parameter in model.parameters():
        parts = parameter.__tensor_flatten__()[0] if type(parameter) is not nn.Parameter else []
        tensors = [getattr(parameter, part) for part in parts] or [parameter]
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def quantized_names(model: nn.Module) -> set[str]:
    """The last two parts of the names of what is no plain parameter."""
    found = [name for name, parameter in model.named_parameters() if type(parameter) is not nn.Parameter]
    return {".".join(name.removesuffix(".weight").split(".")[-2:]) for name in found}


@pytest.fixture(scope="module")
def rows(stories: Path) -> Tensor:
    """[8, 128] tokens of TinyStories."""
    text = STORIES_TEXT.read_text(encoding="utf-8").split("<|endoftext|>")
    tokenizer = AutoTokenizer.from_pretrained(stories)
    ids = [tokenizer(story.strip(), verbose=False)["input_ids"] for story in text[:40]]
    return torch.tensor([row[:128] for row in ids if len(row) >= 128][:8])


@torch.no_grad()
def logits_of(model: Any, rows: Tensor) -> Tensor:
    return model.eval()(input_ids=rows, use_cache=False).logits.float()


def loss_of(model: Any, rows: Tensor) -> float:
    logits = logits_of(model, rows)
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))


@pytest.mark.parametrize("back_end", ["grouped_mm", "batched_mm", "eager"])
def test_attention_and_experts(stories: Path, rows: Tensor, back_end: str) -> None:
    """0.28 of the bytes, and the same predictions, whichever back-end the experts were to use."""
    plain = AutoModelForCausalLM.from_pretrained(stories)
    model = quantized(stories, experts_implementation=back_end)
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    shared = {f"shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert quantized_names(model) == attention | shared | {"experts.gate_up_proj", "experts.down_proj"}
    share = size_of(model) / size_of(plain)
    losses = [loss_of(one, rows) for one in (plain, model)]
    expected, found = (logits_of(one, rows).softmax(-1) for one in (plain, model))
    print("bytes", size_of(plain), size_of(model), "losses", losses, "largest", (expected - found).abs().max().item())
    assert share < 0.3
    assert abs(losses[0] - losses[1]) < 0.005
    assert (expected - found).abs().sum(-1).mean() < 0.03
    for old, new in zip(sparse_blocks(plain).values(), sparse_blocks(model).values(), strict=True):
        assert type(new.gate.weight) is nn.Parameter and torch.equal(old.gate.weight, new.gate.weight)
        assert torch.equal(old.gate.threshold, new.gate.threshold)
    prompt = rows[:2, :16]
    texts = [one.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0) for one in (plain, model)]
    assert (texts[0] == texts[1]).float().mean() > 0.8


def test_in_bfloat16(stories: Path, rows: Tensor) -> None:
    """The thresholds stay in float32."""
    model = quantized(stories, dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(stories)
    for old, new in zip(sparse_blocks(plain).values(), sparse_blocks(model).values(), strict=True):
        assert new.gate.threshold.dtype == torch.float32 and torch.equal(old.gate.threshold, new.gate.threshold)
        assert new.gate.weight.dtype == torch.bfloat16 and type(new.gate.weight) is nn.Parameter
    assert abs(loss_of(model, rows) - loss_of(plain, rows)) < 0.01


def test_saved_and_loaded(stories: Path, rows: Tensor, tmp_path: Path) -> None:
    model = quantized(stories)
    model.save_pretrained(tmp_path / "int8")
    assert (tmp_path / "int8" / "model.safetensors").stat().st_size < size_of(model) * 1.1
    AutoModelForCausalLM.from_pretrained(tmp_path / "int8").save_pretrained(tmp_path / "again")
    for name in ("int8", "again"):
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.values())
        assert quantized_names(loaded) == quantized_names(model)
        assert torch.equal(logits_of(loaded, rows), logits_of(model, rows))


def test_in_place(stories: Path, rows: Tensor) -> None:
    """`quantize_` on a model in memory does what from_pretrained does."""
    from torchao.quantization import quantize_

    model = AutoModelForCausalLM.from_pretrained(stories)
    quantize_(model, int8(ATTENTION, EXPERTS), filter_fn=None)
    assert torch.equal(logits_of(model, rows), logits_of(quantized(stories), rows))


def test_experts_choose_and_thresholds_are_calibrated(stories: Path, rows: Tensor) -> None:
    """What asks the experts for equal rows works: training's routes and calibration."""
    model, plain = quantized(stories), AutoModelForCausalLM.from_pretrained(stories)
    with torch.no_grad():
        logits = [one.train()(input_ids=rows, use_cache=False).logits for one in (model, plain)]
    assert (logits[0].softmax(-1) - logits[1].softmax(-1)).abs().sum(-1).mean() < 0.03
    for one in (model, plain):
        calibrate_thresholds(one, [{"input_ids": rows}])
    for old, new in zip(sparse_blocks(plain).values(), sparse_blocks(model).values(), strict=True):
        assert torch.allclose(old.gate.threshold, new.gate.threshold, atol=0.02)


def test_lora_beside_quantized_experts(stories: Path, rows: Tensor) -> None:
    """Adapters on attention train, the gradient passes through the experts; adapters on int8 experts are refused."""
    with pytest.raises(RecipeError, match=r"names experts that are quantised \(Int8Tensor\)"):
        add_lora(quantized(stories), {})
    model = add_lora(quantized(stories), {"r": 4, "target_modules": ["q_proj", "v_proj"]})
    losses = losses_of_steps(model, rows, learning_rate=5e-3)
    assert losses[-1] < losses[0] - 0.02
