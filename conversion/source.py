"""A dense checkpoint: where it is, whether it is whole, and its tensors, read one at a time."""

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig

from .dense import OLD_NAMES
from .errors import ConversionError

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_config.json"  # of PEFT
# Tensors that are copied as they are come in pieces of this size: an embedding of any size costs no more memory.
PIECE_BYTES = 1 << 26
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
# Mistral and Llama repositories carry the same weights a second time in another layout.
_OTHER_LAYOUTS = ["consolidated*", "original/*"]


def locate(source: str, revision: str | None = None, with_weights: bool = True) -> tuple[Path, str | None]:
    """The folder of a checkpoint given as a folder or a Hub id, and the commit where it came from the Hub.

    A Hub id may carry its revision: `Qwen/Qwen3-0.6B@main`. Pickled weights are never fetched.

    Raises:
        ConversionError: when it is neither, or the Hub does not have it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, None
    if folder.exists():
        raise ConversionError(f"source={source} is a file; give the checkpoint's folder")
    repository, _, named_revision = source.partition("@")
    if source.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise ConversionError(
            f"source={source} does not exist; give a checkpoint folder or a Hub id such as Qwen/Qwen3-0.6B"
        )
    try:
        snapshot = huggingface_hub.snapshot_download(
            repository,
            revision=named_revision or revision,
            allow_patterns=_SMALL_FILES + ["*.safetensors"] * with_weights,
            ignore_patterns=_OTHER_LAYOUTS,
        )
    except _HUB_ERRORS as error:
        raise ConversionError(
            f"source={source} is no local folder and could not be fetched from the Hub: {_hub_reason(error)}"
        ) from error
    return Path(snapshot), Path(snapshot).name


_HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


def _hub_reason(error: BaseException) -> str:
    """The first line, in place of which the Hub client has a number for what is not there, a mistyped name mostly."""
    if isinstance(error, RepositoryNotFoundError):
        return "it has no such repository, or a private one (log in with `hf auth login`)"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """What a refusal of a config's field says; the lines before it say where."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, with a clear refusal of anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not valid JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return content


@dataclass(frozen=True)
class Header:
    """What a shard's header says of one tensor, and what the tensor is called in that shard."""

    file_name: str
    dtype: str
    shape: tuple[int, ...]
    name: str


