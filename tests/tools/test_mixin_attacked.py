"""The mixin with what people set beside it: other losses, other collators, one trainer used twice."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_tokenizer
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from ecmoe.finetune import ExpertChoiceTrainerMixin, RecipeError
from modeling_ecmoe import sparse_blocks

OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 0.0,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_nan_inf_filter": False,
    "activation_checkpointing": False,
}


class OnTrainer(ExpertChoiceTrainerMixin, Trainer): ...


class OnSFT(ExpertChoiceTrainerMixin, SFTTrainer): ...


class OnGRPO(ExpertChoiceTrainerMixin, GRPOTrainer): ...


@pytest.fixture
def model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny / "ecmoe")


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def rows(tokenizer: Any) -> Dataset:
    texts = [f"Number {n}: " + "a word " * (1 + n * 5 % 7) for n in range(22)]
    return Dataset.from_dict({"text": texts, "input_ids": tokenizer(texts)["input_ids"]})


def of(kind: type, model: Any, tokenizer: Any, rows: Dataset, folder: Path, **more: Any) -> Any:
    config = SFTConfig if kind is OnSFT else TrainingArguments
    options = {name: more.pop(name) for name in list(more) if name in config.__dataclass_fields__}
    more.setdefault("data_collator", DataCollatorForLanguageModeling(tokenizer, mlm=False))
    return kind(
        model=model,
        args=config(output_dir=str(folder), **OPTIONS | options),
        train_dataset=rows.select(range(12)),
        eval_dataset=rows.select(range(12, 22)),
        processing_class=tokenizer,
        **more,
    )


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def of_hundreds(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return 100 * torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("way", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": of_hundreds}])
def test_router_losses_join_other_losses_of_trainer(
    way: dict[str, Any], tiny: Path, tokenizer: Any, rows: Dataset, tmp_path: Path
) -> None:
    found = []
    for coefficient in (0.0, 1.0):
        model = AutoModelForCausalLM.from_pretrained(tiny / "ecmoe")
        model.config.router_z_loss_coef = coefficient
        found.append(losses(of(OnTrainer, model, tokenizer, rows, tmp_path, **way)))
    assert all(with_z > without + 0.1 for without, with_z in zip(*found, strict=True))


def test_router_losses_of_grpo_are_those_of_a_step(tiny: Path, tokenizer: Any, tmp_path: Path) -> None:
    """However many micro-batches it has."""
    found = []
    for accumulation in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(tiny / "ecmoe")
        model.config.router_z_loss_coef = 1.0
        options = OPTIONS | {"per_device_train_batch_size": 4 // accumulation, "max_steps": 1}
        trainer = OnGRPO(
            model=model,
            reward_funcs=lambda completions, **_: [1.0] * len(completions),
            args=GRPOConfig(
                output_dir=str(tmp_path),
                num_generations=2,
                max_completion_length=4,
                gradient_accumulation_steps=accumulation,
                **options,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["Number one: "] * 8}),
            processing_class=tokenizer,
        )
        found += losses(trainer)
    assert found[0] > 0.1 and found[1] == pytest.approx(found[0], rel=0.3)  # what it writes differs


def test_another_loss_stays_the_trainer_s(model: Any, tokenizer: Any, rows: Dataset, tmp_path: Path) -> None:
    """And the likelihood stands beside it, the same whatever the batches."""
    plain = of(OnTrainer, model, tokenizer, rows, tmp_path).evaluate()
    assert "eval_nll" not in plain
    other = of(OnTrainer, model, tokenizer, rows, tmp_path, compute_loss_func=of_hundreds).evaluate()
    assert other["eval_loss"] > 50 * plain["eval_loss"]
    assert other["eval_nll"] == pytest.approx(plain["eval_loss"], abs=1e-5)
    assert other["eval_loss_gap"] == pytest.approx(plain["eval_loss_gap"], abs=1e-5)

    class Own(OnTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(model, inputs, *args, **kwargs)
            return (found[0] + 700, *found[1:]) if isinstance(found, tuple) else found + 700

    assert of(Own, model, tokenizer, rows, tmp_path).evaluate()["eval_loss"] > 700
    dft = of(OnSFT, model, tokenizer, rows, tmp_path, loss_type="dft", data_collator=None, max_length=64).evaluate()
    assert dft["eval_nll"] == pytest.approx(plain["eval_loss"], abs=1e-5) and dft["eval_loss"] < dft["eval_nll"]


def test_rows_that_a_collator_flattens(model: Any, tokenizer: Any, rows: Dataset, tmp_path: Path) -> None:
    """Transformers' own collator says nothing of the rows; their losses are told apart all the same."""
    expected = of(OnTrainer, model, tokenizer, rows, tmp_path).evaluate()["eval_loss"]
    trainer = of(OnTrainer, model, tokenizer, rows, tmp_path, data_collator=DataCollatorWithFlattening())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert "row_lengths" in next(iter(trainer.get_eval_dataloader()))


def test_columns_that_the_model_does_not_take(model: Any, tokenizer: Any, rows: Dataset, tmp_path: Path) -> None:
    """Rows with their text, as everybody has them: calibration leaves it out as the trainer does."""
    trainer = of(OnTrainer, model, tokenizer, rows, tmp_path, learning_rate=1e-2)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def thresholds(model: Any) -> torch.Tensor:
    return torch.stack([block.gate.threshold.clone() for block in sparse_blocks(model).values()])


@pytest.mark.parametrize("look", ["evaluate", "predict", "save_model"])
def test_thresholds_catch_up_wherever_they_are_looked_at(
    look: str, model: Any, tokenizer: Any, rows: Dataset, tmp_path: Path
) -> None:
    """Also when one trainer trains twice, and the second time for fewer steps."""
    trainer = of(OnTrainer, model, tokenizer, rows, tmp_path, learning_rate=1e-2, max_steps=4)
    for steps in (4, 2):
        trainer.args.max_steps = steps
        trainer.train()
        before = thresholds(model)
        getattr(trainer, look)(*([trainer.eval_dataset] if look == "predict" else []))
        found = thresholds(model)
        assert not torch.equal(before, found)
        trainer.calibration.run()
        torch.testing.assert_close(thresholds(model), found, atol=0, rtol=0)


def test_no_number_in_one_of_several_evaluations(model: Any, tokenizer: Any, rows: Dataset, tmp_path: Path) -> None:
    trainer = of(OnTrainer, model, tokenizer, rows, tmp_path)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RecipeError, match="eval_a_loss=nan before any training"):
        trainer.evaluate({"a": rows.select(range(4)), "b": rows.select(range(4))})
