"""What a run takes of memory and time, said before it begins: refused, warned of, measured by a dry run."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM

from ecmoe.finetune import RecipeError, run
from ecmoe.finetune import memory as module
from ecmoe.finetune.adapters import add_lora
from ecmoe.finetune.loading import load_config
from ecmoe.finetune.memory import empty_model, free_bytes, kept_bytes
from ecmoe.finetune.train import dry_run


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A machine with so many bytes free, of memory and of swap space."""

    def have(memory: int, swap: int = 0) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
        monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=swap))

    return have


def test_what_is_kept(place: Path, recipe_of: Callable) -> None:
    """Counted without weights: what trains takes 16 bytes in float32, what is frozen or of the base its weights."""
    config = load_config(recipe_of())
    model = AutoModelForCausalLM.from_pretrained(place / "ecmoe")
    total = model.num_parameters()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    found = kept_bytes(recipe_of(experts_learning_rate=0), empty_model(config))
    assert found == {"float32": 16 * total - 12 * experts, "bfloat16": 6 * total - 4 * experts}
    trained = sum(p.numel() for p in add_lora(model, {"r": 3}).parameters() if p.requires_grad)
    assert kept_bytes(recipe_of(lora={"r": 3}), empty_model(config)) == {"adapters": 4 * total + 16 * trained}
    assert kept_bytes(recipe_of(lora={"r": 3}, dtype="bfloat16"), empty_model(config)) == {
        "adapters": 2 * total + 16 * trained
    }


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(
    place: Path, recipe_of: Callable, small_machine: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecmoe.finetune.train.load_model", lambda *_: pytest.fail("loaded"))
    parameters = AutoModelForCausalLM.from_pretrained(place / "ecmoe").num_parameters()
    small_machine(8 * parameters)
    with pytest.raises(RecipeError) as refusal:
        run(recipe_of(dtype="float32"))
    line = str(refusal.value)
    assert line.startswith("model=") and "does not fit: weights, gradients and moments take" in line
    assert "dtype=bfloat16 (" in line and "\n" not in line
    assert not Path(recipe_of().output_dir).exists()
    for fields in ({"dtype": "float32", "optim": "sgd"}, {"lora": {"r": 1}}):  # which may well fit
        with pytest.raises(BaseException, match="loaded"):
            run(recipe_of(**fields))
    small_machine(8 * parameters, swap=20 * parameters)
    with pytest.raises(BaseException, match="loaded"):
        run(recipe_of(dtype="float32"))


def test_a_step_that_is_about_too_large_is_warned_of(
    place: Path, recipe_of: Callable, small_machine: Callable, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("ecmoe.finetune.train.load_model", lambda *_: pytest.fail("loaded"))
    needed = 16 * AutoModelForCausalLM.from_pretrained(place / "ecmoe").num_parameters()
    for free, says in ((2 * needed, True), (1000 * needed, False)):
        small_machine(free)
        with pytest.raises(BaseException, match="loaded"):
            run(recipe_of())
        printed = " ".join(capsys.readouterr().out.split())
        assert ("memory: weights, gradients and moments take" in printed) == says
        assert ("a batch of 8 rows of 64 tokens about" in printed) == says
        assert ("per_device_train_batch_size=1 gradient_accumulation_steps=8" in printed) == says
        assert ("activation_checkpointing=true" in printed) == says  # which this recipe has not


def test_the_limit_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_machine: Callable, recipe_of: Callable
) -> None:
    small_machine(10_000)
    recipe = recipe_of()
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    assert free_bytes(recipe) == 10_000
    for name, text in {"max": "5000", "current": "3000", "stat": "anon 1\ninactive_file 500\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_bytes(recipe) == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(recipe) == 10_000


def test_a_dry_run_says_how_long_the_run_takes(recipe_of: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps, evaluations and tokens are those of the run; no evaluation and no calibration is part of it."""
    fields = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "eval_strategy": "epoch"}
    found = dry_run(recipe_of(**fields))
    estimate = found["estimate"]
    assert "a step of 512 tokens follows; at most about" in capsys.readouterr().out
    results = run(recipe_of(**fields))
    assert estimate["steps"] == results["steps"]
    assert estimate["tokens_per_step"] * estimate["steps"] == pytest.approx(results["tokens"], rel=0.1)
    assert estimate["evaluations"] == 4
    assert estimate["seconds_per_step"] == pytest.approx(2 * found["seconds"], rel=0.15)
    assert estimate["seconds_per_evaluation"] > 0
    assert found["free_bytes"] > found["peak_bytes"] > 0
