"""A recipe: which model, which text, and any argument of trl.SFTConfig."""

import difflib
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from trl import SFTConfig

from modeling_ecmoe.configuration_ecmoe import EcMoeConfigMixin

from .arguments import OF_NO_RECIPE, read_recipe, refuse_missing, replaced, unknown_field
from .arguments import shipped as shipped
from .errors import RecipeError


@strict
@dataclass(kw_only=True)
class Recipe:
    """The fields of ours; everything else in a recipe goes to TRL's SFTConfig under its own name: max_length, packing,
    dataset_text_field, chat_template_path, model_init_kwargs and all of TrainingArguments.

    model: checkpoint folder or Hub id, expert-choice or dense.
    output_dir: folder to make for the fine-tuned model, its checkpoints, `finetune_results.json` and the curves.
    dataset: a .txt (documents separated by <|endoftext|>), .jsonl or .parquet file, or a Hub dataset id; or a list of
        mappings, each with `dataset` and, if wanted, `weight`, `dataset_config`, `dataset_split`: a mixture that
        draws rows in proportion to the weights.
    dataset_config, dataset_split: of a Hub dataset.
    validation_dataset: held-out rows, given as a dataset is; without it a part of the dataset is held out.
    messages_column: the column that holds conversations, lists of {"role", "content"}; they go through the tokenizer's
        chat template, and only the assistant's tokens are learned. Where no column is named, messages (or
        conversations), prompt with completion, and dataset_text_field are looked for, in this order; what is named
        must be there. Columns tools and chat_template_kwargs go to the template.
    prompt_column, completion_column: columns of instructions and answers, text or lists of messages; only the answer is
        learned. Text becomes a user and an assistant message where the tokenizer has a chat template, and is joined as
        it is elsewhere.
    other_columns: whether messages, prompt with completion, or text are taken where the dataset has none of the columns
        that are named; so it is with a shipped recipe's own columns, while those of your own must be there.
    append_eos: end every document with the tokenizer's end-of-sequence token.
    too_long: a row that has more tokens than max_length, where packing does not split it, is "refuse"d, or "truncate",
        "drop".
    streaming: read the dataset while training, instead of before it; needs max_steps.
    shuffle_buffer: rows that streaming shuffles among.
    validation_fraction: share of the documents held out, the same ones whatever the seed.
    max_eval_sequences: at most this many held-out sequences are evaluated.
    dtype: of the weights while training. "auto" is float32, or bfloat16 with steps rounded at random where float32 does
        not fit into memory; with lora as stored.
    router_learning_rate, experts_learning_rate: of these weights, where it is not learning_rate; 0 freezes them.
    lora: fields of peft.LoraConfig, to train adapters alone; {} takes attention, stacked experts and router.
    quantization: "4bit" loads linear layers and routed experts in 4 bits (bitsandbytes, NF4), for lora alone.
    merge: at the end writes the whole model with its adapters added to the weights too, into `output_dir`/merged.
    distributed: fields of Transformers' DistributedConfig, such as {fsdp_size: 8, ep_size: 8}.
    training, routing_fields: what a recipe says beside these, as `make_recipe` sorts it: arguments of SFTConfig, and
        fields of the expert-choice config that do not change its weights, such as routing. packing_strategy is
        "wrapped" for text, documents end to end in rows of one size that do not see each other, and TRL's "bfd"
        elsewhere.
    """

    model: str
    output_dir: str
    dataset: str | list[Any]
    dataset_config: str | None = None
    dataset_split: str = "train"
    validation_dataset: str | None = None
    messages_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    other_columns: bool = False
    append_eos: bool = True
    too_long: str = "refuse"
    streaming: bool = False
    shuffle_buffer: int = 10_000
    validation_fraction: float | int = 0.05
    max_eval_sequences: int = 256
    dtype: str = "auto"
    router_learning_rate: float | int | None = None
    experts_learning_rate: float | int | None = None
    lora: dict[str, Any] | None = None
    quantization: str | None = None
    merge: bool = False
    distributed: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    routing_fields: dict[str, Any] = field(default_factory=dict)

    def validate_ranges(self) -> None:
        """Run by `@strict`."""
        for name, lowest in (("max_eval_sequences", 1), ("shuffle_buffer", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {lowest}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} must be above 0 and below 1")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype} is unknown; choose auto, float32, bfloat16 or float16")
        if self.too_long not in ("refuse", "truncate", "drop"):
            raise ValueError(f"too_long={self.too_long} is unknown; choose refuse, truncate or drop")
        if self.streaming and (self.training.get("max_steps") or 0) <= 0:
            raise ValueError("streaming=true needs max_steps: a stream does not say how long it is")
        if self.merge and (self.lora is None or self.distributed):
            raise ValueError(
                "merge=true is for adapters (lora) on whole models, not for a run of all weights or of parts"
            )
        if self.quantization not in (None, "4bit"):
            raise ValueError(f"quantization={self.quantization} is unknown; choose 4bit, or leave it out")
        if self.quantization and (self.lora is None or self.distributed):
            raise ValueError(
                f"quantization={self.quantization} is for adapters (lora={{}}) on whole models: weights in 4 bits can "
                "neither be trained themselves nor divided among devices (distributed)"
            )
        if self.quantization and "quantization_config" in (self.training.get("model_init_kwargs") or {}):
            raise ValueError(
                f"quantization={self.quantization} and model_init_kwargs.quantization_config say the same thing; "
                "leave one of them out"
            )
        packing = self.training.get("packing") or False
        if self.training.get("eval_packing") not in (None, packing):
            raise ValueError(
                f"eval_packing={self.training['eval_packing']} differs from packing={packing}: held-out rows are read "
                "as the others are; leave it out"
            )
        for name in ("router_learning_rate", "experts_learning_rate"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 freezes")
        for name, lowest in (("learning_rate", 0), ("max_length", 2), *((name, 1) for name in _COUNTS)):
            value = self.training.get(name)
            if value is not None and value < lowest:
                raise ValueError(f"{name}={value} must be at least {lowest}")


# Fields of the expert-choice config that a run may change: none of them changes a weight's shape.
_ROUTING = {item.name for item in fields(EcMoeConfigMixin)} - OF_NO_RECIPE
# Those that routes and weights depend on when a model is used; adapters, which have no config, do not carry them.
READ_AT_INFERENCE = {"inference_routing", "min_experts_per_token", "max_experts_per_token", "num_expert_groups"}
READ_AT_INFERENCE |= {"router_score_function", "routed_scaling_factor", "token_choice_bias_update_rate"}
READ_AT_INFERENCE |= {"normalize_combine_weights", "capacity_factor"}
_OWN = {item.name for item in fields(Recipe)} - OF_NO_RECIPE
_TRAINING = {item.name for item in fields(SFTConfig) if item.init} - OF_NO_RECIPE - {"output_dir"}
OLDEST_TRANSFORMERS = "5.23"  # whose Trainer it is tested with; family and converter take older ones
_HINTS = typing.get_type_hints(SFTConfig)
_COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
# YAML 1.1 reads 1e-3 as a string.
_FLOAT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def refuse_unknown(content: dict[str, Any], known: Iterable[str], what: str) -> None:
    """Refuses a field that is not known, with the nearest name.

    Raises:
        RecipeError: for the first unknown one.
    """
    known = list(known)
    for name, value in content.items():
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0)
            raise RecipeError(f"{name}={value!r} is no field of {what}; did you mean {nearest[0]}?")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe, or the one that is shipped under that name, and applies `field=value` overrides.

    Raises:
        RecipeError: for a file that is no recipe, an unknown field (with the nearest name), a wrong value.
    """
    content = read_recipe(path, overrides)
    return make_recipe(content)


def recipe_of(recipe: Recipe | Mapping[str, Any] | str | Path | None = None, **changes: Any) -> Recipe:
    """A recipe from what stands for one, with some fields replaced.

    Args:
        recipe: a Recipe, flat `field: value` pairs, a YAML file, or the name of a shipped one; None is keywords alone.
        changes: fields of ours or arguments of SFTConfig.

    Raises:
        RecipeError: as `load_recipe`.
    """
    if isinstance(recipe, Recipe):
        if not changes:
            return recipe
        own = {name: getattr(recipe, name) for name in _OWN}
        return make_recipe(replaced(own | recipe.training | recipe.routing_fields, changes))
    if recipe is not None and not isinstance(recipe, (str, Path, Mapping)):
        raise RecipeError(f"recipe={recipe!r} must be a Recipe, a mapping, a YAML file or the name of a shipped recipe")
    content = dict(recipe) if isinstance(recipe, Mapping) else {} if recipe is None else read_recipe(recipe)
    return make_recipe(replaced(content, changes))


def make_recipe(content: dict[str, Any]) -> Recipe:
    """A recipe from flat `field: value` pairs, ours and those of SFTConfig together.

    Raises:
        RecipeError: for an unknown field, a wrong value, and an installed Transformers that is too old.
    """
    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise RecipeError(
            f"transformers={transformers.__version__} is too old for fine-tuning; "
            f"pip install 'transformers>={OLDEST_TRANSFORMERS}'"
        )
    own: dict[str, Any] = {}
    training: dict[str, Any] = {}
    routing: dict[str, Any] = {}
    for name, value in content.items():
        value = float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if name == "model" and hasattr(value, "forward"):
            raise RecipeError("model must be a folder or Hub id; a model in memory is for ExpertChoiceTrainerMixin")
        if name in _OWN:
            own[name] = value
        elif name in _ROUTING:
            routing[name] = value
        elif name in _TRAINING:
            training[name] = _checked(name, value)
        else:
            raise unknown_field(name, value, _OWN | _TRAINING | _ROUTING)
    refuse_missing(own)
    try:
        return Recipe(**own, training=training, routing_fields=routing)
    except StrictDataclassError as error:
        raise RecipeError(refusal_of(error)) from error


def refusal_of(error: StrictDataclassError) -> str:
    """What a strict dataclass found wrong, in one line; of a field of a wrong type the types that it takes."""
    reason = " ".join(str(error).split(":", 2)[-1].split())
    several = re.match(r"Field '(\w+)' with value (.*) doesn't match any type in \((.*?)\)\. Errors:", reason)
    if several is not None:
        name, value, kinds = several.groups()
    elif (one := re.match(r"Field '(\w+)' expected (\w+), got \w+ \(value: (.*)\)$", reason)) is not None:
        name, kinds, value = one.groups()
    else:
        return reason
    plain = [kind for kind in ("bool", "dict", "float", "int", "list", "str") if re.search(rf"\b{kind}\b", kinds)]
    return f"{name}={value} must be {' or '.join(plain)}" if plain else reason


def _checked(name: str, value: Any) -> Any:
    """The value of a SFTConfig field that takes plain numbers, refused unless it is one.

    SFTConfig itself takes anything, and a word instead of a number fails only inside the optimiser.
    """
    if value is False and name.endswith("_strategy"):
        return "no"  # which YAML reads as a truth value
    kinds = {kind for kind in (bool, int, float, str) if kind in typing.get_args(_HINTS[name]) or kind is _HINTS[name]}
    other = set(typing.get_args(_HINTS[name])) - kinds - {type(None)}
    allowed = kinds | ({int} if float in kinds else set())
    if name == "resume_from_checkpoint" or not kinds or other or value is None or type(value) in allowed:
        return value
    raise RecipeError(f"{name}={value!r} must be {' or '.join(sorted(kind.__name__ for kind in kinds))}")


def learned_of(recipe: Recipe, kind: str) -> str:
    """What is learned of rows of a kind, as `Encoder` takes it.

    Raises:
        RecipeError: for a field of SFTConfig that is about rows of another kind.
    """
    completion, assistant = (recipe.training.get(f"{what}_only_loss") for what in ("completion", "assistant"))
    for name, value in (("completion_only_loss", completion), ("assistant_only_loss", assistant and kind == "text")):
        if value and kind != "prompt":
            raise RecipeError(f"{name}=True is for other rows than these, which hold {kind}; leave it out")
    if kind == "messages":
        return "all" if assistant is False else "the assistant"
    return "the completion" if completion is not False else "the assistant" if assistant else "all"


def training_arguments(recipe: Recipe) -> SFTConfig:
    """The SFTConfig of a recipe. Where it is silent, nothing is reported anywhere, a loss that is no number is not
    replaced by a better one in the log, and products are in the weights' precision (`precision` says otherwise)."""
    # TRL turns recomputation on under a name that Transformers has given up.
    silent: dict[str, Any] = {"report_to": "none", "logging_nan_inf_filter": False, "bf16": False}
    silent["dataloader_pin_memory"] = torch.accelerator.is_available()  # without one torch warns at every loader
    silent["activation_checkpointing"] = recipe.training.get("gradient_checkpointing", True)
    if recipe.training.get("loss_type", "nll") != "nll" or recipe.training.get("label_smoothing_factor"):
        silent |= {"metric_for_best_model": "nll", "greater_is_better": False}  # what runs are compared by
    if recipe.distributed:
        silent["save_only_model"] = True  # the optimiser's shards of a model sharded at load time cannot be saved
    # What is learned is said by the labels, which TRL takes as they are.
    settled = recipe.training | {"assistant_only_loss": False, "chat_template_path": None, "eval_packing": None}
    try:
        arguments = SFTConfig(**(silent | settled), output_dir=recipe.output_dir)
    except (ValueError, TypeError, ImportError, OSError) as error:
        if "bf16/gpu" in str(error):  # which speaks of a field that nobody asked about
            raise RecipeError(
                "bf16=True needs a GPU with products in bfloat16, and none is found here; leave it out (on such a GPU "
                "they are in bfloat16 without it), or add use_cpu=true to have them so on the CPU"
            ) from error
        raise RecipeError(f"SFTConfig refuses the recipe: {' '.join(str(error).split())}") from error
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1 and arguments.world_size == 1:  # Accelerate looks at what torchrun started only if a GPU is there
        raise RecipeError(
            f"{started} processes were started (WORLD_SIZE={started}) and each would train by itself into "
            f"output_dir={recipe.output_dir}; set use_cpu=true to train on CPUs together, or start one process"
        )
    if arguments.n_gpu > 1:  # Trainer would take nn.DataParallel, which no expert-choice model can train under
        raise RecipeError(
            f"one process sees {arguments.n_gpu} GPUs; start one for each (torchrun --nproc_per_node {arguments.n_gpu} "
            "-m ecmoe.finetune ...), or show it a single one (CUDA_VISIBLE_DEVICES=0)"
        )
    return arguments