class Source:
    """The tensors of a safetensors checkpoint by name, read when asked for; single file or sharded.

    Args:
        source: folder or Hub id, as the user gave it.
        revision: of a Hub id.
        headers_only: plan from configs and headers; of a Hub id only these are fetched.

    Raises:
        ConversionError: when the checkpoint is not there, not whole, or not in safetensors.
    """

    def __init__(self, source: str, revision: str | None = None, headers_only: bool = False) -> None:
        self.source = source
        self.folder, self.commit = locate(source, revision, with_weights=not headers_only)
        self._refuse_adapter()
        if self.commit and headers_only:
            self.headers = self._headers_on_hub(source.partition("@")[0])
        else:
            self.headers = self._headers_of_files()
        for old, new in OLD_NAMES.items():
            if old in self.headers:
                self.headers.setdefault(new, self.headers.pop(old))

    def _refuse_adapter(self) -> None:
        """A folder of adapters, which may hold a config.json but no weights of a whole model."""
        whole = (WEIGHTS_NAME, INDEX_NAME) if self.commit is None else ("config.json",)  # weights may not be fetched
        path = self.folder / ADAPTER_NAME
        if not path.is_file() or any((self.folder / name).is_file() for name in whole):
            return
        base = read_json(path).get("base_model_name_or_path") or "BASE"
        raise ConversionError(
            f"source={self.source} is a PEFT adapter of {base}, not a whole model; merge it first, "
            f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{base}'), '{self.source}')"
            ".merge_and_unload().save_pretrained('merged'), save the tokenizer there too, and give merged"
        )

    def _headers_on_hub(self, repository: str) -> dict[str, Header]:
        try:
            metadata = huggingface_hub.get_safetensors_metadata(repository, revision=self.commit)
        except Exception as error:  # the HTTP library has errors of its own
            raise ConversionError(
                f"source={self.source}: no safetensors headers could be read from the Hub: {_first_line(error)}"
            ) from error
        return {
            name: Header(file_name, str(info.dtype), tuple(info.shape), name)
            for file_name, file in metadata.files_metadata.items()
            for name, info in file.tensors.items()
        }

    def _headers_of_files(self) -> dict[str, Header]:
        index_path, single_path = self.folder / INDEX_NAME, self.folder / WEIGHTS_NAME
        if single_path.is_file():  # also beside an index, as Transformers reads it
            return self._headers_of_file(single_path)
        if not index_path.is_file():
            pickled = any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt*"))
            remedy = (
                "its weights are pickled, which is never loaded; save it with save_pretrained, which writes safetensors"
                if pickled
                else f"neither {WEIGHTS_NAME} nor {INDEX_NAME} is there"
            )
            raise ConversionError(f"source={self.folder} is no safetensors checkpoint: {remedy}")
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{index_path} holds no weight_map; fetch the checkpoint again")
        shards = {self._shard(file_name) for file_name in weight_map.values()}
        held = {path.name: self._headers_of_file(path) for path in sorted(shards)}
        for name, file_name in weight_map.items():
            if name not in held[file_name]:
                raise ConversionError(
                    f"{self.folder / file_name} lacks {name}, which {INDEX_NAME} places there; fetch it again"
                )
        return {name: held[file_name][name] for name, file_name in weight_map.items()}

    def _shard(self, file_name: object) -> Path:
        """The path of a shard named in the index: a plain file name, never a way out of the folder."""
        if (
            not isinstance(file_name, str)
            or Path(file_name).name != file_name
            or not file_name.endswith(".safetensors")
        ):
            raise ConversionError(
                f"{self.folder / INDEX_NAME} names the shard {file_name!r}, which is no safetensors file name"
            )
        path = self.folder / file_name
        if not path.is_file():
            raise ConversionError(f"shard {path} is missing; fetch the checkpoint again")
        return path

    def _headers_of_file(self, path: Path) -> dict[str, Header]:
        """Opening a shard checks its header against its size, so a truncated one is found before any work is done."""
        with self._open(path) as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {name: Header(path.name, s.get_dtype(), tuple(s.get_shape()), name) for name, s in slices.items()}

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"shard {path} is damaged or truncated ({error}); fetch it again") from error

    def config_fields(self) -> dict[str, Any]:
        """What config.json says.

        Raises:
            ConversionError: when it is missing or no JSON object.
        """
        path = self.folder / "config.json"
        if not path.is_file():
            raise ConversionError(f"source={self.folder} is no checkpoint: config.json is missing")
        return read_json(path)

    def config(self) -> Any:
        """The config of a checkpoint whose weights can be read.

        Raises:
            ConversionError: when the weights are quantised, or the config's class refuses the fields.
        """
        fields = self.config_fields()
        if fields.get("quantization_config"):
            raise ConversionError(
                f"source={self.folder} is quantised (quantization_config); give the unquantised checkpoint"
            )
        try:
            return AutoConfig.from_pretrained(self.folder)
        except (StrictDataclassError, ValueError, TypeError, ArithmeticError, LookupError) as error:
            raise ConversionError(
                f"{self.folder / 'config.json'} is no valid {fields.get('model_type')} config: {last_line(error)}"
            ) from error

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Every one of these tensors is there in that shape.

        Raises:
            ConversionError: naming the first that is not.
        """
        for name, shape in expected.items():
            header = self.headers.get(name)
            if header is None:
                raise ConversionError(
                    f"source={self.folder} lacks the tensor {name}; is it a complete causal language model?"
                )
            if header.shape != shape:
                raise ConversionError(
                    f"{name} has shape {list(header.shape)}, config.json promises {list(shape)}; they do not belong "
                    "together"
                )

    def check_tied(self, tied: Mapping[str, str]) -> None:
        """A tensor that is tied to another and yet in the file has the other's values; Transformers unties it if not.

        Raises:
            ConversionError: naming the first that has not, which the output would lose.
        """
        for name, partner in tied.items():
            if name in self.headers and not self._is_same(name, partner):
                raise ConversionError(
                    f"{name} of {self.source} is not {partner}, which tie_word_embeddings=True makes it; set "
                    f"tie_word_embeddings to false in {self.folder / 'config.json'} to keep both"
                )

    def _is_same(self, name: str, other: str) -> bool:
        one, two = self.headers[name], self.headers[other]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        return all(map(torch.equal, self.pieces(name), self.pieces(other)))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the checkpoint, read off its embedding."""
        name = next((name for name in sorted(self.headers) if "embed" in name), min(self.headers))
        return DTYPES[self.headers[name].dtype]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or its rows from start to stop. The file is mapped only as long as the tensor lives.

        Raises:
            ConversionError: when a value is NaN or infinite.
        """
        held = self.headers[name]
        with self._open(self.folder / held.file_name) as shard:
            tensor: Tensor = shard.get_tensor(held.name) if stop is None else shard.get_slice(held.name)[start:stop]
        if not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
            raise ConversionError(f"{name} of {self.source} holds NaN or infinity: it is damaged; fetch it again")
        return tensor

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor as it is, in blocks of rows of `PIECE_BYTES` at most; one without dimensions whole."""
        header = self.headers[name]
        if not header.shape:
            yield self.read(name)
            return
        num_rows = header.shape[0]
        row_bytes = math.prod(header.shape[1:]) * DTYPES[header.dtype].itemsize
        rows_at_once = max(1, PIECE_BYTES // max(1, row_bytes))
        for start in range(0, num_rows, rows_at_once):
            yield self.read(name, start, min(start + rows_at_once, num_rows))

    @property
    def weight_files(self) -> list[Path]:
        return sorted({self.folder / header.file_name for header in self.headers.values()})

    @property
    def nbytes(self) -> int:
        """Of the weight files on disk."""
        return sum(path.stat().st_size for path in self.weight_files)


class Digests(threading.Thread):
    """sha256 of every weight file of the sources, computed beside the writing: hashing holds no interpreter lock."""

    def __init__(self, sources: list[Source]) -> None:
        super().__init__(daemon=True)
        self.sources = sources
        self.found: list[dict[str, str]] = []
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            for source in self.sources:
                self.found.append({path.name: file_digest(path) for path in source.weight_files})
        except OSError as error:
            self.error = error

    def result(self) -> list[dict[str, str]]:
        """One {file name: sha256} per source, once all are known."""
        self.join()
        if self.error:
            raise self.error
        return self.found


def file_digest(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()
