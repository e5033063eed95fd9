"""Two ranks over gloo against one process: data parallel, FSDP2, expert parallel, one pool for all ranks."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, assert_same_run, comparable, finish, start_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ecmoe.finetune import run
from ecmoe.finetune.folder import as_yaml, last_whole_checkpoint
from modeling_ecmoe import calibrate_thresholds, sparse_blocks

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.usefixtures("quick_end"),
]

CODE = {"configuration_ecmoe.py", "llama_ecmoe.py", "block_ecmoe.py", "router_ecmoe.py", "routing_ecmoe.py"}
WEIGHTS = "model.safetensors"
ONE_BATCH = {
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "per_device_eval_batch_size": 16,
    "learning_rate": 5e-4,
    "adam_epsilon": 1e-4,  # or the signs of gradients that are nothing but rounding errors decide
}
# FSDP2 divides the gradients of experts by another factor when they are float64 (torch 2.13), as it does for float16.
SINGLE = {"dtype": "float32", "learning_rate": 2e-4}
PADDED = {"packing": False, "too_long": "drop"}
# What two ranks run, and the process that they follow.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ddp": ({}, {"gradient_accumulation_steps": 2}),
    "fsdp": ({"distributed": {"fsdp_size": 2}}, {"gradient_accumulation_steps": 2}),
    "expert parallel": (
        SINGLE | {"distributed": {"fsdp_size": 2, "ep_size": 2}},
        SINGLE | {"gradient_accumulation_steps": 2},
    ),
    "equal splits": (
        SINGLE | {"distributed": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "equal_splits"}},
        SINGLE | {"gradient_accumulation_steps": 2},
    ),
    "global pool": ({"routing_pool": "global"}, {"routing_pool": "global", "per_device_train_batch_size": 8}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 4}),
    "streamed": ({"streaming": True}, {"streaming": True, "gradient_accumulation_steps": 2}),
    "padded stream": (PADDED | {"streaming": True}, PADDED | {"streaming": True, "gradient_accumulation_steps": 2}),
}


@pytest.fixture(scope="module")
def decided(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted model in float64, with routers that tell tokens apart: no rounding error moves one elsewhere."""
    folder = tmp_path_factory.mktemp("decided")
    model = AutoModelForCausalLM.from_pretrained(place / "ecmoe")
    tokenizer = AutoTokenizer.from_pretrained(place / "ecmoe")
    with torch.no_grad():
        for block in sparse_blocks(model).values():
            block.gate.weight.mul_(5)
    ids = tokenizer((place / "text.txt").read_text()[:6000], return_tensors="pt")["input_ids"]
    calibrate_thresholds(model, [{"input_ids": ids[:, : len(ids[0]) // 64 * 64].view(-1, 64)}])
    model.double().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def on_two_ranks(recipe: Any, tmp_path: Path) -> list[str]:
    """Runs the recipe on two ranks to its end; what they print."""
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe))
    codes = finish(start_ranks([str(tmp_path / "recipe.yaml")], tmp_path / "logs"))
    logs = [(tmp_path / "logs" / f"rank{rank}.log").read_text() for rank in range(2)]
    assert codes == [0, 0], logs[0][-3000:] + logs[1][-3000:]
    says = [any(line.startswith("weights ") for line in log.splitlines()) for log in logs]
    assert says == [True, False]  # what is said first is said once
    return logs


def follow(recipe_of: Callable, model: Path, tmp_path: Path, way: str, **fields: Any) -> dict[str, float]:
    """Largest differences of two ranks from one process: of losses, weights, thresholds, and reloaded logits."""
    ranks, alone = WAYS[way]
    fields = ONE_BATCH | fields | {"model": model, "eval_strategy": "steps", "save_strategy": "steps"}
    fields |= {"eval_steps": fields["max_steps"] // 2, "save_steps": fields["max_steps"] // 2}
    if "packing" in ranks:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": "word " * (1 + number % 13)}) + "\n" for number in range(90)))
        fields |= {"dataset": rows}
    two = recipe_of(**fields | ranks, output_dir=tmp_path / "two")
    logs = on_two_ranks(two, tmp_path)
    assert logs[0].count("causal loss after") == 1 and "causal loss after" not in logs[1]
    run(recipe_of(**fields | alone, output_dir=tmp_path / "one"))
    found, expected = comparable(tmp_path / "two"), comparable(tmp_path / "one")
    differences: dict[str, float] = {"loss": 0.0, "weights": 0.0, "thresholds": 0.0}
    assert len(found[1]) == len(expected[1]) > fields["max_steps"]
    for row, other in zip(found[1], expected[1], strict=True):
        for name in ("loss", "eval_loss"):
            assert (name in row) == (name in other)
            differences["loss"] = max(differences["loss"], abs(row.get(name, 0) - other.get(name, 0)))
    halfway = [load_file(tmp_path / name / f"checkpoint-{fields['save_steps']}" / WEIGHTS) for name in ("two", "one")]
    for mine, other in ((found[0], expected[0]), halfway):
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            what = "thresholds" if "threshold" in name else "weights"
            differences[what] = max(differences[what], (tensor - other[name]).abs().max().item())
    assert found[2]["tokens"] == expected[2]["tokens"]
    assert {path.name for path in (tmp_path / "two").iterdir()} >= CODE
    ids = torch.randint(3, 300, (2, 50))
    with torch.no_grad():
        models = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("two", "one"))
        logits = [model(ids).logits for model in models]
    differences["logits"] = (logits[0] - logits[1]).abs().max().item()
    print(way, fields["max_steps"], "steps:", {name: f"{value:.1e}" for name, value in differences.items()})
    return differences


SLOW = pytest.mark.slow
FAST_WAYS = [pytest.param(way, marks=SLOW if way in ("accumulation", "streamed") else ()) for way in WAYS]


@pytest.mark.parametrize("way", FAST_WAYS)
def test_two_ranks_follow_one_process(recipe_of: Callable, decided: Path, tmp_path: Path, way: str) -> None:
    """Four steps, with an evaluation and a checkpoint in between; the slow test goes on to thirty."""
    differences = follow(recipe_of, decided, tmp_path, way, max_steps=4)
    assert max(differences.values()) < (1e-4 if way in ("expert parallel", "equal splits") else 1e-6), differences


@SLOW
@pytest.mark.parametrize("way", ["ddp", "fsdp", "expert parallel", "equal splits", "global pool"])
def test_thirty_steps(recipe_of: Callable, decided: Path, tmp_path: Path, way: str) -> None:
    differences = follow(recipe_of, decided, tmp_path, way, max_steps=30)
    assert max(differences.values()) < (1e-4 if way in ("expert parallel", "equal splits") else 1e-6), differences


def test_a_pool_of_each_rank_is_told_apart(recipe_of: Callable, decided: Path, tmp_path: Path) -> None:
    """Negative control: one process with the whole batch is not what two ranks with a pool each follow."""
    WAYS["each its pool"] = ({}, {"per_device_train_batch_size": 8})
    differences = follow(recipe_of, decided, tmp_path, "each its pool", max_steps=4)
    assert differences["weights"] > 1e-3


def test_a_rank_that_dies(recipe_of: Callable, tmp_path: Path) -> None:
    """The other one ends with one line, and the checkpoint that was written stays."""
    recipe = recipe_of(max_steps=9, save_strategy="steps", save_steps=2)
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe))
    codes = finish(start_ranks([str(tmp_path / "recipe.yaml")], tmp_path / "logs", dying=(1, 3)))
    assert codes == [2, 1]
    log = (tmp_path / "logs" / "rank0.log").read_text()
    (line,) = [line for line in log.splitlines() if "error" in line]
    checkpoint = Path(recipe.output_dir) / "checkpoint-2"
    assert "ecmoe-finetune: error: another process of this run has ended" in line
    assert line.endswith(f"the same command goes on from {checkpoint}")
    assert "Traceback" not in log
    assert last_whole_checkpoint(checkpoint.parent) == checkpoint


