"""Weights learn at the rate that a recipe names: in float32, or in bfloat16 with steps rounded at random."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoints import STORIES_MODEL
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import ecmoe
from ecmoe.finetune import RecipeError, run
from ecmoe.finetune.loading import load_config
from ecmoe.finetune.precision import Precision, choose
from modeling_ecmoe import precision_ecmoe

BFLOAT16 = {"dtype": "bfloat16"}
PLAIN = BFLOAT16 | {"optim": "adamw_torch"}


@pytest.fixture(scope="module")
def short(place: Path) -> Path:
    """The converted model of `place` in bfloat16."""
    for name in ("ecmoe", "dense"):
        model = AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.bfloat16)
        model.save_pretrained(place / f"{name}-bf16")
        AutoTokenizer.from_pretrained(place / name).save_pretrained(place / f"{name}-bf16")
    return place / "ecmoe-bf16"


@pytest.fixture(scope="module")
def king(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K saved in bfloat16 and converted, with rows of one sentence."""
    if not STORIES_MODEL.is_dir():
        pytest.skip("stories260K is not beside the repository (ECMOE_TEST_DATA)")
    folder = tmp_path_factory.mktemp("king")
    AutoModelForCausalLM.from_pretrained(STORIES_MODEL, dtype=torch.bfloat16).save_pretrained(folder / "dense")
    AutoTokenizer.from_pretrained(STORIES_MODEL).save_pretrained(folder / "dense")
    ecmoe.convert(str(folder / "dense"), str(folder / "ecmoe"), num_experts=4, verify=False)
    rows = [{"text": f"Number {number}: the king of France is bald. " * 9} for number in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sixty_steps(king: Path, out: Path, **fields: Any) -> tuple[float, float]:
    """The loss before and after."""
    fields = {"max_length": 128, "max_steps": 60, "use_cpu": True, "disable_tqdm": True, **fields}
    silent = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 60}
    found = run("full", model=king / "ecmoe", output_dir=out, dataset=king / "rows.jsonl", **silent, **fields)
    return found["loss_before"], found["loss_after"]


def test_a_bfloat16_checkpoint_learns_at_the_recipe_s_rate(king: Path, tmp_path: Path, quick_end: None) -> None:
    """Case 1: with the shipped recipe as it comes, and with steps rounded at random, but not with plain AdamW."""
    arms = {
        "float32": {"dtype": "float32"},
        "as it comes": {},
        "bfloat16, rounded at random": BFLOAT16,
        "bfloat16": PLAIN,
    }
    found = {name: sixty_steps(king, tmp_path / name, **fields) for name, fields in arms.items()}
    for name, (before, after) in found.items():
        print(f"{name}: {before:.4f} -> {after:.4f}")
    whole, default, rounded, lost = (after for _, after in found.values())
    assert abs(default - whole) < 1e-4 and abs(rounded / whole - 1) < 0.05
    assert lost > 1.2 * whole  # what the others are held against


def test_what_is_chosen(short: Path, recipe_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**fields: Any) -> Precision:
        recipe = recipe_of(model=short, **fields)
        return choose(recipe, load_config(recipe))

    parameters = AutoModelForCausalLM.from_pretrained(short).num_parameters()
    found = chosen()
    assert (found.dtype, found.stochastic, found.autocast) == ("float32", False, False)
    assert found.needed == {"float32": 16 * parameters, "bfloat16": 6 * parameters}
    assert chosen(distributed={"fsdp_size": 4}).needed["float32"] == 4 * parameters
    assert chosen(dtype="bfloat16").stochastic and not chosen(**PLAIN).stochastic
    assert chosen(lora={}).dtype == "auto"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10 * parameters})())
    found = chosen()
    assert (found.dtype, found.stochastic) == ("bfloat16", True) and "free" in found.why
    settled = found.settle(recipe_of())
    assert settled.dtype == "bfloat16" and settled.training["optim"] == "adamw_torch_8bit"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"dtype=bfloat16 \(.* MB free\): AdamW's steps .* pip install"):
        chosen()
    monkeypatch.setattr("ecmoe.finetune.precision._has_bfloat16", lambda: True)
    assert chosen(lora={}).autocast and not chosen(lora={}, bf16=False).autocast
    assert not chosen(lora={}, distributed={"fsdp_size": 2, "fsdp_mixed_precision": True}).autocast


class Stop(TrainerCallback):
    """Ctrl-C in the fourth step."""

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["auto", "random"])
def test_resuming_keeps_the_dtype_and_the_bits(
    short: Path, recipe_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_end: None, mode: str
) -> None:
    """Also when less memory is free by then."""
    fields = {"model": short, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    fields |= BFLOAT16 if mode == "random" else {}
    run(recipe_of(**fields, output_dir=tmp_path / "whole"))
    stopped, make = recipe_of(**fields, output_dir=tmp_path / "stopped"), ecmoe.finetune.train.make_trainer

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        trainer = make(*args, **kwargs)
        trainer.add_callback(Stop())
        return trainer

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ecmoe.finetune.train.make_trainer", interrupted)
        run(stopped)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1})())
    run(stopped)
    mine, other = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    expected = torch.bfloat16 if mode == "random" else torch.float32
    assert {tensor.dtype for name, tensor in mine.items() if "experts" in name} == {expected}
    assert all(torch.equal(mine[name], tensor) for name, tensor in other.items())


def test_the_router_beside_adapters_is_trained_in_float32(short: Path, recipe_of: Callable, quick_end: None) -> None:
    trainer = ecmoe.finetune.train.make_trainer(recipe_of(model=short, lora={}))
    trained = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any(".gate." in name for name in trained) and set(trained.values()) == {torch.float32}
    assert trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16


LOOPS: dict[str, tuple[torch.dtype, Callable[..., torch.optim.Optimizer], float, bool]] = {
    "adamw": (torch.bfloat16, torch.optim.AdamW, 1e-6, True),
    "adam in float16": (torch.float16, partial(torch.optim.Adam, eps=1e-4), 1e-7, True),
    "a rate that arrives": (torch.bfloat16, torch.optim.AdamW, 1e-2, False),
    "float32": (torch.float32, torch.optim.AdamW, 1e-6, False),
    "sgd": (torch.bfloat16, torch.optim.SGD, 1e-6, False),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_any_loop_is_warned_once_of_lost_steps(
    loop: str, place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, kind, rate, warns = LOOPS[loop]
    said: list[str] = []
    monkeypatch.setattr(precision_ecmoe.logger, "warning_once", said.append)
    model = AutoModelForCausalLM.from_pretrained(place / "ecmoe", dtype=dtype).train()
    optimizer = kind(model.parameters(), lr=rate)
    ids = torch.arange(3, 67).view(2, 32)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert len(said) == warns
    if warns:
        name = type(optimizer).__name__
        assert said[0].startswith(f"learning_rate={rate:.1e}: most steps of {name} are rounded away in ")
        assert "\n" not in said[0] and "bf16_stochastic_round" in said[0]


def test_rounding_at_random_is_not_warned_of(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optim = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(precision_ecmoe.logger, "warning_once", lambda text: pytest.fail(text))
    model = AutoModelForCausalLM.from_pretrained(short, dtype=torch.bfloat16).train()
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-6, bf16_stochastic_round=True)
    ids = torch.arange(3, 67).view(2, 32)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
