"""Checkpoints as the analysis commands want them."""

import contextlib
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer

import modeling_ecmoe
from ecmoe.hub import why_no_tokenizer, why_not_causal, why_not_from_hub
from ecmoe.progress import announce, gigabytes
from modeling_ecmoe.registry_ecmoe import is_own

from .arguments import check_checkpoint
from .errors import AnalysisError

_SILENT_BYTES = 1e9  # of a checkpoint that is loaded without a word


def load(checkpoint: str, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """Model in eval mode, and tokenizer, of a checkpoint folder or Hub id; "auto" is the dtype it was saved in.

    Raises:
        AnalysisError: when it cannot be loaded.
    """
    path = Path(checkpoint).expanduser()
    check_checkpoint(checkpoint)
    place = _device(device)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else 0
    if size > _SILENT_BYTES:
        announce(f"Loading {checkpoint}, {gigabytes(size)}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        config = AutoConfig.from_pretrained(checkpoint)
        name = modeling_ecmoe.auto_class_of(config)
        other_kind = why_not_causal(config) if name == "AutoModelForCausalLM" else None
        if other_kind:
            raise AnalysisError(f"checkpoint={checkpoint} {other_kind}")
        auto_class = getattr(transformers, name)
        model: Any = auto_class.from_pretrained(checkpoint, dtype=dtype)
        model = model.to(place)
    except AnalysisError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise AnalysisError(f"checkpoint={checkpoint} {_why_not(error, path)}") from error
    return model.eval(), tokenizer


def _why_not(error: Exception, path: Path) -> str:
    """One line of what may be many."""
    if path.is_dir():
        reason = f"cannot be loaded: {textwrap.shorten(str(error), 200, placeholder=' ...')}"
        return why_no_tokenizer(str(path), path) or reason
    reason = why_not_from_hub(error)
    return f"is no local folder and could not be fetched from the Hub: {reason}; give a checkpoint folder or a Hub id"


def _device(device: str | None) -> torch.device:
    """The one that was asked for, if a tensor fits on it; the first accelerator, or the CPU, when none was."""
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise AnalysisError(f"device={place} cannot be used ({reason}); leave it out, or name cpu or cuda:0") from error
    return torch.device(place)


@contextlib.contextmanager
def opened(
    checkpoint: Any, tokenizer: Any = None, device: str | None = None, needs_experts: bool = False
) -> Iterator[tuple[Any, Any]]:
    """Model in eval mode, and tokenizer, of a checkpoint; or a model in memory, left in the mode that it was in.

    Raises:
        AnalysisError: when it cannot be loaded, or an option does not go with it.
    """
    if isinstance(checkpoint, os.PathLike):
        checkpoint = os.fspath(checkpoint)
    if isinstance(checkpoint, str):
        if tokenizer is not None:
            raise AnalysisError(
                "tokenizer is of a model in memory; that of a checkpoint lies in its folder, leave it out"
            )
        yield load_expert_choice(checkpoint, device) if needs_experts else load(checkpoint, device)
        return
    if not isinstance(checkpoint, nn.Module):
        raise AnalysisError(f"checkpoint={checkpoint!r} is neither a checkpoint's folder or Hub id nor a model")
    if not callable(tokenizer):
        raise AnalysisError(f"tokenizer={tokenizer!r}: a model in memory has none; give the one that goes with it")
    head: Any = getattr(checkpoint, "get_output_embeddings", lambda: None)
    if head() is None:
        raise AnalysisError(f"checkpoint={type(checkpoint).__name__} is no language model; give the one with its head")
    if device is not None:
        raise AnalysisError(f"device={device} is of a checkpoint; a model in memory is run where it is, leave it out")
    if needs_experts:
        _refuse_without_experts(checkpoint, name_of(checkpoint))
    was_training = checkpoint.training
    try:
        yield checkpoint.eval(), tokenizer
    finally:
        checkpoint.train(was_training)


def name_of(checkpoint: Any) -> str:
    """What a result calls a checkpoint, or a model in memory."""
    if isinstance(checkpoint, str | os.PathLike):
        return os.fspath(checkpoint)
    return getattr(getattr(checkpoint, "config", None), "name_or_path", "") or type(checkpoint).__name__


def load_expert_choice(checkpoint: str, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """As `load`, and refuses a model without experts.

    Raises:
        AnalysisError: naming the command that makes experts of it.
    """
    model, tokenizer = load(checkpoint, device, dtype)
    _refuse_without_experts(model, checkpoint)
    return model, tokenizer


def _refuse_without_experts(model: Any, name: str) -> None:
    if not is_of_family(model):
        raise AnalysisError(
            f"checkpoint={name} is a {model.config.model_type} model without experts, so there are no routes to "
            "look at; convert it with ecmoe-convert"
        )


def is_of_family(model: Any) -> bool:
    """Of this family, token choice included: whether there are routes to look at."""
    return is_own(model.config)


def padding_id(tokenizer: Any) -> int:
    """A token to fill batches with; it is masked, so any will do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def template_remedy(checkpoint: Any) -> str:
    """What to do where the chat template of a checkpoint's tokenizer, or of that of a model in memory, does not do."""
    if isinstance(checkpoint, str | os.PathLike):
        return f"put one that takes them into {name_of(checkpoint)} as chat_template.jinja"
    return "set the tokenizer's chat_template to one that takes them"


def lent_template(models: list[Any], tokenizer: Any) -> tuple[Any, str] | None:
    """The chat template of one of several models for those without any, and the model's name.

    A base model and the chat model that was made of it often have one vocabulary, and the former has no template. None
    where all have one or none has, where there are two different ones, and where the vocabularies are not the same.

    tokenizer: of models in memory.
    """
    held = []
    for model in models:
        on_disk = isinstance(model, str | os.PathLike)
        try:
            held.append((name_of(model), AutoTokenizer.from_pretrained(model) if on_disk else tokenizer))
        except (OSError, ValueError, KeyError):  # said when the model is loaded
            return None
    lenders = [(its.chat_template, name) for name, its in held if getattr(its, "chat_template", None)]
    is_one = bool(lenders) and all(template == lenders[0][0] for template, _ in lenders)
    is_same = all(its.get_vocab() == held[0][1].get_vocab() for _, its in held[1:])
    return lenders[0] if is_one and is_same and len(lenders) < len(held) else None
