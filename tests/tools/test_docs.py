"""The Python of the pages on fine-tuning, quantisation and composites runs as it stands."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_dense
from composites import image_inputs, write_composite
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from ecmoe.conversion import convert

pytest.importorskip("trl")
DOCS = Path(__file__).parents[2] / "docs"


def blocks_of(page: str) -> list[str]:
    """The blocks of Python of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_on_fine_tuning(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ecmoe.finetune.calibration.CALIBRATION_TOKENS", 4096)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.pad_token = tokenizer.eos_token
    text = "Once upon a time there was a cat. "
    names = {
        "model": AutoModelForCausalLM.from_pretrained(stories),
        "tokenizer": tokenizer,
        "stories": Dataset.from_dict({"text": [text * (1 + n % 5) for n in range(64)]}),
        "held_out": Dataset.from_dict({"text": [text * (1 + n % 3) for n in range(8)]}),
        "preferences": Dataset.from_dict({"prompt": ["One "] * 32, "chosen": ["day."] * 32, "rejected": ["dog."] * 32}),
        "prompts": Dataset.from_dict({"prompt": ["Once upon", "One day"] * 16}),
        "reward": lambda completions, **_: [float(len(set(each))) for each in completions],
        "options": {"use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none", "learning_rate": 1e-5},
    }
    blocks = blocks_of("finetuning.md")
    assert len(blocks) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks:
            exec(block, names)
    assert "eval_loss_gap" in capsys.readouterr().out


def test_the_page_on_quantisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    write_dense(tmp_path / "dense", "Qwen3", hidden_size=64, head_dim=16, intermediate_size=128)
    convert("dense", "qwen3-8x", init="copy", num_experts=4, verify=False)
    names: dict[str, Any] = {}
    load_and_save, adapters, merge = blocks_of("quantization.md")
    exec(load_and_save, names)
    quantization = names["config"]
    assert AutoTokenizer.from_pretrained("qwen3-8x-4bit")("a word")["input_ids"]
    exec(adapters, names)
    names["model"].save_pretrained("qwen3-8x-qlora")
    names["quantization"] = quantization
    exec(merge, names)
    assert names["merged"](torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_the_page_on_composites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_composite(tmp_path / "gemma-3-4b-it", "Gemma3")
    convert("gemma-3-4b-it", "gemma3-4b-8x", verify=False)
    load, in_memory, calibrate, adapters = blocks_of("composites.md")
    names: dict[str, Any] = {}
    exec(load, names)
    exec("import ecmoe\n" + in_memory.replace("google/", ""), names)
    inputs = image_inputs(tmp_path / "gemma-3-4b-it", "Gemma3")
    names |= {"images": None, "texts": None, "processor": lambda **_: inputs}
    exec(calibrate, names)
    assert "200 captioned images" in names["model"].config.text_config.thresholds_from
    exec(adapters, names)
    trained = [name for name, weight in names["model"].named_parameters() if weight.requires_grad]
    for part in ("q_proj.lora_A", "experts.lora_A", "gate.modules_to_save"):
        assert any(part in name for name in trained), part
    assert not any("vision_tower" in name for name in trained)
