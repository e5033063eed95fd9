"""The Python of docs/finetuning.md runs as it stands."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")
PAGE = Path(__file__).parents[2] / "docs" / "finetuning.md"


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
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks:
            exec(block, names)
    assert "eval_loss_gap" in capsys.readouterr().out
