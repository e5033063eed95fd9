"""Converted checkpoints, tiny and real, as fixtures; and a few steps of training on them."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoints import STORIES_MODEL, STORIES_TEXT, write_dense, write_text
from torch import Tensor

from ecmoe.conversion import convert
from modeling_ecmoe import sparse_blocks

INIT = "blend"  # its experts speak from the start; those of `shared` are silent, and would hide what breaks them


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random checkpoint, converted, and the text of its thresholds."""
    folder = tmp_path_factory.mktemp("tiny")
    text = write_text(folder / "text.txt", documents=12)
    write_dense(folder / "dense", "Qwen3", initializer_range=0.02)
    convert(str(folder / "dense"), str(folder / "ecmoe"), num_experts=4, init=INIT, text=str(text), verify=False)
    return folder


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K, converted."""
    if not (STORIES_MODEL.is_dir() and STORIES_TEXT.is_file()):
        pytest.skip("stories260K and its text are not beside the repository (ECMOE_TEST_DATA)")
    folder = tmp_path_factory.mktemp("stories") / "ecmoe"
    convert(str(STORIES_MODEL), str(folder), init=INIT, text=str(STORIES_TEXT), verify=False)
    return folder


def expert_adapters() -> peft.LoraConfig:
    """LoRA on attention and experts; router and thresholds whole."""
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["gate"],
    )


def losses_of_steps(model: Any, rows: Tensor, learning_rate: float, steps: int = 4) -> list[float]:
    """The losses of so many AdamW steps on the same rows, after a check that each updated every threshold once."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    before = [int(block.gate.threshold_updates) for block in sparse_blocks(model).values()]
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = [int(block.gate.threshold_updates) for block in sparse_blocks(model).values()]
    assert after == [count + steps for count in before]
    return losses
