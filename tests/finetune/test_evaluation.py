"""A held-out loss is that of the learned tokens: whatever batches, ranks and padding its rows come in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import finish, start_ranks
from torch import nn
from transformers import AutoModelForCausalLM

from ecmoe.finetune import run
from ecmoe.finetune.folder import as_yaml
from ecmoe.finetune.losses import LossSums
from ecmoe.finetune.train import make_trainer
from modeling_ecmoe import calibrate_thresholds, sparse_blocks, use_inference_routing


@pytest.fixture(scope="module")
def answers(place: Path) -> Path:
    """Answers of one word and of forty."""
    rows = [{"prompt": f"Say cat {n}.", "completion": " cat" * (1 if n % 3 else 40)} for n in range(40)]
    (place / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place / "answers.jsonl"


def loss_by_hand(model: Any, held_out: Any, routing: str) -> float:
    """Row by row, without batches; by routes that hang on nothing but a token."""
    total, learned = 0.0, 0
    with use_inference_routing(model, routing), torch.no_grad():
        for row in held_out:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logits = model.eval()(input_ids=ids).logits[0, :-1].float()
            total += nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
            learned += int((labels[1:] != -100).sum())
    return total / learned


PADDED = {"packing": False, "too_long": "truncate"}
# How rows become batches: one beside the other; all of a batch as one row; packed by TRL, and those as one row.
BATCHES: dict[str, dict[str, Any]] = {
    "padded": PADDED,
    "one row": {"packing": False, "padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 96, "too_long": "truncate"},
}


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("name", ["dense", "ecmoe"])
def test_the_loss_is_the_same_for_every_batch_size(
    name: str, batches: str, place: Path, answers: Path, recipe_of: Callable, quick_end: None
) -> None:
    """Case 2, causal and, for one row at a time, by hand; and so are what TRL logs beside it."""
    losses = []
    for size in (1, 2, 7):
        fields = {"model": place / name, "dataset": answers, "max_length": 96}
        trainer = make_trainer(recipe_of(**fields | BATCHES[batches], per_device_eval_batch_size=size))
        trainer.evaluate()
        losses.append(trainer.state.log_history[-1])
    for figure in ("eval_entropy", "eval_mean_token_accuracy"):
        assert losses[0][figure] == pytest.approx(losses[1][figure], abs=1e-5)
        assert losses[0][figure] == pytest.approx(losses[2][figure], abs=1e-5)
    trainer = make_trainer(recipe_of(**fields | PADDED))
    expected = loss_by_hand(trainer.model, trainer.eval_dataset, "threshold")
    for found in losses:
        assert found["eval_loss"] == pytest.approx(expected, abs=1e-5)
        if name == "ecmoe":
            assert found["eval_loss_gap"] == pytest.approx(found["eval_loss"] - found["eval_loss_top_k"], abs=1e-6)
    means = [abs(found["eval_loss"] - loss_by_rows(trainer)) for found in losses]
    assert min(means) > 0.003  # a mean of rows' means would be told apart


def loss_by_rows(trainer: Any) -> float:
    """What batches of one row would give as the mean of their means."""
    found = []
    with torch.no_grad():
        for row in trainer.eval_dataset:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logits = trainer.model.eval()(input_ids=ids).logits[0, :-1].float()
            found.append(nn.functional.cross_entropy(logits, labels[1:]).item())
    return sum(found) / len(found)


def test_the_best_checkpoint_is_that_of_the_lowest_loss(
    place: Path, answers: Path, recipe_of: Callable, tmp_path: Path, quick_end: None
) -> None:
    fields = {"dataset": answers, "packing": False, "too_long": "truncate", "max_steps": 6, "learning_rate": 1e-2}
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(recipe_of(**fields, **steps, load_best_model_at_end=True, per_device_eval_batch_size=3))
    trainer.train()
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert trainer.state.best_metric == min(losses.values())
    assert loss_by_hand(trainer.model, trainer.eval_dataset, "threshold") == pytest.approx(
        min(losses.values()), abs=1e-5
    )


@pytest.mark.parametrize("batches", BATCHES)
def test_two_ranks_give_the_loss_of_one(
    batches: str, place: Path, answers: Path, recipe_of: Callable, tmp_path: Path
) -> None:
    """Held-out rows that do not divide by the ranks are not counted twice."""
    fields = {"dataset": answers, "max_length": 96, "max_steps": 1, "learning_rate": 0.0} | PADDED
    fields |= {"validation_fraction": 0.18, "per_device_eval_batch_size": 2}  # seven rows or eight, and four at once
    two = recipe_of(**fields | BATCHES[batches], output_dir=tmp_path / "two")
    (tmp_path / "recipe.yaml").write_text(as_yaml(two))
    assert finish(start_ranks([str(tmp_path / "recipe.yaml")], tmp_path / "logs")) == [0, 0]
    one = run(recipe_of(**fields, output_dir=tmp_path / "one"))
    found = json.loads((tmp_path / "two" / "finetune_results.json").read_text())
    assert found["loss_before"] == pytest.approx(one["loss_before"], abs=1e-5)


def test_sums_of_a_fused_head_are_those_of_logits() -> None:
    """TRL's head gives log-probabilities where the model gives logits."""
    labels = torch.tensor([[-100, 3, 4, -100], [-100, -100, 2, 1]])
    logits = torch.randn(2, 4, 6)
    mask = labels[:, 1:] != -100
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * mask
    others = {"entropy": None, "is_top1": None}
    sums = []
    for output in ({"logits": logits, "log_probs": None}, {"log_probs": log_probs, "label_mask": mask, **others}):
        held, module = LossSums(), Emits(type("Output", (), output))
        with held.watch(module, labels, None):
            module()
        held.gather(type("Accelerator", (), {"gather_for_metrics": staticmethod(lambda rows: rows)}))
        sums.append((held.means()["loss"], held.totals["tokens"]))
    assert sums[0][0] == pytest.approx(sums[1][0], abs=1e-6) and sums[0][1] == sums[1][1] == 4


