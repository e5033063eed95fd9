"""What can be wrong with a command before there is a model: checked before torch and Transformers are imported."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoints.places import free_place, local_folder, parse_size
from .errors import ConversionError
from .upcycling.settings import MIXTURE_TYPES, Settings

WAYS_OUT = ("token-choice", "glm4-moe")  # what --to takes
_OF_SETTINGS: tuple[str, ...] = (
    "init",
    "num_experts",
    "capacity_factor",
    "ratio",
    "granularity",
    "layers",
    "router",
    "mix_attention",
)
_OF_SETTINGS += ("routing", "min_experts_per_token", "max_experts_per_token")
# Options that have no meaning in one of the two directions.
_ONLY_IN = {*_OF_SETTINGS, "text_only", "router_prompts", "mix_with", "num_gpus"}
_ONLY_OUT = {"num_experts_per_tok"}


def check_arguments(options: Mapping[str, Any]) -> None:
    """Refuses what the arguments of `convert`, or with `to` those of `export`, show by themselves to be wrong.

    Args:
        options: by name, as both functions and the command take them; what is not given is not there.

    Raises:
        ConversionError: naming the first that is wrong, its value and the remedy.
    """
    to = options.get("to")
    for name in sorted(options.keys() & (_ONLY_IN if to is not None else _ONLY_OUT)):
        where = "belongs to --to" if to is None else f"does not go with --to {to}"
        raise ConversionError(f"{name}={options[name]} {where}; leave it out")
    if to is not None and to not in WAYS_OUT:
        raise ConversionError(f"to={to} is unknown; choose {' or '.join(WAYS_OUT)}")
    if to is None:
        _check_upcycling(options)
    top_k = options.get("num_experts_per_tok")
    if top_k is not None and top_k < 1:
        raise ConversionError(f"num_experts_per_tok={top_k} must be at least 1")
    num_tokens = options.get("calibration_tokens")
    if num_tokens is not None and num_tokens < 1:
        raise ConversionError(f"calibration_tokens={num_tokens} must be at least 1; leave it out for the default")
    parse_size(options.get("max_shard_size", "5GB"))
    for name in ("text", "router_prompts"):
        if options.get(name) is not None:
            _check_file(name, options[name])
    free_place(options["destination"])
    mix_with = options.get("mix_with") or []
    for source in (options["source"], *mix_with):
        if isinstance(source, str | os.PathLike):
            local_folder(os.fspath(source))


def _check_upcycling(options: Mapping[str, Any]) -> None:
    num_gpus, mix_with = options.get("num_gpus"), options.get("mix_with")
    if num_gpus is not None and num_gpus < 1:
        raise ConversionError(f"num_gpus={num_gpus} must be at least 1")
    if mix_with is not None and not isinstance(mix_with, list | tuple):
        raise ConversionError("mix_with must be a list of checkpoints or models; put it into [...]")
    settings = Settings(**{name: options[name] for name in (*_OF_SETTINGS, "seed") if name in options})
    if _may_be_mixture(options["source"]):  # whose number of experts is its own
        settings = replace(settings, num_experts=None, capacity_factor=None)
    settings.check(1 + len(mix_with or []))
    prompts = options.get("router_prompts")
    if (settings.router == "hidden") != (prompts is not None):
        raise ConversionError(
            f"router={settings.router} and router_prompts={prompts}: router=hidden needs a file of prompts, and no "
            "other router reads one"
        )


def _may_be_mixture(source: Any) -> bool:
    """Whether a folder's config.json says that its experts are there already. Of a Hub id nothing is known yet."""
    if not isinstance(source, str | os.PathLike):
        return str(getattr(getattr(source, "config", None), "model_type", "")) in MIXTURE_TYPES
    path = Path(source).expanduser() / "config.json"
    if not path.is_file():
        return True
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type") in MIXTURE_TYPES
    except (OSError, ValueError, AttributeError):
        return False


def _check_file(name: str, value: str | os.PathLike[str]) -> None:
    path = Path(value).expanduser()
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ConversionError(f"{name}={value} cannot be read ({error.strerror}); name a file that is there") from error
