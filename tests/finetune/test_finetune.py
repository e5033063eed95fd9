"""Fine-tuning from end to end: expert-choice and dense by the same recipe, and what a run leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import prepared
from transformers import AutoModelForCausalLM, AutoTokenizer

from ecmoe.finetune import load_recipe, run
from ecmoe.finetune.data import Collator
from ecmoe.finetune.train import dry_run, make_trainer
from modeling_ecmoe import sparse_blocks

CODE = {"configuration_ecmoe.py", "llama_ecmoe.py", "block_ecmoe.py", "router_ecmoe.py", "routing_ecmoe.py"}


@torch.no_grad()
def loss_of(folder: Path, held_out) -> float:
    """The causal loss of a checkpoint on packed sequences, in one batch."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model(**Collator(0)(list(held_out)), use_cache=False).loss.item()


@pytest.mark.parametrize("name", ["dense", "ecmoe"])
def test_learns_and_the_result_loads(place: Path, recipe_of: Callable, name: str) -> None:
    recipe = recipe_of(model=place / name, per_device_eval_batch_size=16)
    out = Path(recipe.output_dir)
    results = run(recipe)
    assert results["loss_after"] < results["loss_before"] - 0.1
    assert (results["steps"], results["tokens"]) == (12, 12 * 8 * 64)
    assert results["tokens_per_second"] > 0
    assert json.loads((out / "finetune_results.json").read_text()) == results
    # The figures are the losses of the models that were loaded and saved.
    _, held_out = prepared(recipe, AutoTokenizer.from_pretrained(out), 300)
    assert len(held_out) == 16
    assert loss_of(out, held_out) == pytest.approx(results["loss_after"], abs=1e-5)
    assert loss_of(place / "dense", held_out) == pytest.approx(results["loss_before"], abs=1e-5)
    if name == "ecmoe":
        assert results["active_parameters"] < results["parameters"]
        assert 0.3 < results["routing"]["load_min"] <= results["routing"]["load_max"] < 2  # uncalibrated: 4
        assert {path.name for path in out.iterdir()} >= CODE
    else:
        assert results["active_parameters"] == results["parameters"]
        assert "routing" not in results


def test_rates_by_part(recipe_of: Callable) -> None:
    """Each part's learning rate in the optimiser, 0 trains none of it, the rest as the recipe says; decay is kept."""
    recipe = recipe_of(router_learning_rate=5e-4, experts_learning_rate=2e-3, weight_decay=0.1, max_steps=1)
    trainer = make_trainer(recipe)
    trainer.train()
    rates, decays = {}, {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates[id(parameter)], decays[id(parameter)] = group["initial_lr"], group["weight_decay"]
    names = dict(trainer.model.named_parameters())
    assert len(rates) == len(names)
    for name, parameter in names.items():
        expected = 5e-4 if ".mlp.gate." in name else 2e-3 if ".mlp.experts." in name else 3e-3
        assert rates[id(parameter)] == expected, name
        assert decays[id(parameter)] == (0.0 if "norm" in name else 0.1), name


def test_a_rate_of_0_freezes(place: Path, recipe_of: Callable) -> None:
    recipe = recipe_of(router_learning_rate=0, max_steps=2)
    results = run(recipe)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (place / "ecmoe", recipe.output_dir))
    routers = 0
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new) == (".mlp.gate." in name), name
        routers += old.numel() if ".mlp.gate." in name else 0
    assert results["trained_parameters"] == results["parameters"] - routers > 0
    moved = zip(sparse_blocks(before).values(), sparse_blocks(after).values(), strict=True)
    assert all(not torch.equal(old.gate.threshold, new.gate.threshold) for old, new in moved)


def test_checkpoints_are_whole_models(place: Path, recipe_of: Callable) -> None:
    """save_total_limit of them, each with safetensors weights, tokenizer and code, loading as the model of its step."""
    recipe = recipe_of(save_strategy="steps", save_steps=2, save_total_limit=2, max_steps=8)
    run(recipe)
    folders = sorted(Path(recipe.output_dir).glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-6", "checkpoint-8"]
    for folder in folders:
        assert {path.name for path in folder.iterdir()} >= CODE | {"model.safetensors", "tokenizer.json"}
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map["AutoModelForCausalLM"] == "llama_ecmoe.EcMoeLlamaForCausalLM"
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert model.model.layers[0].mlp.gate.threshold_updates == 10  # calibrated


FEW = {"max_steps": 4, "learning_rate": 1e-2, "max_eval_sequences": 4}
MODES = {
    "bf16": {"bf16": True},
    "weights in bfloat16": {"dtype": "bfloat16"},
    "gradient checkpointing": {"activation_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "threshold": {"routing": "threshold", "threshold_after_steps": 2},
    "no packing": {"packing": False, "too_long": "truncate"},
    "token choice": {
        "routing": "token_choice",
        "inference_routing": "token_choice",
        "router_aux_loss_coef": 0.01,
        "normalize_combine_weights": False,
    },
}


@pytest.fixture(scope="module")
def plain_loss(place: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """After the same steps in no special mode."""
    fields = [
        f"model={place / 'ecmoe'}",
        f"output_dir={tmp_path_factory.mktemp('plain')}",
        *(f"{name}={value}" for name, value in FEW.items()),
    ]
    return run(load_recipe(place / "recipe.yaml", fields))["loss_after"]


@pytest.mark.parametrize("mode", MODES)
def test_modes(recipe_of: Callable, plain_loss: float, mode: str) -> None:
    """A recipe with this mode learns, its result loads, and the config says how it was routed."""
    recipe = recipe_of(**FEW | MODES[mode])
    results = run(recipe)
    assert results["loss_after"] < results["loss_before"] - 0.1
    model = AutoModelForCausalLM.from_pretrained(recipe.output_dir)
    for name, value in recipe.routing_fields.items():
        assert getattr(model.config, name) == value
    assert ("loss_gap" in results) == (mode not in ("token choice", "compiled"))
    assert model.dtype == (torch.bfloat16 if mode == "weights in bfloat16" else torch.float32)
    # Some modes must not change the result, and the others must.
    is_same = mode in ("gradient checkpointing", "compiled")
    assert (abs(results["loss_after"] - plain_loss) < 1e-5) == is_same


def test_dry_run_writes_nothing(place: Path, recipe_of: Callable) -> None:
    """It takes one step on the longest rows of the run, and needs more memory than the weights."""
    rows = place / "lengths.jsonl"
    rows.write_text("".join(json.dumps({"text": "word " * (2 + number % 20)}) + "\n" for number in range(200)))
    recipe = recipe_of(dataset=rows, packing=False, max_steps=25, save_strategy="steps", max_length=128)
    train, _ = prepared(recipe, AutoTokenizer.from_pretrained(place / "ecmoe"), 300)
    lengths = sorted(map(len, train["input_ids"]))
    before = set(place.rglob("*"))
    found = dry_run(recipe)
    assert not Path(recipe.output_dir).exists() and set(place.rglob("*")) == before
    assert found["tokens"] == sum(lengths[-8:]) > 8 * lengths[len(lengths) // 2]
    assert found["peak_bytes"] > 4 * sum(total for _, total in found["trained"].values())
    streamed = dry_run(recipe_of(dataset=rows, streaming=True, max_length=120))
    assert streamed["tokens"] == 8 * 120
    assert not Path(recipe.output_dir).exists()