class Emits(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self) -> Any:
        return self.output


def test_thresholds_are_those_of_the_weights_that_are_kept(
    place: Path, recipe_of: Callable, tmp_path: Path, quick_end: None
) -> None:
    """Case 5: a schedule-free optimiser trains other weights than it evaluates and saves."""
    pytest.importorskip("schedulefree")
    fields = {"optim": "schedule_free_adamw", "learning_rate": 1e-2, "max_steps": 20, "lr_scheduler_type": "constant"}
    for evaluates in ("no", "steps"):
        out = tmp_path / evaluates
        steps = {"save_strategy": "steps", "save_steps": 10, "eval_strategy": evaluates, "eval_steps": 10}
        trainer = make_trainer(recipe_of(**fields, **steps, output_dir=out))
        trainer.train()
        inputs = trainer.calibration.inputs
        for name in ("checkpoint-10", "checkpoint-20"):
            saved = AutoModelForCausalLM.from_pretrained(out / name)
            kept = {key: block.gate.threshold.clone() for key, block in sparse_blocks(saved).items()}
            calibrate_thresholds(saved, inputs)
            for key, block in sparse_blocks(saved).items():
                torch.testing.assert_close(kept[key], block.gate.threshold, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_stream_of_one_part_and_several_workers(
    kind: str, place: Path, recipe_of: Callable, tmp_path: Path, quick_end: None
) -> None:
    """Case 6: the workers beyond the parts of the stream end, instead of waiting for rows for ever."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "word " * (5 + n % 13)}) + "\n" for n in range(60)))
    dataset = rows if kind == "jsonl" else place / "text.txt"
    fields = {"dataset": dataset, "streaming": True, "dataloader_num_workers": 2, "max_steps": 4}
    assert run(recipe_of(**fields))["steps"] == 4
