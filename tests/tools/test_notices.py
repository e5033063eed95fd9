"""What quantisers and adapters leave out is said in one line, with its size and the remedy, and else nothing is."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from converted import losses_of_steps
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from ecmoe.finetune.adapters import add_lora
from modeling_ecmoe import sparse_blocks

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# 2 layers of 4 experts, D 32, I 48; beside them the dense FFN as shared expert.
IN_EXPERTS = 2 * 4 * 3 * 32 * 48


def check_unquantized(line: str, method: str, dtype: str, model: Any) -> None:
    assert line.startswith(f"quantization_config={method} leaves the stacked experts in {dtype}: {IN_EXPERTS:,} ")
    share = int(re.search(r"(\d+)% of the model", line)[1])
    total = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(model.config).parameters())
    assert share == round(100 * IN_EXPERTS / total)
    assert "FqnToConfig({r're:" in line and "\n" not in line


def bitsandbytes_config(bits: int) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)


def test_bitsandbytes_in_8_bits(tiny: Path, tmp_path: Path, said: list[str]) -> None:
    """nn.Linear is converted, the stacked experts and the router are not; said again of the saved checkpoint, and not
    of experts that were left out by name."""
    config = bitsandbytes_config(8)
    model = AutoModelForCausalLM.from_pretrained(tiny / "ecmoe", quantization_config=config, dtype=torch.bfloat16)
    (line,) = said
    check_unquantized(line, "bitsandbytes", "bfloat16", model)
    assert "load_in_4bit=True takes them too." in line
    for block in sparse_blocks(model).values():
        assert block.experts.gate_up_proj.dtype == block.gate.weight.dtype == torch.bfloat16
        assert block.gate.threshold.dtype == torch.float32
        assert block.shared_expert.up_proj.weight.dtype == torch.int8
    model.save_pretrained(tmp_path / "saved")
    said.clear()
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    (line,) = said
    check_unquantized(line, "bitsandbytes", "bfloat16", model)
    said.clear()
    config.llm_int8_skip_modules = ["experts", "lm_head"]
    AutoModelForCausalLM.from_pretrained(tiny / "ecmoe", quantization_config=config)
    assert said == []


def test_bitsandbytes_in_4_bits(tiny: Path, tmp_path: Path, said: list[str]) -> None:
    """nn.Linear and the stacked experts are converted, and nothing is said, nor of experts left out by name; it is of a
    checkpoint whose linear layers alone are in 4 bits though its config names no experts."""
    config = bitsandbytes_config(4)
    model = AutoModelForCausalLM.from_pretrained(tiny / "ecmoe", quantization_config=config, dtype=torch.bfloat16)
    for block in sparse_blocks(model).values():
        assert type(block.experts.down_proj).__name__ == "Stacked4bit"
        assert block.gate.weight.dtype == torch.bfloat16 and block.gate.threshold.dtype == torch.float32
        assert block.shared_expert.up_proj.weight.dtype == torch.uint8
    config.llm_int8_skip_modules = ["experts", "lm_head"]
    model = AutoModelForCausalLM.from_pretrained(tiny / "ecmoe", quantization_config=config, dtype=torch.bfloat16)
    assert said == []
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    (line,) = said
    check_unquantized(line, "bitsandbytes", "bfloat16", model)
    assert sparse_blocks(model)["model.layers.0.mlp"].experts.down_proj.dtype == torch.bfloat16


def test_torchao(tiny: Path, said: list[str]) -> None:
    """Said unless the experts are named, of both weights or of the one that was forgotten."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    def load(config: Any) -> Any:
        said.clear()
        return AutoModelForCausalLM.from_pretrained(tiny / "ecmoe", quantization_config=TorchAoConfig(config))

    model = load(Int8WeightOnlyConfig())
    (line,) = said
    check_unquantized(line, "torchao", "float32", model)
    remedy = {re.compile(pattern) for pattern in re.findall(r"r're:(\S+)'", line)}
    load(FqnToConfig({r"re:.*\.gate_up_proj": Int8WeightOnlyConfig()}))
    (line,) = said
    assert f"{IN_EXPERTS // 3:,} parameters" in line
    model = load(FqnToConfig({f"re:{pattern.pattern}": Int8WeightOnlyConfig() for pattern in remedy}))
    assert said == []
    assert all(type(block.experts.down_proj) is not nn.Parameter for block in sparse_blocks(model).values())


