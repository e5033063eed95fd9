"""Model and tokenizer of a recipe, with the routing fields and the parallel plan it asks for."""

import importlib.util
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.distributed import DistributedConfig
from trl import SFTConfig

from ecmoe.hub import why_no_tokenizer, why_not_causal, why_not_from_hub
from modeling_ecmoe.registry_ecmoe import is_own

from .arguments import check_model
from .errors import RecipeError
from .recipe import READ_AT_INFERENCE, Recipe, refusal_of, refuse_unknown, shipped

_UNLOADABLE = (OSError, ValueError, KeyError, TypeError, ImportError)


def meet(recipe: Recipe) -> None:
    """Lets processes that train on CPUs find each other before any of them counts memory or says anything.

    Without being told of CPUs Accelerate looks for GPUs alone, and each process takes itself for the only one until
    TrainingArguments are made.
    """
    if recipe.training.get("use_cpu") and int(os.environ.get("WORLD_SIZE") or 1) > 1 and not PartialState._shared_state:
        PartialState(cpu=True, backend=recipe.training.get("ddp_backend"))


def load_config(recipe: Recipe) -> Any:
    """The config of a recipe's model, with the routing fields it asks for.

    Raises:
        RecipeError: when there is no such model, or the fields do not go with it.
    """
    path = Path(recipe.model).expanduser()
    check_model(recipe.model)
    try:
        config: Any = AutoConfig.from_pretrained(recipe.model)
        _refuse_untrainable(recipe, config)
        if recipe.routing_fields and not is_own(config):
            name, value = next(iter(recipe.routing_fields.items()))
            raise RecipeError(
                f"{name}={value} is for expert-choice models, and model={recipe.model} is {config.model_type}"
            )
        for name, value in recipe.routing_fields.items():
            if recipe.lora is not None and not recipe.merge:
                _refuse_what_adapters_lose(name, value, config, recipe.model)
            setattr(config, name, value)
        if recipe.quantization:
            _refuse_unquantizable(recipe, config)
        config.validate()  # what goes together; from_pretrained looks at each field alone
    except RecipeError:
        raise
    except StrictDataclassError as error:  # names one of routing_fields
        raise RecipeError(refusal_of(error)) from error
    except _UNLOADABLE as error:
        raise RecipeError(f"model={recipe.model} {_why_not(error, path)}") from error
    return config


def _refuse_untrainable(recipe: Recipe, config: Any) -> None:
    """Models that no recipe trains, and those that one trains by adapters alone."""
    if hasattr(config, "text_config"):
        it = "its source" if is_own(config) else "it"
        raise RecipeError(
            f"model={recipe.model} is of model_type {config.model_type}, which reads images too, and recipes train on "
            f"text alone; convert {it} with --text-only, or train it with a trainer of your own"
        )
    other_kind = why_not_causal(config)
    if other_kind:
        raise RecipeError(f"model={recipe.model} {other_kind}")
    if recipe.lora is None and getattr(config, "quantization_config", None) is not None:
        raise RecipeError(
            f"model={recipe.model} is quantised, and such weights cannot be trained themselves; lora={{}} trains "
            "adapters on them, or give the unquantised checkpoint"
        )


def _refuse_what_adapters_lose(name: str, value: Any, config: Any, model: str) -> None:
    """Fields that inference reads: adapters have no config, so that they would be run by their base's routes.

    config: the base's.
    """
    if name not in READ_AT_INFERENCE or value == getattr(config, name):
        return
    if name == "token_choice_bias_update_rate" and None not in (value, getattr(config, name)):
        return  # how much thresholds move, and not whether they count
    if name == "capacity_factor" and config.routing != "token_choice":
        return  # the thresholds, which are saved with the adapters, hold it
    raise RecipeError(
        f"{name}={value} beside lora: adapters have no config, and whoever loads them on model={model} would get its "
        f"{name}={getattr(config, name)}; add merge=true, which writes the whole model, or set the field in its "
        "config.json"
    )


def _refuse_unquantizable(recipe: Recipe, config: Any) -> None:
    """What stands in the way of `quantization`, before any weight is read."""
    asked = f"quantization={recipe.quantization}"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(f"{asked} needs bitsandbytes, which is not installed; pip install bitsandbytes")
    if getattr(config, "quantization_config", None) is not None:
        raise RecipeError(f"{asked}: model={recipe.model} is quantised already; leave quantization out")
    if PartialState().num_processes > 1:
        raise RecipeError(
            f"{asked} is for one process, and {PartialState().num_processes} were started; start one, or leave "
            "quantization out"
        )


