"""The recipes that are shipped: each parses, trains nothing that is not there, and begins with its own command."""

import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin

import modeling_ecmoe
from ecmoe.finetune import load_recipe
from ecmoe.finetune.recipe import training_arguments
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
    """It names the file itself, and its overrides and the recipe together are complete."""
    words = command_of(path)
    named = str(path.relative_to(ROOT))
    assert words[0] == "ecmoe-finetune" or words[: words.index(named)][-2:] == ["-m", "ecmoe.finetune"]
    overrides = words[words.index(named) + 1 :]
    assert {"model", "output_dir"} <= {override.partition("=")[0] for override in overrides}
    recipe = load_recipe(path, [*overrides, f"output_dir={tmp_path}", "use_cpu=true"])
    assert recipe.model == "qwen3-8x"
    arguments = training_arguments(recipe)
    assert arguments.logging_steps == 10 and arguments.learning_rate == recipe.training["learning_rate"] < 1e-3
    if recipe.distributed:
        processes = int(words[words.index("--num_processes") + 1])
        assert recipe.distributed["fsdp_size"] == processes
        assert arguments.save_only_model  # what Transformers asks of a model that is sharded while it loads


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_configs(path: Path) -> None:
    words = command_of(path)
    assert words[:2] == ["accelerate", "launch"]
    options = launch_command_parser().parse_args(words[2:])
    assert options.config_file == str(path.relative_to(ROOT))
    assert options.training_script == "ecmoe.finetune" and options.module
    assert (ROOT / options.training_script_args[0]).is_file()
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
