"""Where tensors come from: one at a time and by name, from a folder (folder.py) or from a model (memory.py)."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import ConversionError

# Tensors that are copied as they are come in pieces of this size: an embedding of any size costs no more memory.
PIECE_BYTES = 1 << 26
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Names in files of older Transformers -> today's.
OLD_NAMES = {"embed_out.weight": "lm_head.weight"}
# How names in a layer end in files, OLMo-hybrid's and LFM3's -> how they do in memory.
_OLD_ENDINGS = {
    ".attention_layer_norm.weight": ".input_layernorm.weight",
    ".feedforward_layer_norm.weight": ".post_attention_layernorm.weight",
    ".self_attn.gate_proj.weight": ".self_attn.g_proj.weight",
}
# What is one tensor in memory and several in files, whose rows stand one after the other.
_JOINED = {".conv1d.weight": (".q_conv1d.weight", ".k_conv1d.weight", ".v_conv1d.weight")}
# Buffers that old checkpoints carry and no model reads.
_UNREAD = (
    "rotary_emb.inv_freq",
    *(f".{attention}.{buffer}" for attention in ("attention", "attn") for buffer in ("bias", "masked_bias")),
    ".attn.causal_mask",
    ".embeddings.position_ids",
)


def with_prefix(headers: Mapping[str, "Header"], prefix: str) -> dict[str, "Header"]:
    """The names as a language model has them where a file holds those of its base model alone, as GPT-2's does.

    prefix: what the language model calls its base model.
    """
    if any(name.startswith(f"{prefix}.") for name in headers):
        return dict(headers)
    return {name if name.startswith("lm_head.") else f"{prefix}.{name}": header for name, header in headers.items()}


def is_unread(name: str) -> bool:
    """Whether no model reads a tensor of that name."""
    return name.endswith(_UNREAD)


@dataclass(frozen=True)
class Header:
    """What is known of a tensor that is not read yet: dtype as safetensors names it, and shape.

    file_name, name: of a file the shard that holds it, and what it is called there.
    parts: those in files whose rows are its rows, where they are several.
    """

    file_name: str
    dtype: str
    shape: tuple[int, ...]
    name: str
    parts: tuple["Header", ...] = ()

    @property
    def nbytes(self) -> int:
        """As the dtype's name says: BF16, F8_E4M3; BOOL has no number and takes a byte."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


def named_as_in_memory(headers: dict[str, Header]) -> dict[str, Header]:
    """The headers of files by the names that tensors have in memory."""
    found = dict(headers)
    for old, new in OLD_NAMES.items():
        if old in found:
            found.setdefault(new, found.pop(old))
    for name in headers:
        for old, new in _OLD_ENDINGS.items():
            if name.endswith(old):
                found[name.removesuffix(old) + new] = found.pop(name)
        for joined, (first, *_) in _JOINED.items():
            prefix = name.removesuffix(first)
            names = [prefix + ending for ending in _JOINED[joined]]
            if name.endswith(first) and all(part in found for part in names):
                parts = tuple(found.pop(part) for part in names)
                shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
                found[prefix + joined] = Header(parts[0].file_name, parts[0].dtype, shape, name, parts)
    return found


class Source(ABC):
    """Tensors by name, read when asked for, and the config of the model they belong to.

    source: what the user calls it. place: what a message calls it. config_place: the same of its config. commit: of the
    Hub, where it came from there. headers: what is known of its tensors, by name. left_out: the same of those that are
    not converted. has_weights: whether they can be read, or only the headers are here.
    """

    source: str
    place: str
    config_place: str
    commit: str | None
    headers: dict[str, Header]
    left_out: dict[str, Header]
    has_weights: bool
    damaged = "it is damaged; fetch it again"  # what a message says of numbers that are none

    @abstractmethod
    def config_fields(self) -> dict[str, Any]:
        """The config as plain fields."""

    @abstractmethod
    def config(self) -> PreTrainedConfig:
        """The config; refused where the weights are quantised."""

    @abstractmethod
    def _rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """A tensor, or its rows from start to stop."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer that goes with the model."""

    @abstractmethod
    def running(self, dtype: torch.dtype, device: str | None) -> AbstractContextManager[Any]:
        """The model itself in eval mode, while the context is open."""

    @abstractmethod
    def copy_companions(self, folder: Path) -> None:
        """Writes what travels along with the weights: tokenizer, templates, generation defaults, licence."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What tells one state of the source from another, without reading the weights."""

    weight_files: list[Path]

    @property
    @abstractmethod
    def bytes_to_load(self) -> int:
        """Memory that running the model takes beside what is taken already."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or its rows from start to stop.

        Raises:
            ConversionError: when a value is NaN or infinite.
        """
        tensor = self._rows(name, start, stop)
        if not tensor.is_meta and not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
            raise ConversionError(f"{name} of {self.source} holds NaN or infinity: {self.damaged}")
        return tensor

    def pieces(self, name: str, checked: bool = True) -> Iterator[Tensor]:
        """A tensor as it is, in blocks of rows of `PIECE_BYTES` at most; one without dimensions whole.

        checked: refuse one that is not finite.
        """
        header, read = self.headers[name], self.read if checked else self._rows
        if not header.shape:
            yield read(name, 0, None)
            return
        num_rows = header.shape[0]
        row_bytes = math.prod(header.shape[1:]) * DTYPES[header.dtype].itemsize
        rows_at_once = max(1, PIECE_BYTES // max(1, row_bytes))
        for start in range(0, num_rows, rows_at_once):
            yield read(name, start, min(start + rows_at_once, num_rows))

    def keep(self, names: Mapping[str, str]) -> None:
        """Keeps some of its tensors, by the names that they are to have and those that they had; the others are left
        out."""
        kept = set(names.values())
        self.left_out = {name: header for name, header in self.headers.items() if name not in kept}
        self.headers = {name: self.headers[old] for name, old in names.items()}

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Every one of these tensors is there in that shape.

        Raises:
            ConversionError: naming the first that is not.
        """
        for name, shape in expected.items():
            header = self.headers.get(name)
            if header is None:
                raise ConversionError(
                    f"source={self.place} lacks the tensor {name}; is it a complete causal language model?"
                )
            if header.shape != shape:
                raise ConversionError(
                    f"{name} has shape {list(header.shape)}, {self.config_place} promises {list(shape)}; they do not "
                    "belong together"
                )

    def check_tied(self, tied: Mapping[str, str]) -> None:
        """A tensor that is tied to another and yet in the file has the other's values; Transformers unties it if not.

        Raises:
            ConversionError: naming the first that has not, which the output would lose.
        """
        for name, partner in tied.items():
            if name in self.headers and not self.is_same(name, partner):
                raise ConversionError(
                    f"{name} of {self.source} is not {partner}, which tie_word_embeddings=True makes it; set "
                    f"tie_word_embeddings to false in {self.config_place} to keep both"
                )

    def is_same(self, name: str, other: str) -> bool:
        """Whether two tensors have the same values."""
        one, two = self.headers[name], self.headers[other]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        return all(map(torch.equal, self.pieces(name), self.pieces(other)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the checkpoint, read off the embedding of its tokens."""
        names = [name for name in self.headers if not is_unread(name)] or list(self.headers)
        name = min(
            names, key=lambda name: ("embed_tokens" not in name, "embed" not in name and "wte." not in name, name)
        )
        return DTYPES[self.headers[name].dtype]
