"""TRL on converted models: DPO with either kind of reference, GRPO, and SFT without padding."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import expert_adapters
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ecmoe.finetune.sources import DOCUMENT_SEPARATOR
from modeling_ecmoe import calibrate_thresholds, record_routing, sparse_blocks, use_inference_routing

pytest.importorskip("trl", reason="trl is not installed")
# TRL's own arguments (1.16).
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning:transformers.*")

STEPS = 6
OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def preferences() -> Dataset:
    """Pairs of different lengths, so that every batch is padded."""
    rows = {
        "prompt": ["Say it.", "What is a class?", "Yes or no?", "Name one."] * 2,
        "chosen": [" Well, thank you.", " It makes objects.", " Yes.", " The name of a module."] * 2,
        "rejected": [" No.", " The statement is not what it was before that.", " No, no, no.", " None."] * 2,
    }
    return Dataset.from_dict(rows)


def dpo_trainer(tiny: Path, folder: Path, peft_config: Any = None, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own, of features that are not used here
        from trl import DPOConfig, DPOTrainer
    batches = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny / "ecmoe"),
        args=DPOConfig(output_dir=str(folder), max_length=64, **OPTIONS | batches | options),
        train_dataset=preferences(),
        eval_dataset=preferences(),
        processing_class=AutoTokenizer.from_pretrained(tiny / "ecmoe"),
        peft_config=peft_config,
    )


def updates_of(model: Any) -> list[int]:
    return [int(block.gate.threshold_updates) for block in sparse_blocks(model).values()]


@pytest.mark.parametrize("reference", ["a copy of the model", "the model without its adapters"])
def test_dpo(tiny: Path, tmp_path: Path, reference: str) -> None:
    """The margin grows, the thresholds follow once per step, and the reference stays as it was, thresholds included."""
    if reference == "a copy of the model":
        trainer = dpo_trainer(tiny, tmp_path / "out")
    else:
        trainer = dpo_trainer(tiny, tmp_path / "out", expert_adapters(), learning_rate=3e-2)
    assert (trainer.ref_model is None) == (reference != "a copy of the model")
    before = updates_of(trainer.model)
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert len(log) == STEPS
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # converted by `blend`, whatever the routes: log 2
    assert log[-1]["loss"] < log[0]["loss"] - 0.1
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"] + 0.1
    assert updates_of(trainer.model) == [count + STEPS for count in before]
    if trainer.ref_model is not None:
        base = AutoModelForCausalLM.from_pretrained(tiny / "ecmoe").state_dict()
        assert all(torch.equal(tensor, base[name]) for name, tensor in trainer.ref_model.state_dict().items())
    else:
        originals = [block.gate.original_module for block in sparse_blocks(trainer.model).values()]
        assert [int(gate.threshold_updates) for gate in originals] == before


def test_dpo_begins_at_its_reference(tiny: Path, tmp_path: Path) -> None:
    """A separate reference routes by threshold; so does the model that is trained with routing="threshold".

    With expert choice it does not, and where experts differ its rewards do not begin at 0. The reference that is the
    model without its adapters is in train mode too, and routes as the model does.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny / "ecmoe")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "ecmoe")
    texts = [row["prompt"] + row[answer] for row in preferences() for answer in ("chosen", "rejected")]
    with torch.no_grad():
        for block in sparse_blocks(model).values():
            block.experts.down_proj.mul_(torch.linspace(5, 20, 4)[:, None, None])
    calibrate_thresholds(model, [tokenizer(texts, padding=True, return_tensors="pt")])
    model.save_pretrained(tmp_path / "ecmoe")
    tokenizer.save_pretrained(tmp_path / "ecmoe")
    rewards = {}
    for routing, config in (("expert_choice", None), ("threshold", None), ("expert_choice", expert_adapters())):
        trainer = dpo_trainer(tmp_path, tmp_path / "out", config, max_steps=1, per_device_train_batch_size=8)
        trainer.model.config.routing = routing
        trainer.train()
        first = trainer.state.log_history[0]
        rewards[routing, config is None] = max(abs(first[f"rewards/{answer}"]) for answer in ("chosen", "rejected"))
    print(rewards)
    assert rewards["threshold", True] < 1e-5 and rewards["expert_choice", False] < 1e-5
    assert rewards["expert_choice", True] > 1e-4


