"""Fine-tuning: expert-choice and dense by the same recipe, alone and under accelerate, and refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_dense, write_text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from conversion import convert
from finetune import RecipeError, load_recipe, run
from finetune.cli import main
from finetune.data import prepare
from modeling_ecmoe import sparse_blocks

RECIPE = """
sequence_length: 64
validation_fraction: 0.2
max_eval_sequences: 16
per_device_train_batch_size: 8
max_steps: 12
learning_rate: 3e-3
save_strategy: "no"
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense checkpoint, its expert-choice conversion, text and a recipe."""
    folder = tmp_path_factory.mktemp("finetune")
    write_dense(folder / "dense", "Llama", initializer_range=0.02)
    text = write_text(folder / "text.txt", documents=12)
    convert(str(folder / "dense"), str(folder / "ecmoe"), num_experts=4, text=str(text))
    (folder / "recipe.yaml").write_text(RECIPE + f"dataset: {text}\n")
    return folder


@pytest.mark.parametrize("name", ["dense", "ecmoe"])
def test_learns_and_the_result_loads(place: Path, tmp_path: Path, name: str) -> None:
    recipe = load_recipe(place / "recipe.yaml", [f"model={place / name}", f"output_dir={tmp_path / 'out'}"])
    results = run(recipe)
    assert results["loss_after"] < results["loss_before"] - 0.1
    assert (results["steps"], results["tokens"]) == (12, 12 * 8 * 64)
    assert results["tokens_per_second"] > 0
    assert json.loads((tmp_path / "out" / "finetune_results.json").read_text()) == results
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    # The figure is the loss of the model that was saved.
    _, held_out = prepare(recipe, tokenizer)
    rows = torch.tensor(held_out["input_ids"])
    with torch.no_grad():
        assert model(rows, labels=rows).loss.item() == pytest.approx(results["loss_after"], abs=1e-4)
    if name == "ecmoe":
        assert results["active_parameters"] < results["parameters"]
        assert results["loss_before"] == pytest.approx(dense_loss(place, rows), abs=1e-5)
        assert 0.4 < results["routing"]["load_min"] <= results["routing"]["load_max"] < 1.8
        assert "block_ecmoe.py" in {path.name for path in (tmp_path / "out").iterdir()}
    else:
        assert results["active_parameters"] == results["parameters"]
        assert "routing" not in results


@torch.no_grad()
def dense_loss(place: Path, rows: torch.Tensor) -> float:
    return AutoModelForCausalLM.from_pretrained(place / "dense").eval()(rows, labels=rows).loss.item()


def test_both_models_see_the_same_text_and_held_out_documents_are_never_trained_on(place: Path, tmp_path: Path) -> None:
    overrides = [f"output_dir={tmp_path}", "append_eos=false"]
    packed = []
    for name in ("dense", "ecmoe"):
        recipe = load_recipe(place / "recipe.yaml", [f"model={place / name}", *overrides])
        packed.append(prepare(recipe, AutoTokenizer.from_pretrained(place / name)))
    for mine, other in zip(*packed, strict=True):
        assert mine["input_ids"] == other["input_ids"]
    train, held_out = packed[0]
    seen = {tuple(row) for row in train["input_ids"]}
    assert len(held_out) and not seen.intersection(map(tuple, held_out["input_ids"]))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_plain_trainer_keeps_the_thresholds(place: Path, tmp_path: Path, accumulation: int) -> None:
    """Nothing of ours is needed: one update per optimiser step, whatever the accumulation."""
    model = AutoModelForCausalLM.from_pretrained(place / "ecmoe")
    before = {name: block.gate.threshold.clone() for name, block in sparse_blocks(model).items()}
    updates = {name: int(block.gate.threshold_updates) for name, block in sparse_blocks(model).items()}
    rows = torch.randint(3, 300, (24, 32))
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator).train()
    for name, block in sparse_blocks(model).items():
        assert block.gate.threshold_updates == updates[name] + 4
        assert not torch.equal(block.gate.threshold, before[name])


def test_two_processes_under_accelerate(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command += ["-m", "finetune", str(place / "recipe.yaml"), "use_cpu=true"]
    command += [f"model={place / 'ecmoe'}", f"output_dir={out}", "max_steps=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "finetune_results.json").read_text())
    assert results["tokens"] == 4 * 2 * 8 * 64
    assert results["loss_after"] < results["loss_before"]
    assert done.stdout.count("causal loss after") == 1
    AutoModelForCausalLM.from_pretrained(out)


REFUSALS = {
    "learning_rte=1": "learning_rte=1 is no field of a recipe; did you mean learning_rate?",
    "sequence_lenght=3": "did you mean sequence_length?",
    "sequence_length=many": "sequence_length",
    "sequence_length=1": "sequence_length=1 must be at least 2",
    "sequence_length=4096": "is more than the model's 128 positions",
    "validation_fraction=2": "validation_fraction=2 must be",
    "dtype=float8": "dtype=float8 is unknown",
    "model=/no/such/model": "model=/no/such/model does not exist",
    "dataset=/no/such.txt": "dataset=/no/such.txt does not exist",
    "dataset=@x": "is not valid YAML",
    "learning_rate=fast": "learning_rate='fast' must be float",
    "max_steps=abc": "max_steps='abc' must be int",
    "validation_fraction=0.9999999": "leaves nothing to learn from",
    "resume_from_checkpoint=true": "finds no checkpoint",
    "output_dir=/etc/passwd": "output_dir=/etc/passwd is a file",
    "dataset=missing.txt": "dataset=missing.txt cannot be read",
    "dataset=missing.jsonl": "dataset=missing.jsonl cannot be read",
    "lr_scheduler_type=wavy": "TrainingArguments refuses",
    "max_steps": "must be written as field=value",
    "output_dir=": "output_dir is missing",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_refusals(place: Path, tmp_path: Path, override: str, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = [f"model={place / 'dense'}", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stop:
        main([str(place / "recipe.yaml"), *fixed, override])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ecmoe-finetune: error:")]
    assert len(lines) == 1
    assert REFUSALS[override] in lines[0]
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_folder_in_use_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recipe = load_recipe(place / "recipe.yaml", [f"model={place / 'dense'}", f"output_dir={tmp_path}"])
    with pytest.raises(RecipeError, match="is not empty"):
        run(recipe)


def test_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match="field: value"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_a_stopped_run_goes_on_and_a_finished_one_does_not(place: Path, tmp_path: Path) -> None:
    """From its checkpoint a run ends with the weights and thresholds of the run that was not stopped."""
    fixed = [f"model={place / 'ecmoe'}", "save_strategy=steps", "save_steps=2", "max_steps=4"]
    run(load_recipe(place / "recipe.yaml", [*fixed, f"output_dir={tmp_path / 'whole'}"]))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    overrides = [*fixed, f"output_dir={tmp_path / 'stopped'}", "resume_from_checkpoint=true"]
    run(load_recipe(place / "recipe.yaml", overrides))
    whole, stopped = (load_file(tmp_path / name / "checkpoint-4/model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    with pytest.raises(RecipeError, match="was reached already"):
        run(load_recipe(place / "recipe.yaml", overrides))


def test_a_column_that_is_no_text(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"text": n, "story": None if n % 2 else "Some words."}) + "\n" for n in range(9))
    )
    fixed = [f"model={place / 'dense'}", f"output_dir={tmp_path}", f"dataset={path}"]
    tokenizer = AutoTokenizer.from_pretrained(place / "dense")
    with pytest.raises(RecipeError, match="text_column=text holds"):
        prepare(load_recipe(place / "recipe.yaml", fixed), tokenizer)
    with pytest.raises(RecipeError, match="gives no"):  # null rows are left out, five short ones stay
        prepare(load_recipe(place / "recipe.yaml", [*fixed, "text_column=story"]), tokenizer)


def test_text_column_of_a_jsonl_file(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"story": f"Once upon a time {n} ran. " * 30}) + "\n" for n in range(20)))
    fixed = [f"model={place / 'dense'}", f"output_dir={tmp_path}", f"dataset={path}"]
    tokenizer = AutoTokenizer.from_pretrained(place / "dense")
    with pytest.raises(RecipeError, match="did you mean story"):
        prepare(load_recipe(place / "recipe.yaml", fixed), tokenizer)
    train, held_out = prepare(load_recipe(place / "recipe.yaml", [*fixed, "text_column=story"]), tokenizer)
    assert len(train) > len(held_out) > 0
