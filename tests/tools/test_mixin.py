"""ExpertChoiceTrainerMixin before the trainers of Transformers and TRL, a few steps each on stories260K."""

import itertools
import math
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STORIES_TEXT
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import ecmoe
from ecmoe.finetune import ExpertChoiceTrainerMixin, RecipeError
from modeling_ecmoe import sparse_blocks

pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning:transformers.*")

OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "disable_tqdm": True,
    "save_strategy": "steps",
    "save_steps": 4,
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """In an order of their own: those of the file change on the way."""
    found = [text.strip() for text in STORIES_TEXT.read_text(encoding="utf-8").split("<|endoftext|>")[:1000]]
    random.Random(0).shuffle(found)
    return found


@pytest.fixture
def load(stories: Path) -> Any:
    """Model, upcycled without bounds and with two experts a token, and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.pad_token = tokenizer.eos_token
    return lambda: (AutoModelForCausalLM.from_pretrained(stories), tokenizer)


def of_trl(name: str) -> tuple[type, type]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own, of features that are not used here
        import trl
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


def finite_losses(trainer: Any) -> list[float]:
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == trainer.state.max_steps and all(map(math.isfinite, losses))
    return losses


def assert_calibrated(
    trainer: Any, texts: list[str], tokenizer: Any, folder: Path, within: float, continued: bool = False
) -> None:
    """The saved thresholds are measured, not averaged, and give every expert its share of other text."""
    saved = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-4")
    for one, two in zip(sparse_blocks(saved).values(), sparse_blocks(trainer.model).values(), strict=True):
        assert torch.equal(one.gate.threshold, two.gate.threshold)
        assert one.gate.threshold_updates == 10  # what a calibration counts as
    if continued:
        starts = tokenizer([text[:30] for text in texts], padding=True, padding_side="left", return_tensors="pt")
        drawn = saved.generate(**starts, do_sample=True, max_new_tokens=200, top_k=0)
        texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    rows = tokenizer(texts, truncation=True, max_length=256)["input_ids"]  # as long as those that were trained on
    batches = [{"input_ids": torch.tensor([row])} for row in rows]
    summary = ecmoe.routing_report(saved, batches)["summary"]
    print(summary)
    assert 1 - within < summary["load_min"] and summary["load_max"] < 1 + within


def test_on_trainer(load: Any, texts: list[str], tmp_path: Path) -> None:
    class Tuned(ExpertChoiceTrainerMixin, Trainer): ...

    model, tokenizer = load()
    rows = Dataset.from_dict({"text": texts}).map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns=["text"]
    )
    trainer = Tuned(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **OPTIONS),
        train_dataset=rows.select(range(600)),
        eval_dataset=rows.select(range(600, 640)),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        router_learning_rate=1e-4,
    )
    trainer.train()
    finite_losses(trainer)
    assert len({group["initial_lr"] for group in trainer.optimizer.param_groups}) == 2
    assert_calibrated(trainer, texts[640:], tokenizer, tmp_path, 0.1)
    found = trainer.evaluate()
    assert found["eval_loss_gap"] == pytest.approx(found["eval_loss"] - found["eval_loss_top_k"], abs=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_on_sft_trainer(
    packing: bool, load: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer_class, config_class = of_trl("SFT")

    class Tuned(ExpertChoiceTrainerMixin, trainer_class): ...

    if packing:  # a batch is one row there, and attention over it slow on a CPU
        monkeypatch.setattr("ecmoe.finetune.calibration.CALIBRATION_TOKENS", 32_768)
        monkeypatch.setattr("ecmoe.finetune.calibration.CALIBRATION_POOL", 2_048)
    model, tokenizer = load()
    trainer = Tuned(
        model=model,
        args=config_class(output_dir=str(tmp_path), max_length=256, packing=packing, eval_packing=False, **OPTIONS),
        train_dataset=Dataset.from_dict({"text": texts[:600]}),
        eval_dataset=Dataset.from_dict({"text": texts[600:640]}),
        processing_class=tokenizer,
    )
    trainer.train()
    finite_losses(trainer)
    assert_calibrated(trainer, texts[640:], tokenizer, tmp_path, 0.1)
    if not packing:
        by_eight = trainer.evaluate()
        trainer.args.per_device_eval_batch_size = 3
        assert trainer.evaluate()["eval_loss"] == pytest.approx(by_eight["eval_loss"], abs=1e-5)
        assert by_eight["eval_loss_top_k"] > 0


ROUTER_LOSSES = {
    "z-loss": {"router_z_loss_coef": 0.01},
    "balance": {"routing": "token_choice", "inference_routing": "token_choice", "router_aux_loss_coef": 10.0},
}


@pytest.mark.parametrize("fields", ROUTER_LOSSES.values(), ids=list(ROUTER_LOSSES))
def test_the_router_s_losses_are_those_of_the_model(
    fields: dict[str, Any], load: Any, texts: list[str], tmp_path: Path
) -> None:
    """TRL computes the loss beside the model, of all layers' balance at once, and without a z-loss."""
    trainer_class, config_class = of_trl("SFT")

    class Tuned(ExpertChoiceTrainerMixin, trainer_class): ...

    model, tokenizer = load()
    for name, value in fields.items():
        setattr(model.config, name, value)
    trainer = Tuned(
        model=model,
        args=config_class(output_dir=str(tmp_path), max_length=64, **OPTIONS),
        train_dataset=Dataset.from_dict({"text": texts[:32]}),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    items = (batch["labels"][:, 1:] != -100).sum() * 3  # one of three micro-batches
    for number in (None, items):
        plain = model.eval()(**batch, num_items_in_batch=number).loss.item()
        expected = model.train()(**batch, num_items_in_batch=number).loss.item()
        found = trainer.compute_loss(model, dict(batch), num_items_in_batch=number).item()
        assert found == pytest.approx(expected, abs=1e-5)
        if number is None:
            assert expected > plain + 1e-3
    trainer.train()
    finite_losses(trainer)


def test_a_balance_loss_of_expert_choice_is_refused(load: Any, texts: list[str], tmp_path: Path) -> None:
    trainer_class, config_class = of_trl("SFT")

    class Tuned(ExpertChoiceTrainerMixin, trainer_class): ...

    model, tokenizer = load()
    with pytest.raises(RecipeError, match=r"router_aux_loss_coef=0\.1 balances token choice, and routing=exp"):
        Tuned(
            model=model,
            args=config_class(output_dir=str(tmp_path), router_aux_loss_coef=0.1, **OPTIONS),
            train_dataset=Dataset.from_dict({"text": texts[:32]}),
            processing_class=tokenizer,
        )


def test_on_dpo_trainer(load: Any, texts: list[str], tmp_path: Path) -> None:
    trainer_class, config_class = of_trl("DPO")

    class Tuned(ExpertChoiceTrainerMixin, trainer_class): ...

    model, tokenizer = load()
    halves = [(text[:60], text[60:500], other[60:500]) for text, other in itertools.pairwise(texts)]
    prompts, chosen, rejected = (list(column) for column in zip(*halves[:600], strict=True))
    trainer = Tuned(
        model=model,
        args=config_class(output_dir=str(tmp_path), max_length=256, **OPTIONS),
        train_dataset=Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected}),
        processing_class=tokenizer,
    )
    trainer.train()
    finite_losses(trainer)
    assert_calibrated(trainer, texts[640:], tokenizer, tmp_path, 0.1)


def test_on_grpo_trainer(load: Any, texts: list[str], tmp_path: Path) -> None:
    trainer_class, config_class = of_trl("GRPO")

    class Tuned(ExpertChoiceTrainerMixin, trainer_class): ...

    model, tokenizer = load()
    options = OPTIONS | {"per_device_train_batch_size": 128, "learning_rate": 1e-5}
    trainer = Tuned(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=config_class(output_dir=str(tmp_path), num_generations=2, max_completion_length=200, **options),
        train_dataset=Dataset.from_dict({"prompt": [text[:30] for text in texts[:640]]}),
        processing_class=tokenizer,
    )
    trainer.train()
    finite_losses(trainer)
    # Its thresholds are of the stories that it goes on with itself.
    assert_calibrated(trainer, texts[640:], tokenizer, tmp_path, 0.1, continued=True)
