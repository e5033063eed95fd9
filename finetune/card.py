"""The card of a fine-tuned folder: what was done and measured."""

import importlib.metadata
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from .recipe import READ_AT_INFERENCE, Recipe

# What of a recipe decides the result; the rest is in finetune_recipe.yaml beside the card.
_FIELDS = ["learning_rate", "lr_scheduler_type", "warmup_steps", "max_length", "packing", "optim", "seed"]
_FIELDS += ["per_device_train_batch_size", "gradient_accumulation_steps"]
_PACKAGES = ("ecmoe", "torch", "transformers", "trl", "peft")
_WHOLE = """import ecmoe
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this-folder-or-repository")
tokenizer = AutoTokenizer.from_pretrained("this-folder-or-repository")"""
_ADAPTER = """import ecmoe
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this-folder-or-repository"{fields})  # needs its base model
whole = model.merge_and_unload()  # without adapters, to save or to generate faster"""


def render_card(recipe: Recipe, arguments: Any, results: Mapping[str, Any], is_adapter: bool) -> str:
    """The card's markdown.

    arguments: SFTConfig of the run. results: as of `run`. is_adapter: whether the folder holds adapters alone.
    """
    folder = Path(recipe.model).expanduser()
    source = _card_data(folder) if folder.is_dir() else {"base_model": recipe.model}
    names = [entry["dataset"] for entry in recipe.dataset] if isinstance(recipe.dataset, list) else [recipe.dataset]
    is_expert_choice = str(results["model_type"]).startswith("ecmoe_")
    tags = ["trl", "sft", *(["lora"] if is_adapter else []), *(["mixture-of-experts", "ecmoe"] * is_expert_choice)]
    terms: Any = {name: source[name] for name in ("license", "license_name", "license_link") if name in source}
    card_data = ModelCardData(
        base_model=source.get("base_model"),
        base_model_relation="adapter" if is_adapter and "base_model" in source else None,
        datasets=[name for name in names if not Path(name).expanduser().exists()] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        **terms,
    )
    # The arguments of a run have forgotten what was done with the rows.
    fields = {name: recipe.training.get(name, getattr(arguments, name)) for name in _FIELDS}
    fields = {name: getattr(value, "value", value) for name, value in fields.items()}
    fields |= {"lora": recipe.lora or "default"} if recipe.lora is not None else {}
    card = ModelCard.from_template(
        card_data,
        template_str=(files("ecmoe.model_cards") / "tuned.md").read_text(encoding="utf-8"),
        model_name=folder.name,
        base=folder.name if folder.is_dir() else recipe.model,
        datasets=", ".join(f"`{name if not Path(name).expanduser().exists() else Path(name).name}`" for name in names),
        is_adapter=is_adapter,
        is_expert_choice=is_expert_choice,
        loss_before=figure(results["loss_before"], results["loss_before_stderr"]),
        loss_after=figure(results["loss_after"], results["loss_after_stderr"]),
        loss_change=figure(results.get("loss_change"), results.get("loss_change_stderr"), "+.4f"),
        doubt=doubt(results),
        results=results,
        fields={name: value for name, value in fields.items() if value is not None},
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES),
        loading=_ADAPTER.format(fields=fields_of_base(recipe)) if is_adapter else _WHOLE,
    )
    return str(card).rstrip() + "\n"


def fields_of_base(recipe: Recipe) -> str:
    """The keywords that give the base of adapters the routes that they were trained by."""
    held = {name: value for name, value in recipe.routing_fields.items() if name in READ_AT_INFERENCE}
    return "".join(f", {name}={value!r}" for name, value in held.items())


def figure(value: float | None, error: float | None, form: str = ".4f") -> str:
    """Such as "2.1034 ± 0.0210"."""
    return "unknown" if value is None else f"{value:{form}}" + ("" if error is None else f" ± {error:.4f}")


def doubt(results: Mapping[str, Any]) -> str:
    """What few held-out rows leave open, in a sentence; empty where the change of the loss is well beyond its error."""
    change, error, rows = results.get("loss_change"), results.get("loss_change_stderr"), results["held_out_rows"]
    more = "raise validation_fraction or max_eval_sequences, or give validation_dataset"
    if change is not None and error is not None and abs(change) < 2 * error:
        return f"The change is within two standard errors: {rows:,} held-out rows do not show it; {more}."
    if rows < 30:
        return f"{rows} held-out row{'s are' if rows > 1 else ' is'} few: compare no runs by them; {more}."
    return ""


def _card_data(folder: Path) -> dict[str, Any]:
    """What the card of a model's folder says of its base and its licence; nothing where none can be read."""
    try:
        return dict(metadata_load(folder / "README.md") or {})
    except (ValueError, OSError, yaml.YAMLError):
        return {}
