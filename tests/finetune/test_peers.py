"""Nothing of `finetune` is needed to train: a bare Accelerate loop and TRL, as their own documentation has them."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from checkpoints import all_tensors
from converted import expert_adapters
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ecmoe.finetune.sources import DOCUMENT_SEPARATOR
from modeling_ecmoe import record_routing, sparse_blocks

# TRL's own configuration sets it under the name that Transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning:transformers.*")

STEPS = 8


def documents_of(folder: Path) -> list[str]:
    return [part.strip()[:2000] for part in (folder / "text.txt").read_text().split(DOCUMENT_SEPARATOR)]


def sequences_of(folder: Path) -> Tensor:
    """[64, 64] tokens of the text."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "ecmoe")
    ids = tokenizer("".join(documents_of(folder)), verbose=False)["input_ids"]
    return torch.tensor(ids[: 64 * 64]).view(64, 64)


def state_of(model: Any) -> list[tuple[Tensor, int]]:
    """Thresholds and how many steps they average, of every layer."""
    gates = [block.gate for block in sparse_blocks(model).values()]
    return [(gate.threshold.clone(), int(gate.threshold_updates)) for gate in gates]


def assert_kept_up(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]], steps: int) -> None:
    """Every layer's thresholds moved, once per optimiser step."""
    assert len(before) == len(after) == 2
    for (old, updates), (new, more) in zip(before, after, strict=True):
        assert more == updates + steps
        assert (old != new).all() and new.isfinite().all()


@torch.no_grad()
def held_out_loss(model: Any, sequences: Tensor) -> float:
    """Causal: by threshold."""
    return float(model.eval()(input_ids=sequences, labels=sequences, use_cache=False).loss)


def assert_same_model(model: Any, loaded: Any, sequences: Tensor) -> None:
    """In weights and thresholds bit for bit, in logits but for what a product's last digits owe to where in memory a
    weight begins."""
    for (name, own), (_, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(own, other), name
    with torch.no_grad():
        logits = [one.eval()(input_ids=sequences, use_cache=False).logits for one in (model, loaded)]
    torch.testing.assert_close(*logits, atol=2e-6, rtol=1e-5)
    for (old, updates), (new, more) in zip(state_of(model), state_of(loaded), strict=True):
        assert torch.equal(old, new) and updates == more


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_accelerate_loop(tiny: Path, tmp_path: Path, accumulation: int) -> None:
    """Two micro-batches of a step are one update of the thresholds."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = AutoModelForCausalLM.from_pretrained(tiny / "ecmoe")
    held_out = sequences_of(tiny)[48:]
    loss_before, before = held_out_loss(model, held_out), state_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(sequences_of(tiny)[:48].tolist(), batch_size=6, collate_fn=torch.tensor)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    assert len(loader) == STEPS
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch, use_cache=False).loss)
            optimizer.step()
            optimizer.zero_grad()
    trained = accelerator.unwrap_model(model)
    assert_kept_up(before, state_of(trained), STEPS // accumulation)
    assert held_out_loss(trained, held_out) < loss_before - 0.1
    trained.save_pretrained(tmp_path / "out")
    assert_same_model(trained, AutoModelForCausalLM.from_pretrained(tmp_path / "out"), held_out)


def sft_trainer(tiny: Path, folder: Path, peft_config: Any = None, **options: Any) -> Any:
    """TRL's SFTTrainer on documents, or on other rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own, of features that are not used here
        from trl import SFTConfig, SFTTrainer
    rows = options.pop("rows", None) or {"text": documents_of(tiny)}
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_length": 64,
        "packing": False,
        "report_to": "none",
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny / "ecmoe"),
        args=SFTConfig(**arguments | options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny / "ecmoe"),
        peft_config=peft_config,
    )


MODES: dict[str, dict[str, Any]] = {
    "plain": {"packing": False},
    "packed": {"packing": True, "packing_strategy": "wrapped"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_trl(tiny: Path, tmp_path: Path, mode: str) -> None:
    pytest.importorskip("trl")
    trainer = sft_trainer(tiny, tmp_path / "out", **MODES[mode])
    held_out = sequences_of(tiny)[48:]
    loss_before, before = held_out_loss(trainer.model, held_out), state_of(trainer.model)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.2
    assert_kept_up(before, state_of(trainer.model), STEPS)
    assert held_out_loss(trainer.model, held_out) < loss_before - 0.1
    trainer.save_model()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_model(trainer.model, loaded, held_out)


def test_trl_on_prompts_and_completions(tiny: Path, tmp_path: Path) -> None:
    """TRL leaves the prompt unlearned, and pads: the padding is no token that an expert could choose."""
    pytest.importorskip("trl")
    rows = {"prompt": ["Say it."] * 8, "completion": [" Well, thank you.", " No."] * 4}
    trainer = sft_trainer(tiny, tmp_path / "out", rows=rows, per_device_train_batch_size=8)
    batch = next(iter(trainer.get_train_dataloader()))
    learned = {trainer.processing_class.decode(row[row != -100]) for row in batch["labels"]}
    assert learned == {" Well, thank you.<eos>", " No.<eos>"}
    before = state_of(trainer.model)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 1
    assert_kept_up(before, state_of(trainer.model), STEPS)
    with record_routing(trainer.model.train()) as record:
        trainer.model(**batch)
    assert set(record.tokens.values()) == {int(batch["attention_mask"].sum())} != {batch["input_ids"].numel()}


def test_trl_with_lora(tiny: Path, tmp_path: Path) -> None:
    """Adapters on the stacked experts and the router saved whole: the adapter's file holds the thresholds."""
    pytest.importorskip("trl")
    trainer = sft_trainer(tiny, tmp_path / "out", expert_adapters(), learning_rate=2e-2)
    before = state_of(trainer.model)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert_kept_up(before, state_of(trainer.model), STEPS)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert sum(".mlp.experts." in name for name in trained) == 2 * 2 * 2
    assert all("lora_" in name or ".mlp.gate.modules_to_save" in name for name in trained)
    trainer.save_model()
    tensors = all_tensors(tmp_path / "out")
    for layer, (threshold, updates) in enumerate(state_of(trainer.model)):
        prefix = f"base_model.model.model.layers.{layer}.mlp.gate."
        assert torch.equal(tensors[prefix + "threshold"], threshold)
        assert tensors[prefix + "threshold_updates"] == updates
    base = AutoModelForCausalLM.from_pretrained(tiny / "ecmoe")
    held_out = sequences_of(tiny)[48:]
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    assert_same_model(trainer.model, loaded, held_out)
