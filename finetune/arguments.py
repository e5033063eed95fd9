"""What a recipe's fields show before anything is loaded: read and checked before torch and TRL are imported."""

import ast
import difflib
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ecmoe.hub import why_no_checkpoint

from .errors import RecipeError

# What people write for a field, TRL's command line among them.
ALIASES = {
    "sequence_length": "max_length",
    "text_column": "dataset_text_field",
    "chat_template": "chat_template_path",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "dataset_train_split": "dataset_split",
    "dataset_streaming": "streaming",
    "peft_config": "lora",
}
# Where the fields of a recipe are declared: package, file, class.
_DECLARED = (
    ("ecmoe", None, "Recipe"),
    ("modeling_ecmoe", "configuration_ecmoe.py", "EcMoeConfigMixin"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("transformers", "training_args.py", "TrainingArguments"),
)
# What those classes declare and a recipe has not: what would change a weight's shape, and what is set for the run.
OF_NO_RECIPE = {"num_experts", "moe_intermediate_size", "mlp_layer_types", "shared_expert_intermediate_size"}
OF_NO_RECIPE |= {
    "thresholds_from",
    "shared_expert_weighting",
    "output_router_logits",
    "training",
    "routing_fields",
    "dataset_kwargs",
    "pad_token",
}
_TAKES_MAPPING = re.compile(r"lora|distributed|\w+_(kwargs|config)")
_IN_BRACES = re.compile(r"\w+:\S.*")  # what bash makes of each part of {a:1,b:2}
_FILES = (".txt", ".jsonl", ".parquet")  # datasets that are files


def check_arguments(path: str, overrides: Sequence[str]) -> None:
    """Refuses what a recipe and its overrides show by themselves to be wrong.

    Raises:
        RecipeError: naming the first field that is, its value and the remedy.
    """
    content = read_recipe(path, overrides)
    known = declared_fields()
    for name, value in content.items():
        if known and name not in known:
            raise unknown_field(name, value, known)
    refuse_missing(content)
    if isinstance(content["model"], str):
        check_model(content["model"])
    for name in ("dataset", "validation_dataset"):
        value = content.get(name)
        if isinstance(value, str) and value.endswith(_FILES) and not Path(value).expanduser().exists():
            raise RecipeError(f"{name}={value} does not exist; give a file of text or rows, or a Hub id")


def check_model(model: str) -> None:
    """Refuses what is neither a folder nor may be a Hub id.

    Raises:
        RecipeError: saying which of the two it could have been.
    """
    wrong = why_no_checkpoint(model)
    if wrong:
        raise RecipeError(f"model={model} {wrong}")


def declared_fields() -> set[str]:
    """The names that the classes of a recipe's fields declare, read off their files; to import them takes seconds.

    Empty where a file is not where it was: then the classes themselves have to say it.
    """
    found: set[str] = set()
    for package, file, name in _DECLARED:
        if file is None:
            place = Path(__file__).parent / "recipe.py"
        else:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                return set()
            place = Path(spec.origin).parent / file
        if not place.is_file():
            return set()
        tree = ast.parse(place.read_text(encoding="utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
        if not classes:
            return set()
        found |= {
            node.target.id
            for node in classes[0].body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
    return found - OF_NO_RECIPE


def unknown_field(name: str, value: Any, known: Iterable[str]) -> RecipeError:
    """What is said of a field that no recipe has, with the nearest one that is known."""
    if name == "num_experts":
        return RecipeError(
            f"num_experts={value!r} is no field of a recipe: the number of experts is fixed at conversion; leave "
            "it out, or convert again with another one"
        )
    known = list(known)
    if name in ("training", "routing_fields") or (isinstance(value, Mapping) and set(known) & value.keys()):
        return RecipeError(f"{name}={value!r} is no field of a recipe; write its fields at the top level")
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    nearest = [ALIASES[name]] if name in ALIASES else nearest
    hint = f"did you mean {nearest[0]}?" if nearest else "see ecmoe.finetune.Recipe and trl.SFTConfig"
    return RecipeError(f"{name}={value!r} is no field of a recipe; {hint}")


def refuse_missing(content: Mapping[str, Any]) -> None:
    """A recipe without model, output_dir or dataset.

    Raises:
        RecipeError: naming the first that is missing.
    """
    missing = [name for name in ("model", "output_dir", "dataset") if content.get(name) is None]
    if missing:
        raise RecipeError(f"{missing[0]} is missing from the recipe; add it there, or as {missing[0]}=...")


def replaced(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe with some replaced; a column that is named must be there (`Recipe.other_columns`)."""
    strict = {"other_columns": False} if _names_columns(changes) and content.get("other_columns") else {}
    return {**content, **strict, **changes}


def _names_columns(fields: Mapping[str, Any]) -> bool:
    return any(name.endswith("_column") or name == "dataset_text_field" for name in fields)


def shipped(ending: str) -> dict[str, Path]:
    """The files with that ending that come with the package, by their name without it."""
    folder = Path(str(resources.files("ecmoe.recipes")))
    return {path.name.removesuffix(ending): path for path in sorted(folder.glob(f"*{ending}"))}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The flat fields of a YAML file, or of the one that is shipped under that name, with `field=value` overrides.

    Raises:
        RecipeError: for a file that is no recipe, and an override that cannot be read.
    """
    place, known = Path(path).expanduser(), shipped(".yaml")
    is_shipped = not place.is_file() and str(path) in known
    if is_shipped:
        place = known[str(path)]
    try:
        content = yaml.safe_load(place.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise RecipeError(
            f"recipe={path} does not exist; give a YAML file, or one of those that are shipped: {', '.join(known)}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe={path} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe={path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"recipe={path} must hold `field: value` lines")
    changes = _read_overrides(overrides)
    for name, value in (content | changes).items():
        fields = value if isinstance(value, Mapping) else {}
        lacking = [
            str(key) for key, held in fields.items() if held is None and ":" in str(key)
        ]  # {r:8} is {"r:8": None}
        if lacking:
            parts = (str(key) if str(key) in lacking else f"{key}: {held}" for key, held in fields.items())
            raise RecipeError(f"{name} has no field {lacking[0]!r}; {_quoted(name, ', '.join(parts))}")
    return replaced(content | ({"other_columns": True} if is_shipped and _names_columns(content) else {}), changes)


def _read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The fields of `field=value` words.

    Raises:
        RecipeError: of what a shell has made of a mapping without quotes, and of other words that cannot be read.
    """
    pairs = [tuple(part.strip() for part in word.partition("=")) for word in overrides]
    changes: dict[str, Any] = {}
    for number, (name, equals, value) in enumerate(pairs):
        if not equals:
            raise RecipeError(f"override {overrides[number]!r} must be written as field=value")
        same = [other for known, _, other in pairs if known == name]
        if _TAKES_MAPPING.fullmatch(name) and all(map(_IN_BRACES.fullmatch, same)):  # bash has made {a,b} two words
            words = " ".join(f"{name}={other}" for other in same)
            raise RecipeError(f"{words} is no mapping; {_quoted(name, ', '.join(same))}")
        try:
            changes[name] = yaml.safe_load(value) if value else None
        except yaml.YAMLError as error:
            remedy = "quote it"
            if value.startswith("{"):  # and spaces have parted it
                end = next((n for n in range(number, len(pairs)) if overrides[n].endswith("}")), number)
                remedy = _quoted(name, " ".join([value, *overrides[number + 1 : end + 1]]).strip("{} "))
            raise RecipeError(f"override {overrides[number]!r}: the value is not valid YAML; {remedy}") from error
    return changes


def _quoted(name: str, content: str) -> str:
    """How a shell is given a mapping."""
    content = re.sub(r":(?! )", ": ", content)
    return f"quote it, with a space after each colon: '{name}={{{content}}}'"