def test_dpo_evaluates_causally(tiny: Path, tmp_path: Path) -> None:
    """Trained, so that the experts differ: no pair's margin depends on the other pairs of its evaluation batch."""
    trainer = dpo_trainer(tiny, tmp_path / "out")
    trainer.train()
    found = []
    for size in (1, 8):
        trainer.args.per_device_eval_batch_size = size
        found.append(trainer.evaluate())
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-4), name
    assert found[0]["eval_rewards/margins"] > 0.1


def test_dpo_pools_chosen_and_rejected(tiny: Path, tmp_path: Path) -> None:
    """One batch holds both answers of every pair, and the experts choose among the real tokens of all."""
    trainer = dpo_trainer(tiny, tmp_path / "out")
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["input_ids"]) == 2 * 4
    real = int(batch["attention_mask"].sum())
    assert real < batch["attention_mask"].numel()
    with record_routing(trainer.model.train()) as record:
        trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert set(record.tokens.values()) == {real}


@pytest.mark.parametrize("routes_as_inference", [True, False])
def test_grpo_compares_the_same_policy(tiny: Path, tmp_path: Path, routes_as_inference: bool) -> None:
    """At a learning rate of 0 old and new log-probabilities are those of one model. TRL takes them of different
    batches, among which experts choose differently: with `use_inference_routing` they are equal, without it not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import GRPOConfig, GRPOTrainer
    model = AutoModelForCausalLM.from_pretrained(tiny / "ecmoe")
    with torch.no_grad():
        for block in sparse_blocks(model).values():
            block.experts.down_proj.mul_(torch.linspace(5, 20, 4)[:, None, None])
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    lengths = {"num_generations": 4, "num_iterations": 2, "max_completion_length": 12}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=GRPOConfig(
            output_dir=str(tmp_path), **OPTIONS | batches | lengths | {"max_steps": 2, "learning_rate": 0.0}
        ),
        train_dataset=Dataset.from_dict({"prompt": ["Say it.", "What is a class?", "Yes or no?", "Name one."] * 2}),
        processing_class=AutoTokenizer.from_pretrained(tiny / "ecmoe"),
    )
    with use_inference_routing(model) if routes_as_inference else contextlib.nullcontext():
        trainer.train()
    losses = [abs(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert max(losses) < 1e-5 if routes_as_inference else max(losses) > 1e-4


def sft_trainer(tiny: Path, folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import SFTConfig, SFTTrainer
    documents = [part.strip() for part in (tiny / "text.txt").read_text().split(DOCUMENT_SEPARATOR)]
    lengths = {"per_device_train_batch_size": 4, "max_length": 64}
    rows = {"text": [document[:size] for document in documents for size in (30, 45, 80)]}
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny / "ecmoe"),
        args=SFTConfig(output_dir=str(folder), **OPTIONS | lengths | options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny / "ecmoe"),
    )


def documents_of(batch: dict[str, Tensor]) -> list[slice]:
    """Where each document of a batch without padding lies: positions begin again at 0."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], batch["position_ids"].shape[1]]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


MODES: dict[str, dict[str, Any]] = {
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_sft_without_padding(tiny: Path, tmp_path: Path, mode: str) -> None:
    """One long row, told apart by its positions: every token is real, and no document sees another."""
    trainer = sft_trainer(tiny, tmp_path / "out", **MODES[mode])
    before = updates_of(trainer.model)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.2
    assert updates_of(trainer.model) == [count + STEPS for count in before]
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch and len(batch["input_ids"]) == 1
    slices = documents_of(batch)
    assert len(slices) >= 4
    with record_routing(trainer.model.train()) as record, torch.no_grad():
        trainer.model(**batch)
    assert set(record.tokens.values()) == {batch["input_ids"].numel()}
    model = trainer.model.eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        together = model(**inputs).logits[0]
        for part in slices:
            alone = model(input_ids=batch["input_ids"][:, part], use_cache=False).logits[0]
            assert torch.allclose(together[part], alone, atol=1e-4)
