"""The output folder of a run: whose it is, and where the run goes on after it was stopped at any moment."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig

from .errors import RecipeError
from .recipe import Recipe

RESULTS_NAME = "finetune_results.json"
RECIPE_NAME = "finetune_recipe.yaml"
UNFINISHED = ".unfinished"  # of a file that is being written
# What a checkpoint needs, by the names of Trainer, FSDP and DeepSpeed.
_PARTS = (("*.safetensors", "pytorch_model_fsdp*"), ("optimizer*", "global_step*"), ("rng_state*.pth",))


def last_whole_checkpoint(output: Path) -> Path | None:
    """The latest checkpoint that a run can go on from."""
    numbered = [
        (int(path.name.rpartition("-")[2]), path)
        for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdigit()
    ]
    found = (path for step, path in sorted(numbered, reverse=True) if step_of(path) == step and _can_resume(path))
    return next(found, None)


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's state says it is from; None when the checkpoint was not written to its end.

    Trainer writes the state last, and EcMoeTrainer not before every rank has written its part.
    """
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    step: int | None = state.get("global_step")
    return step


def _can_resume(checkpoint: Path) -> bool:
    """Not when it holds the model alone (save_only_model), or was deleted half-way."""
    return all(any(any(checkpoint.glob(name)) for name in names) for names in _PARTS)


def resume_point(recipe: Recipe) -> Path | None:
    """The checkpoint that a run goes on from; None to begin.

    The same recipe in the folder of a run that was stopped goes on by itself. `resume_from_checkpoint` goes on with
    another recipe, from the last checkpoint (true) or from a certain one.

    Raises:
        RecipeError: when the folder holds something else, or a run that is finished.
    """
    output = Path(recipe.output_dir).expanduser()
    wanted = recipe.training.get("resume_from_checkpoint")
    if output.exists() and not output.is_dir():
        raise RecipeError(f"output_dir={output} is a file; name a folder")
    if wanted:
        return _wanted_checkpoint(recipe, output, wanted)
    if not output.exists() or all(path.name.endswith(UNFINISHED) for path in output.iterdir()):
        return None
    recorded, is_finished = output / RECIPE_NAME, (output / RESULTS_NAME).exists()
    checkpoint = last_whole_checkpoint(output)
    if recorded.is_file() and recorded.read_text(encoding="utf-8") == as_yaml(recipe):
        if is_finished:
            raise RecipeError(f"output_dir={output} holds this run, and it is finished; name a new folder to repeat it")
        return checkpoint
    states = [step_of(path) for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    has_written = any(state is not None for state in states) or any(output.glob("*.safetensors"))
    if recorded.is_file() and not is_finished and not has_written:
        return None
    if recorded.is_file():
        changes = changed_since(recipe, output / PREFIX_CHECKPOINT_DIR)
        goes_on = ", or go on there with resume_from_checkpoint=true" if checkpoint and not is_finished else ""
        raise RecipeError(
            f"output_dir={output} is not empty and holds another run ({', '.join(changes)}); name a new folder{goes_on}"
        )
    what = "a model" if (output / "config.json").is_file() else "other files"
    raise RecipeError(f"output_dir={output} is not empty and holds {what}; name a new folder")


def after_a_stop(recipe: Recipe) -> str:
    """What the command of a run that was stopped does when it is given again, as the end of a message."""
    try:
        checkpoint = resume_point(recipe)
    except RecipeError as error:  # the folder is another's: stopped before that was said
        return str(error)
    if checkpoint is not None:
        return f"the same command goes on from {checkpoint}"
    return f"no checkpoint yet: the same command begins again; {when_saved(recipe)}"


def when_saved(recipe: Recipe) -> str:
    """When a run writes checkpoints that it can go on from, in words."""
    settings = {name: recipe.training.get(name, getattr(SFTConfig, name)) for name in ("save_strategy", "save_steps")}
    strategy, steps = getattr(settings["save_strategy"], "value", settings["save_strategy"]), settings["save_steps"]
    if strategy == "no":
        return "save_strategy=no writes no checkpoints"
    if recipe.distributed or recipe.training.get("save_only_model"):  # as `training_arguments` has it
        return "its checkpoints hold the model alone, and no run goes on from these"
    if strategy == "steps":
        return f"checkpoints come every save_steps={steps} {'steps' if steps >= 1 else 'of all steps'}"
    return f"checkpoints come {'with each epoch' if strategy == 'epoch' else 'with a better evaluation'}"


def _wanted_checkpoint(recipe: Recipe, output: Path, wanted: object) -> Path:
    if isinstance(wanted, str):
        named = Path(wanted).expanduser()
        checkpoint = named if step_of(named) is not None and _can_resume(named) else None
    else:
        checkpoint = last_whole_checkpoint(output)
    if checkpoint is None:
        raise RecipeError(
            f"resume_from_checkpoint={wanted} finds no checkpoint in output_dir={output}; leave it out to begin, with "
            "save_strategy=steps and without save_only_model to be able to resume"
        )
    step, last = step_of(checkpoint) or 0, recipe.training.get("max_steps") or 0
    if 0 < last <= step:
        raise RecipeError(f"max_steps={last} was reached already, {checkpoint} is at step {step}; raise it to go on")
    return checkpoint


def begin(recipe: Recipe, resume: Path | None) -> None:
    """Marks the folder as this run's, and clears away checkpoints that were stopped half-way."""
    output = Path(recipe.output_dir).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path != resume and step_of(path) is None:
            shutil.rmtree(path)
    write_whole(output / RECIPE_NAME, as_yaml(recipe))


def changed_since(recipe: Recipe, checkpoint: Path) -> list[str]:
    """How a recipe differs from the one that the checkpoint's run has recorded, field by field."""
    recorded = checkpoint.parent / RECIPE_NAME
    new = yaml.safe_load(as_yaml(recipe))
    old = yaml.safe_load(recorded.read_text(encoding="utf-8")) if recorded.is_file() else new
    names = sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))
    return [_change(name, new, old) for name in names]


def _change(name: str, new: dict[str, Any], old: dict[str, Any]) -> str:
    """A field that a recipe leaves out has its default, whatever that is, and not None."""
    now = f"{name}={new[name]}" if name in new else f"{name} left out"
    return f"{now} ({f'was {old[name]}' if name in old else 'was left out'})"


def write_whole(path: Path, text: str) -> None:
    """The file is there with all of the text, or not at all."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def as_yaml(recipe: Recipe) -> str:
    """The recipe in full, as `ecmoe-finetune` reads it again."""
    content = asdict(recipe)
    others = content.pop("training") | content.pop("routing_fields")  # None is a value there, max_length for one
    others.pop("resume_from_checkpoint", None)
    own = {name: value for name, value in content.items() if value is not None}
    return yaml.safe_dump(own | others, sort_keys=True)