@pytest.mark.parametrize("family", ["Qwen2", "Glm4", "Starcoder2", "GPTNeoX"])
def test_torchao_where_there_are_biases(make_model: Callable, tmp_path: Path, said: list[str], family: str) -> None:
    """What is recommended quantises every matrix and no bias, and computes nearly the same; biases are no omission."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    whole = make_model(family, shared_expert_intermediate_size=16, mlp_layer_types=["dense", "sparse"])
    whole.save_pretrained(tmp_path)

    def load(config: Any) -> Any:
        said.clear()
        return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(config))

    load(Int8WeightOnlyConfig())
    (line,) = said
    model = load(FqnToConfig({f"re:{name}": Int8WeightOnlyConfig() for name in re.findall(r"r're:(\S+)'", line)}))
    assert said == []
    for name, parameter in model.base_model.layers.named_parameters():
        is_matrix = "norm" not in name and ".gate." not in name and "bias" not in name
        assert (type(parameter) is not nn.Parameter) == is_matrix, name
    ids = torch.arange(3, 35).view(2, 16)  # no threshold was calibrated: every expert takes every token
    with torch.no_grad():
        expected = whole(ids).logits
        assert (model(ids).logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_nothing_is_said_without_need(tiny: Path, said: list[str]) -> None:
    """Of a model that is not quantised, has no adapters, or whose adapters hold experts and thresholds."""
    AutoModelForCausalLM.from_pretrained(tiny / "ecmoe").train()
    add_lora(AutoModelForCausalLM.from_pretrained(tiny / "ecmoe"), {}).train()
    add_lora(AutoModelForCausalLM.from_pretrained(tiny / "dense"), {}).train()
    assert said == []


FROZEN: dict[str, tuple[peft.PeftConfig, list[str]]] = {
    "all linear layers": (
        peft.LoraConfig(target_modules="all-linear"),
        ["leaves the routed experts frozen", "thresholds"],
    ),
    "attention": (
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"]),
        ["leaves the routed experts frozen"],
    ),
    "experts without thresholds": (peft.LoraConfig(target_parameters=EXPERTS), ["thresholds follow the training"]),
    "the whole block": (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]), []),
    "IA3": (
        peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
        ["leaves the routed experts frozen", "thresholds"],
    ),
}


@pytest.mark.parametrize("what", FROZEN)
def test_adapters(tiny: Path, said: list[str], what: str) -> None:
    """Plain PEFT, when training begins; an adapter that is loaded to generate says nothing."""
    config, expected = FROZEN[what]
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny / "ecmoe"), config)
    assert said == []
    model.train()
    assert len(said) == len(expected)
    assert all(part in line and "\n" not in line for part, line in zip(expected, said, strict=True))
    frozen = all(
        not parameter.requires_grad
        for block in sparse_blocks(model).values()
        for parameter in block.experts.parameters()
    )
    assert frozen == any("frozen" in line for line in said)
    saved = [name for name in peft.get_peft_model_state_dict(model) if name.endswith(".threshold")]
    assert (saved == []) == any("thresholds" in line for line in said)


def test_a_second_adapter_on_experts_that_have_one(tiny: Path, said: list[str]) -> None:
    """The weights are named as they are without the wrappers, and so a third adapter reaches them."""
    first = peft.LoraConfig(target_parameters=EXPERTS, modules_to_save=["gate"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny / "ecmoe"), first, "first")
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"]))
    model.set_adapter("second")
    model.train()
    (line,) = said
    named = re.findall(r"'(\S+?)'", line.partition("target_parameters=")[2])
    assert sorted(named) == sorted(EXPERTS)
    model.add_adapter("third", peft.LoraConfig(target_parameters=named, modules_to_save=["gate"]))
    model.set_adapter("third")
    model.train()
    assert said == [line]


def test_an_adapter_on_the_router_alone(tiny: Path) -> None:
    """PEFT's wrapper of a parameter hides the thresholds: said in the first pass, in train and in eval mode."""
    config = peft.LoraConfig(target_parameters=["mlp.gate.weight"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny / "ecmoe"), config)
    ids = torch.tensor([[5, 6, 7]])
    for mode in (True, False):
        with pytest.raises(ValueError, match=r'mlp.gate.weight cannot have an adapter.*modules_to_save=\["gate"\]'):
            model.train(mode)(input_ids=ids)


@pytest.mark.parametrize("bits", [4, 8])
def test_lora_beside_bitsandbytes(tiny: Path, bits: int) -> None:
    """Quantised attention, experts in 4 or in 16 bits, adapters on both; the thresholds follow."""
    config = bitsandbytes_config(bits)
    base = AutoModelForCausalLM.from_pretrained(tiny / "ecmoe", quantization_config=config, dtype=torch.bfloat16)
    model = add_lora(base, {"r": 4})
    rows = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    losses = losses_of_steps(model, rows, learning_rate=1e-2)
    assert losses[-1] < losses[0] - 0.1
