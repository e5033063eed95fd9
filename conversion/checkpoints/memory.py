"""A model that is in memory already, read as its checkpoint would be; its tensors are handed out, not copied."""

import contextlib
import copy
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import modeling_ecmoe

from ..errors import ConversionError
from .source import DTYPES, Header, Source

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ModelInMemory(Source):
    """The tensors of a model under the names that its checkpoint has.

    Args:
        model: a language model of Transformers, on any device; all of its weights there, or all on the meta device.
        tokenizer: that goes with it, where text is needed.

    Raises:
        ConversionError: for a model that has no plain weights: wrapped, quantised or offloaded.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        refuse_other(model)
        self.model: PreTrainedModel = model
        self.given_tokenizer = tokenizer
        self.source = f"{Path(model.config.name_or_path).name or type(model).__name__}, in memory"
        self.place, self.config_place, self.commit = type(model).__name__, "model.config", None
        self.tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.headers = {
            name: Header("", _NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), name)
            for name, tensor in self.tensors.items()
        }
        self.left_out, self.has_weights = {}, not self.is_on_meta

    def config_fields(self) -> dict[str, Any]:
        return {**self.model.config.to_dict(), "model_type": self.model.config.model_type}

    def config(self) -> PreTrainedConfig:
        return copy.deepcopy(self.model.config)

    def tokenizer(self) -> Any:
        """The tokenizer that was given.

        Raises:
            ConversionError: when none was.
        """
        if not callable(self.given_tokenizer):
            raise ConversionError(
                f"tokenizer={self.given_tokenizer!r}: text is needed to calibrate and verify; give the model's "
                "tokenizer, or verify=False"
            )
        return self.given_tokenizer

    def _rows(self, name: str, start: int, stop: int | None) -> Tensor:
        tensor = self.tensors[self.headers[name].name].detach()
        return tensor if stop is None else tensor[start:stop]

    def is_same(self, name: str, other: str) -> bool:
        one, two = (self.tensors[self.headers[held].name] for held in (name, other))
        return one is two or super().is_same(name, other)

    @contextlib.contextmanager
    def running(self, dtype: torch.dtype, device: str | None) -> Iterator[Any]:
        """Where it is, in its own dtype; left in the mode that it was in."""
        was_training = self.model.training
        try:
            yield self.model.eval()
        finally:
            self.model.train(was_training)

    def copy_companions(self, folder: Path) -> None:
        if self.model.generation_config is not None:  # as it is: save_pretrained would refuse what it finds unwise
            content = self.model.generation_config.to_json_string(use_diff=True)
            (folder / "generation_config.json").write_text(content, encoding="utf-8")
        if self.given_tokenizer is not None:
            self.given_tokenizer.save_pretrained(folder)

    def fingerprint(self) -> dict[str, Any]:
        """Another one each time: who can tell what was done to a model between two calls?"""
        return {"model": uuid.uuid4().hex}

    weight_files: list[Path] = []
    bytes_to_load = 0
    damaged = "it holds no numbers any more; load it again"

    @property
    def is_on_meta(self) -> bool:
        """Whether it has shapes alone."""
        return any(tensor.is_meta for tensor in self.tensors.values())


def refuse_other(model: Any) -> None:
    """Refuses what holds no plain weights of its own.

    Raises:
        ConversionError: naming what it is and the remedy.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ConversionError(f"source={model!r} is neither a checkpoint's folder or Hub id nor a model")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ConversionError(f"source={name} carries PEFT adapters; merge them first, or load the model without them")
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(f"source={name} is no model of Transformers; give one that from_pretrained loads")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ConversionError(f"source={name} is quantised; load it without quantization_config")
    auto_class: Any = getattr(transformers, modeling_ecmoe.auto_class_of(model.config))
    language_model: Any = auto_class._model_mapping.get(type(model.config), None)
    if language_model is not None and not isinstance(model, language_model):
        raise ConversionError(f"source={name} is not the language model, {language_model.__name__}; give that one")
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    hooks += [inner for hook in hooks for inner in getattr(hook, "hooks", ())]
    on_meta = {parameter.is_meta for parameter in model.parameters()}
    if len(on_meta) > 1 or any(getattr(hook, "offload", False) for hook in hooks):
        raise ConversionError(f"source={name} has weights offloaded to disk or CPU; load it without device_map")
