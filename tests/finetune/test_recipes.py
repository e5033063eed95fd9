"""The recipes that are shipped: each parses, trains nothing that is not there, and begins with its own command."""

import shlex
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin

import modeling_ecmoe
from ecmoe.finetune import RecipeError, load_recipe
from ecmoe.finetune.loading import _read_template
from ecmoe.finetune.recipe import recipe_of, shipped, training_arguments
from modeling_ecmoe.block_ecmoe import EcMoeBlock

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
CONFIGS = sorted(ROOT.glob("recipes/accelerate/*.yaml"))


def command_of(path: Path) -> list[str]:
    """The words of a file's first line, which is a command."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# "), path
    return shlex.split(first[2:])


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 6 and len(CONFIGS) == 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_command_of_a_recipe_is_one(path: Path, tmp_path: Path) -> None:
    """It names the recipe itself, and its overrides and the recipe together are complete."""
    words = command_of(path)
    named = path.stem
    assert words[0] == "ecmoe-finetune" or words[: words.index(named)][-2:] == ["-m", "ecmoe.finetune"]
    overrides = words[words.index(named) + 1 :]
    assert {"model", "output_dir"} <= {override.partition("=")[0] for override in overrides}
    recipe = load_recipe(named, [*overrides, f"output_dir={tmp_path}"])  # on a CPU too
    assert recipe.model == ("mixtral-ec" if named == "moe" else "qwen3-8x")
    arguments = training_arguments(recipe)
    assert arguments.logging_steps == 10 and arguments.learning_rate == recipe.training["learning_rate"] < 1e-3
    if recipe.distributed:
        processes = int(words[words.index("--num_processes") + 1])
        assert recipe.distributed["fsdp_size"] == processes
        assert arguments.save_only_model  # what Transformers asks of a model that is sharded while it loads


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_page_says_what_a_recipe_sets(path: Path) -> None:
    """Learning rate, rows or tokens of one step on one device, max_length, warm-up, length and checkpoints."""
    page = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith("|") and f"[{path.stem}](../recipes/" in line)
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = fields["per_device_train_batch_size"] * fields.get("gradient_accumulation_steps", 1)
    epochs = fields.get("num_train_epochs")
    expected = [
        f"{fields['learning_rate']:.0e}".replace("e-0", "e-"),
        f"{rows * fields['max_length']:,} tokens" if fields.get("packing") else f"{rows} rows",
        str(fields["max_length"]),
        str(fields["warmup_steps"]),
        f"{epochs} epoch{'s' if epochs > 1 else ''}" if epochs else f"{fields['max_steps']:,} steps",
        "none" if fields["save_strategy"] == "no" else f"every {fields['save_steps']}",
    ]
    assert [cell.strip() for cell in row.strip("| ").split("|")][2:] == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_configs(path: Path) -> None:
    words = command_of(path)
    assert words[:2] == ["accelerate", "launch"]
    options = launch_command_parser().parse_args(words[2:])
    assert options.config_file == str(path.relative_to(ROOT))
    assert options.training_script == "ecmoe.finetune" and options.module
    assert options.training_script_args[0] in shipped(".yaml")
    config = load_config_from_file(str(path))
    assert config.num_processes == 8 and config.distributed_type.value == (
        "FSDP" if "fsdp" in path.stem else "DEEPSPEED"
    )
    # Accelerate reads every setting of the file into an option of this name, and ignores one it does not know.
    known = vars(launch_command_parser().parse_args(["x"])).keys()
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in (content.get("fsdp_config") or {}) | (content.get("deepspeed_config") or {}):
        assert name in known, name


def test_the_leaf_of_zero_3_is_our_block() -> None:
    content = yaml.safe_load((ROOT / "recipes/accelerate/zero3.yaml").read_text(encoding="utf-8"))
    name = content["deepspeed_config"]["deepspeed_moe_layer_cls_names"]
    assert name == EcMoeBlock.__name__
    assert hasattr(DeepSpeedPlugin, "set_moe_leaf_modules")
    config = modeling_ecmoe.EcMoeLlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = modeling_ecmoe.EcMoeLlamaForCausalLM(config)
    assert any(type(module).__name__ == name for module in model.modules())


def test_what_stands_for_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name, a file, a mapping, keywords, and a recipe with other fields are all the same recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()  # a run's folder shadows no recipe
    own = {"model": "m", "output_dir": "o", "dataset": "d"}
    expected = load_recipe("full", ["model=m", "output_dir=o", "dataset=d", "max_steps=7", "routing=threshold"])
    flat = yaml.safe_load((ROOT / "recipes" / "full.yaml").read_text())
    changes = {"max_steps": 7, "routing": "threshold"}
    assert recipe_of("full", **own, **changes) == expected
    assert recipe_of(ROOT / "recipes" / "full.yaml", **own, **changes) == expected
    assert recipe_of(flat | own, **changes) == expected
    assert recipe_of(**flat | own | changes) == expected
    assert recipe_of(recipe_of("full", **own), **changes) == expected
    assert recipe_of(expected) is expected
    for wrong, message in (
        (7, "recipe=7 must be a Recipe, a mapping"),
        ("fulll", "recipe=fulll does not exist; give a"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe_of(wrong, **own)
    with pytest.raises(RecipeError, match="model is missing"):
        recipe_of("full")
    with pytest.raises(RecipeError, match="max_stepz=7 is no field of a recipe; did you mean max_steps"):
        recipe_of("full", **own, max_stepz=7)


def test_the_shipped_template_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _read_template("chatml") == (ROOT / "recipes" / "chatml.jinja").read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has products in bfloat16")
def test_products_in_bfloat16_without_a_gpu() -> None:
    fields = {"model": "m", "output_dir": "out", "dataset": "rows.jsonl", "bf16": True}
    with pytest.raises(RecipeError, match=r"^bf16=True needs a GPU .*; leave it out .*, or add use_cpu=true"):
        training_arguments(recipe_of(fields))
    assert training_arguments(recipe_of(fields, use_cpu=True)).bf16