def quantization_config(recipe: Recipe, config: Any) -> BitsAndBytesConfig:
    """Linear layers and experts as in QLoRA (arXiv 2305.14314): NF4, scales quantised too; products in the precision
    that the weights would have.

    config: of the model.
    """
    stored = getattr(config, "dtype", None) or torch.float32
    dtype = stored if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _why_not(error: Exception, path: Path) -> str:
    """One line; of what is no folder, why the Hub did not give it."""
    if path.is_dir():
        return f"cannot be loaded: {' '.join(str(error).split())}"
    reason = why_not_from_hub(error)
    return f"is no local folder and could not be fetched from the Hub: {reason}; give a checkpoint folder or a Hub id"


def load_model(recipe: Recipe) -> Any:
    """The model of a recipe, by its parallel plan."""
    options: dict[str, Any] = (recipe.training.get("model_init_kwargs") or {}) | recipe.routing_fields
    if "dtype" in options:
        raise RecipeError(f"model_init_kwargs={options} names dtype; write dtype={options['dtype']} beside it")
    if recipe.distributed:
        options["distributed_config"] = distributed_config(recipe)
    if recipe.quantization:
        options["quantization_config"] = quantization_config(recipe, AutoConfig.from_pretrained(recipe.model))
    try:
        return AutoModelForCausalLM.from_pretrained(recipe.model, dtype=recipe.dtype, **options)
    except _UNLOADABLE as error:
        raise RecipeError(f"model={recipe.model} cannot be loaded: {' '.join(str(error).split())}") from error


def load_tokenizer(recipe: Recipe, config: Any) -> Any:
    """The tokenizer of a recipe, for a model of that config, with the recipe's template and a token to pad with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    except _UNLOADABLE as error:
        missing = why_no_tokenizer(recipe.model, Path(recipe.model).expanduser())
        reason = missing or f"cannot be loaded: {' '.join(str(error).split())}"
        raise RecipeError(f"model={recipe.model} {reason}") from error
    if recipe.training.get("chat_template_path"):
        tokenizer.chat_template = _read_template(recipe.training["chat_template_path"])
    if recipe.training.get("eos_token"):  # which TRL looks up once more
        tokenizer.eos_token = recipe.training["eos_token"]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= config.vocab_size:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)  # one that has an embedding
    longest = getattr(config, "max_position_embeddings", None)
    length = recipe.training.get("max_length", SFTConfig.max_length)
    if longest is not None and length is not None and length > longest:
        raise RecipeError(f"max_length={length} is more than the model's {longest} positions; shorten it")
    return tokenizer


def distributed_config(recipe: Recipe) -> DistributedConfig:
    """The parallel plan of a recipe.

    Raises:
        RecipeError: for a field that is unknown, or one that does not go with the recipe or with the processes here.
    """
    content: dict[str, Any] = dict(recipe.distributed or {})
    refuse_unknown(content, [item.name for item in fields(DistributedConfig)], "distributed (DistributedConfig)")
    try:
        config: Any = DistributedConfig(**content)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"distributed={content} is refused: {' '.join(str(error).split())}") from error
    if content.get("ep_implementation") == "equal_splits":
        for name, value, wanted in (("packing", False, True), ("packing_strategy", "wrapped", "wrapped")):
            if recipe.training.get(name, value) != wanted:
                raise RecipeError(
                    f"{name}={recipe.training.get(name, value)} makes batches of other lengths on each rank, which "
                    f"ep_implementation=equal_splits cannot divide equally; set {name}={str(wanted).lower()}, or "
                    "ep_implementation=all_to_all"
                )
    wanted, started = config.dp_size * config.tp_size * config.pp_size, PartialState().num_processes
    if wanted != started:
        raise RecipeError(
            f"distributed={content} is for {wanted} processes and {started} run; start it with accelerate launch "
            f"--num_processes {wanted}"
        )
    return config


def _read_template(name: str) -> str:
    place, known = Path(name).expanduser(), shipped(".jinja")
    if not place.is_file() and name in known:
        place = known[name]
    try:
        return place.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"chat_template_path={name} cannot be read ({error})") from error
