"""A checkpoint's folder: whether it is whole, and its tensors, read one at a time."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

import modeling_ecmoe
from ecmoe.hub import why_no_tokenizer, why_not_from_hub, why_only_an_adapter

from ..errors import ConversionError
from ..models import load_model
from .locate import last_line, locate
from .places import read_json
from .source import Header, Source, named_as_in_memory

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
# What travels along with the weights: tokenizer, chat template, generation defaults, licence.
COMPANIONS = ["*token*.json", "*tekken*.json", "*vocab*", "merges.txt", "*.model", "*.model.*", "*.tiktoken", "*.jinja"]
COMPANIONS += ["additional_chat_templates/*"]
COMPANIONS += ["generation_config.json", "LICENSE*", "NOTICE*"]
# And of a model that reads images or sound: what makes tensors of them, and the older form of a chat template.
PROCESSOR = ["*processor_config.json", "chat_template.json"]


class Checkpoint(Source):
    """The tensors of a safetensors checkpoint, single file or sharded.

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
        self.place, self.config_place = str(self.folder), str(self.folder / "config.json")
        self._refuse_adapter()
        self.left_out, self.has_weights = {}, not (self.commit and headers_only)
        if self.commit and headers_only:
            self.headers = self._headers_on_hub(source.partition("@")[0])
        else:
            self.headers = self._headers_of_files()
        self.headers = named_as_in_memory(self.headers)

    def _refuse_adapter(self) -> None:
        """A folder of adapters, which may hold a config.json but no weights of a whole model."""
        if self.commit and (self.folder / "config.json").is_file():  # its weights may not be fetched yet
            return
        adapter = why_only_an_adapter(self.source, self.folder)
        if adapter:
            raise ConversionError(f"source={self.source} {adapter}")

    def _headers_on_hub(self, repository: str) -> dict[str, Header]:
        try:
            metadata = huggingface_hub.get_safetensors_metadata(repository, revision=self.commit)
        except Exception as error:  # the HTTP library has errors of its own
            raise ConversionError(
                f"source={self.source}: no safetensors headers could be read from the Hub: {why_not_from_hub(error)}"
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

    def config(self) -> PreTrainedConfig:
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
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.folder)
            return config
        except (StrictDataclassError, ValueError, TypeError, ArithmeticError, LookupError) as error:
            raise ConversionError(
                f"{self.folder / 'config.json'} is no valid {fields.get('model_type')} config: {last_line(error)}"
            ) from error

    def tokenizer(self) -> Any:
        """The tokenizer of the folder.

        Raises:
            ConversionError: when none loads.
        """
        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            missing = why_no_tokenizer(str(self.folder), self.folder)
            reason = missing or f"has no tokenizer that loads: {str(error).strip().splitlines()[0]}"
            raise ConversionError(f"source={self.folder} {reason}; calibration needs one") from error

    def _rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """The file is mapped only as long as the tensor lives."""
        held = self.headers[name]
        if held.parts:  # short convolutions, small
            return torch.cat([self._read(part, 0, None) for part in held.parts])[start:stop]
        return self._read(held, start, stop)

    def _read(self, held: Header, start: int, stop: int | None) -> Tensor:
        with self._open(self.folder / held.file_name) as shard:
            tensor: Tensor = shard.get_tensor(held.name) if stop is None else shard.get_slice(held.name)[start:stop]
        return tensor

    @contextlib.contextmanager
    def running(self, dtype: torch.dtype, device: str | None) -> Iterator[Any]:
        auto_class = getattr(transformers, modeling_ecmoe.auto_class_of(self.config()))
        yield load_model(auto_class, self.folder, dtype, device, None)

    def copy_companions(self, folder: Path) -> None:
        """Byte for byte; where parts of the model are left out, without what makes tensors for them."""
        for pattern in COMPANIONS + PROCESSOR * (not self.left_out):
            for path in filter(Path.is_file, self.folder.glob(pattern)):
                copy = folder / path.relative_to(self.folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)

    def fingerprint(self) -> dict[str, Any]:
        files = {str(path): path.stat() for path in self.folder.glob("*") if path.is_file()}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}

    @property
    def weight_files(self) -> list[Path]:  # type: ignore[override]
        return sorted(
            {self.folder / held.file_name for header in self.headers.values() for held in header.parts or (header,)}
        )

    @property
    def bytes_to_load(self) -> int:
        """From the headers: of a Hub id that is only looked at there are no files."""
        return sum(held.nbytes for held in (*self.headers.values(), *self.left_out.values()))
