"""Stopped at any moment, the same command goes on and ends with the bits of a run that was not stopped."""

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, comparable, start
from safetensors.torch import load_file

from finetune import RecipeError, load_recipe, run
from finetune.folder import as_yaml, last_whole_checkpoint

# Logging does not divide saving, epochs end between checkpoints, and evaluation falls between both.
STEPS = {
    "save_strategy": "steps",
    "save_steps": 4,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "save_total_limit": 2,
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"max_steps": 22, "router_learning_rate": 1e-3},
    "streamed": {"max_steps": 22, "streaming": True, "shuffle_buffer": 7},
    "epochs": {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch"},
    "lora": {"max_steps": 22, "lora": {"r": 4}, "sequence_length": 32},
}


def write_recipe(place: Path, path: Path, output: Path, **fields: Any) -> Path:
    """A recipe file of its own for a command line."""
    overrides = [f"{name}={value}" for name, value in STEPS.items() | fields.items()]
    recipe = load_recipe(place / "recipe.yaml", [f"model={place / 'ecmoe'}", f"output_dir={output}", *overrides])
    path.write_text(as_yaml(recipe))
    return path


def test_killed_and_run_again(recipe_of: Callable, place: Path, tmp_path: Path) -> None:
    """kill -9 at a random moment after the first checkpoint, in the fast suite once."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(recipe_of(**STEPS | WAYS["plain"] | {"output_dir": whole}))
    recipe = recipe_of(**STEPS | WAYS["plain"] | {"output_dir": killed})
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe))
    process = start([str(tmp_path / "recipe.yaml")], tmp_path / "log")
    kill_later(process, killed / "checkpoint-8", random.uniform(0, 0.3))
    assert process.exitcode == -9
    assert not (killed / "finetune_results.json").exists()
    assert last_whole_checkpoint(killed) is not None
    run(recipe)
    assert_same_run(whole, killed)
    with pytest.raises(RecipeError, match="is finished; name a new folder"):
        run(recipe)


def kill_later(process: Any, folder: Path, seconds: float) -> None:
    """kill -9 so long after the folder appears; 0 is while the checkpoint is being written."""
    for _ in range(60_000):
        if folder.exists() or process.exitcode is not None:
            break
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    process.join()


@pytest.mark.parametrize("way", WAYS)
def test_from_any_checkpoint(recipe_of: Callable, tmp_path: Path, way: str) -> None:
    """In a folder that holds the recipe and an early checkpoint the run ends as if it had not been stopped."""
    fields = STEPS | WAYS[way] | {"save_total_limit": None}
    whole = recipe_of(**fields | {"output_dir": tmp_path / "whole"})
    run(whole)
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) >= 3
    for number in (0, len(checkpoints) - 1):  # from the last one nothing is left to train
        stopped = recipe_of(**fields | {"output_dir": tmp_path / f"stopped{number}"})
        folder = Path(stopped.output_dir)
        shutil.copytree(checkpoints[number], folder / checkpoints[number].name)
        (folder / "finetune_recipe.yaml").write_text(as_yaml(stopped))
        run(stopped)
        assert_same_run(tmp_path / "whole", folder)


@pytest.mark.parametrize("harm", ["truncated", "empty", "missing", "weights", "optimiser", "model only"])
def test_a_checkpoint_cut_off_is_not_resumed_from(recipe_of: Callable, tmp_path: Path, harm: str) -> None:
    """The one before it is, and what was cut off is cleared away."""
    fields = STEPS | WAYS["plain"] | {"max_steps": 8, "eval_strategy": "no"}
    whole = recipe_of(**fields | {"output_dir": tmp_path / "whole"})
    run(whole)
    stopped = recipe_of(**fields | {"output_dir": tmp_path / "stopped"})
    folder = Path(stopped.output_dir)
    for step in (4, 8):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    (folder / "finetune_recipe.yaml").write_text(as_yaml(stopped))
    assert last_whole_checkpoint(folder) == folder / "checkpoint-8"
    state = folder / "checkpoint-8" / "trainer_state.json"
    if harm == "truncated":
        state.write_text(state.read_text()[:-20])
    elif harm == "empty":
        state.write_text("")
    else:
        gone = {"missing": "trainer_state.json", "weights": "model.safetensors", "optimiser": "optimizer.pt"}
        (folder / "checkpoint-8" / gone.get(harm, "rng_state.pth")).unlink()
    assert last_whole_checkpoint(folder) == folder / "checkpoint-4"
    run(stopped)
    assert_same_run(tmp_path / "whole", folder)
    assert last_whole_checkpoint(folder) == folder / "checkpoint-8"


def test_folders(recipe_of: Callable, tmp_path: Path) -> None:
    """Another recipe's folder and a stranger's are refused; one that was stopped before its first mark is not."""
    out = tmp_path / "out"
    first = recipe_of(max_steps=2, save_strategy="steps", save_steps=1)
    out.mkdir()
    (out / "finetune_recipe.yaml.unfinished").write_text("model:")
    run(first)
    (out / "finetune_results.json").unlink()  # stopped just before the end
    with pytest.raises(RecipeError, match="holds another run"):
        run(recipe_of(max_steps=3, save_strategy="steps", save_steps=1))
    results = run(recipe_of(max_steps=3, save_strategy="steps", save_steps=1, resume_from_checkpoint=True))
    assert results["steps"] == 3
    with pytest.raises(RecipeError, match="max_steps=3 was reached already"):
        run(recipe_of(max_steps=3, resume_from_checkpoint=str(out / "checkpoint-3")))
    with pytest.raises(RecipeError, match="finds no checkpoint"):
        run(recipe_of(max_steps=9, resume_from_checkpoint=str(tmp_path / "checkpoint-1")))
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "file").touch()
    with pytest.raises(RecipeError, match="holds another run"):
        run(recipe_of(output_dir=stranger))
    assert (stranger / "file").exists()


def test_runs_differ_by_their_seed(recipe_of: Callable, tmp_path: Path) -> None:
    """So the comparison of two runs can fail."""
    for seed in (1, 2):
        run(recipe_of(seed=seed, max_steps=2, output_dir=tmp_path / str(seed)))
    weights = [load_file(tmp_path / str(seed) / "model.safetensors") for seed in (1, 2)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert comparable(tmp_path / "1")[1] != comparable(tmp_path / "2")[1]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "kills"), [("plain", 3), ("streamed", 2)])
def test_five_kills(place: Path, tmp_path: Path, way: str, kills: int) -> None:
    """`python -m finetune` killed again and again, while it writes a checkpoint and at random moments."""
    recipes = {
        name: write_recipe(place, tmp_path / f"{name}.yaml", tmp_path / name, **WAYS[way] | {"max_steps": 60})
        for name in ("whole", "killed")
    }

    def command(name: str) -> Any:
        return subprocess.Popen([sys.executable, "-m", "finetune", str(recipes[name])], **QUIET)

    assert command("whole").wait() == 0
    moments = []
    for number in range(kills):
        process = command("killed")
        step = 4 * random.randint(4 * number + 1, 4 * number + 4)
        seconds = 0 if number == 0 else random.uniform(0, 0.5)
        wait_and_kill(process, tmp_path / "killed" / f"checkpoint-{step}", seconds)
        assert process.returncode == -9
        moments.append((step, round(seconds, 3), last_whole_checkpoint(tmp_path / "killed")))
    print(way, "killed after", [(step, seconds, path and path.name) for step, seconds, path in moments])
    assert command("killed").wait() == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


QUIET: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": Path(__file__).parents[2]}


def wait_and_kill(process: subprocess.Popen, folder: Path, seconds: float) -> None:
    while not folder.exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    process.wait()
