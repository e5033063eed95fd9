"""Sources that read more than text: their tensors by the names of the model in memory, and their decoder alone."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

import modeling_ecmoe

from ..checkpoints.locate import last_line
from ..checkpoints.source import Source
from ..errors import ConversionError
from .refusals import why_not

_HEAD = "lm_head.weight"
BUILDING_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, ValueError)


def refuse_composite(source: Source, fields: dict[str, Any], text_only: bool) -> None:
    """Refuses what reads more than text and has no decoder of a family here, or is no composite of ours.

    fields: of its config.json, with a text_config.

    Raises:
        ConversionError: with the nearest thing that can be converted.
    """
    kind, known, families = fields.get("model_type"), modeling_ecmoe.composites(), modeling_ecmoe.families()
    text: Any = source.config().get_text_config()
    own = modeling_ecmoe.config_class(str(kind)).text_config_classes if kind in known else ()
    decoders = [config_class.model_type.removeprefix("ecmoe_") for config_class in own]
    if text.model_type in decoders or (text_only and text.model_type in families):
        return
    if kind in known:
        why = f"its decoder is a {text.model_type}, and may be {', '.join(decoders)}"
    elif text.model_type in families:
        why = f"it reads more than text, and of such models {', '.join(known)} can be converted"
    else:
        raise ConversionError(f"model_type={kind} is not supported: {why_not(fields)}")
    alone = text.model_type in families
    instead = "say text_only=True (--text-only) to convert its decoder alone" if alone else "convert another one"
    raise ConversionError(f"model_type={kind} is not supported: {why}; {instead}")


def as_in_memory(source: Source, config: Any, text_only: bool) -> PreTrainedConfig:
    """Gives a source's tensors the names that they have in the model, whichever layout its files have.

    Args:
        text_only: leave out all but the decoder and its head, under the names of a causal language model.

    Returns:
        The config of what is converted: the composite's, or its decoder's; it is tied only where the weights are.
    """
    try:
        with torch.device("meta"):
            dense: Any = AutoModelForImageTextToText.from_config(config)
    except BUILDING_ERRORS as error:
        raise ConversionError(
            f"{source.config_place} describes no model that can be built: {last_line(error)}"
        ) from error
    names = _names_in_memory(dense, source.headers)
    source.headers = {names[name]: header for name, header in source.headers.items()}
    prefix = f"{decoder_name(dense)}."
    text = config.get_text_config()
    tied = bool(config.tie_word_embeddings)
    if tied and _HEAD in source.headers and source.has_weights:
        tied = source.is_same(_HEAD, f"{prefix}embed_tokens.weight")
    config.tie_word_embeddings = text.tie_word_embeddings = tied
    if not text_only:
        return config
    kept = {f"model.{name.removeprefix(prefix)}": name for name in source.headers if name.startswith(prefix)}
    kept |= {_HEAD: _HEAD} if _HEAD in source.headers else {}
    source.keep(kept)
    return text


def decoder_name(model: PreTrainedModel) -> str:
    """The name of the decoder among the modules of a language model: "model", or "model.language_model"."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def _names_in_memory(dense: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """By name in a file the name in the model, as Transformers would load it. What it would not only rename but
    compute keeps its name."""
    mapping = get_model_conversion_mapping(dense)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state, found = dense.state_dict(), {}
    for name in names:
        renamed, computed = rename_source_key(name, renamings, converters, dense.base_model_prefix, state)
        found[name] = name if computed else renamed
    return found


def is_passed_over(name: str, dense: Any) -> bool:
    """Whether the dense class reads a tensor of that name without a word and does nothing with it."""
    return any(re.search(pattern, name) for pattern in dense._keys_to_ignore_on_load_unexpected or ())


def left_out(source: Source) -> dict[str, int]:
    """The parts that a text-only conversion leaves out, by name, and their parameters."""
    found: dict[str, int] = {}
    for name, header in source.left_out.items():
        part = ".".join(name.split(".")[: 2 if name.startswith("model.") else 1])
        found[part] = found.get(part, 0) + torch.Size(header.shape).numel()
    return found