@SLOW
def test_two_ranks_killed_and_run_again(recipe_of: Callable, tmp_path: Path) -> None:
    """kill -9 of both while the second checkpoint is written; bit for bit the run that was not stopped."""
    fields = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    on_two_ranks(recipe_of(**fields, output_dir=tmp_path / "whole"), tmp_path)
    recipe = recipe_of(**fields, output_dir=tmp_path / "killed")
    (tmp_path / "killed.yaml").write_text(as_yaml(recipe))
    processes = start_ranks([str(tmp_path / "killed.yaml")], tmp_path / "logs")
    while not (tmp_path / "killed" / "checkpoint-6").exists() and processes[0].exitcode is None:
        time.sleep(0.001)
    for process in processes:
        process.kill()
    assert finish(processes) == [-9, -9]
    on_two_ranks(recipe, tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@SLOW
def test_under_accelerate_launch(place: Path, recipe_of: Callable, tmp_path: Path) -> None:
    """The launcher starts the same two ranks: the results are those of the ranks above."""
    recipe = recipe_of(max_steps=4)
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command += ["-m", "ecmoe.finetune", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("causal loss after") == 1
    launched = comparable(Path(recipe.output_dir))
    assert launched[2]["tokens"] == 4 * 2 * 8 * 64
    on_two_ranks(recipe_of(max_steps=4, output_dir=tmp_path / "ranks"), tmp_path)
    ours = comparable(tmp_path / "ranks")
    # Not the thresholds: those are calibrated on less text above.
    assert all(torch.equal(launched[0][name], ours[0][name]) for name in ours[0] if "threshold" not in name)
