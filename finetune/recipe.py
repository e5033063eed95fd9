"""A recipe: which model, which text, and any argument of transformers.TrainingArguments."""

import difflib
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments


class RecipeError(ValueError):
    """Something the user can put right; the message names the field, the value and the remedy."""


@strict
@dataclass(kw_only=True)
class Recipe:
    """The fields of ours; everything else in a recipe goes to TrainingArguments under its own name.

    model: checkpoint folder or Hub id, expert-choice or dense.
    output_dir: folder to make for the fine-tuned model, its checkpoints and `finetune_results.json`.
    dataset: a .txt (documents separated by <|endoftext|>), .jsonl or .parquet file, or a Hub dataset id.
    dataset_config, dataset_split: of a Hub dataset.
    text_column: the column that holds the text.
    sequence_length: tokens per training sequence; documents are packed end to end.
    append_eos: end every document with the tokenizer's end-of-sequence token.
    validation_fraction: share of the documents held out, the same ones whatever the seed.
    max_eval_sequences: at most this many held-out sequences are evaluated.
    dtype: of the weights while training, "auto" as stored.
    training: arguments of TrainingArguments.
    """

    model: str
    output_dir: str
    dataset: str
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_column: str = "text"
    sequence_length: int = 512
    append_eos: bool = True
    validation_fraction: float | int = 0.05
    max_eval_sequences: int = 256
    dtype: str = "auto"
    training: dict[str, Any] = field(default_factory=dict)

    def validate_ranges(self) -> None:
        """Run by `@strict`."""
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length} must be at least 2")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} must be above 0 and below 1")
        if self.max_eval_sequences < 1:
            raise ValueError(f"max_eval_sequences={self.max_eval_sequences} must be at least 1")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype} is unknown; choose auto, float32, bfloat16 or float16")


_OWN = {item.name for item in fields(Recipe)} - {"training"}
_TRAINING = {item.name for item in fields(TrainingArguments) if item.init} - {"output_dir"}
_HINTS = typing.get_type_hints(TrainingArguments)
# YAML 1.1 reads 1e-3 as a string.
_FLOAT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe and applies `field=value` overrides.

    Raises:
        RecipeError: for a file that is no recipe, an unknown field (with the nearest name), a wrong value.
    """
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe={path} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe={path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"recipe={path} must hold `field: value` lines")
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"override {override!r} must be written as field=value")
        try:
            content[name.strip()] = yaml.safe_load(value) if value.strip() else None
        except yaml.YAMLError as error:
            raise RecipeError(f"override {override!r}: the value is not valid YAML; quote it") from error
    return make_recipe(content)


def make_recipe(content: dict[str, Any]) -> Recipe:
    """A recipe from flat `field: value` pairs, ours and those of TrainingArguments together."""
    own: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for name, value in content.items():
        value = float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value
        if name in _OWN:
            own[name] = value
        elif name in _TRAINING:
            training[name] = _checked(name, value)
        else:
            nearest = difflib.get_close_matches(str(name), _OWN | _TRAINING, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else "see finetune/recipe.py and TrainingArguments"
            raise RecipeError(f"{name}={value!r} is no field of a recipe; {hint}")
    missing = [name for name in ("model", "output_dir", "dataset") if own.get(name) is None]
    if missing:
        raise RecipeError(
            f"{missing[0]} is missing from the recipe; add it there or as {missing[0]}=... on the command line"
        )
    try:
        return Recipe(**own, training=training)
    except StrictDataclassError as error:
        raise RecipeError(" ".join(str(error).split(":", 2)[-1].split())) from error


def _checked(name: str, value: Any) -> Any:
    """The value of a TrainingArguments field that takes plain numbers, refused unless it is one.

    TrainingArguments itself takes anything, and a word instead of a number fails only inside the optimiser.
    """
    kinds = {kind for kind in (bool, int, float, str) if kind in typing.get_args(_HINTS[name]) or kind is _HINTS[name]}
    other = set(typing.get_args(_HINTS[name])) - kinds - {type(None)}
    allowed = kinds | ({int} if float in kinds else set())
    if name == "resume_from_checkpoint" or not kinds or other or value is None or type(value) in allowed:
        return value
    raise RecipeError(f"{name}={value!r} must be {' or '.join(sorted(kind.__name__ for kind in kinds))}")


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The TrainingArguments of a recipe; ours only says that nothing is reported anywhere unless asked for."""
    try:
        return TrainingArguments(**({"report_to": "none"} | recipe.training), output_dir=recipe.output_dir)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise RecipeError(f"TrainingArguments refuses the recipe: {' '.join(str(error).split())}") from error
