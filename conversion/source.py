"""The dense checkpoint: where it is, whether it is whole, and its tensors, read one at a time."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ConversionError

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"


def locate(source: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint given as a folder or a Hub id (downloaded, without pickled weights).

    Raises:
        ConversionError: when it is neither, or the Hub does not have it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConversionError(f"source={source} is a file; give the checkpoint's folder")
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ConversionError(
            f"source={source} does not exist; give a checkpoint folder or a Hub id such as Qwen/Qwen3-0.6B"
        )
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*"]
    try:
        # Mistral and Llama repositories carry the same weights a second time in another layout.
        others = ["consolidated*", "original/*"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=others))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(
            f"source={source} is no local folder and could not be fetched from the Hub: {reason}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, with a clear refusal of anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not valid JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return content


class SourceWeights:
    """Tensors of a safetensors checkpoint by name, read when asked for; single file or sharded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = self._index()

    def _index(self) -> dict[str, Path]:
        index_path, single_path = self.folder / INDEX_NAME, self.folder / WEIGHTS_NAME
        if index_path.is_file():
            weight_map = read_json(index_path).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ConversionError(f"{index_path} holds no weight_map; fetch the checkpoint again")
            file_of = {name: self._shard(file_name) for name, file_name in weight_map.items()}
        elif single_path.is_file():
            file_of = {}
        else:
            pickled = any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt*"))
            remedy = (
                "its weights are pickled, which is never loaded; save it with save_pretrained, which writes safetensors"
                if pickled
                else f"neither {WEIGHTS_NAME} nor {INDEX_NAME} is there"
            )
            raise ConversionError(f"source={self.folder} is no safetensors checkpoint: {remedy}")
        # Opening a shard checks its header against its size, so a truncated one is found before any work is done.
        for path in sorted(set(file_of.values()) or {single_path}):
            with self._open(path) as shard:
                names = set(shard.keys())
            if not file_of:
                return dict.fromkeys(sorted(names), path)
            absent = sorted(name for name, at in file_of.items() if at == path and name not in names)
            if absent:
                raise ConversionError(f"{path} lacks {absent[0]}, which {INDEX_NAME} places there; fetch it again")
        return file_of

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

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"shard {path} is damaged or truncated ({error}); fetch it again") from error

    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(self._file_of[name]) as shard:
            return tuple(shard.get_slice(name).get_shape())

    def dtype(self) -> torch.dtype:
        """The dtype of the checkpoint, read off its embedding."""
        return self[next((name for name in sorted(self._file_of) if "embed" in name), min(self._file_of))].dtype

    def __getitem__(self, name: str) -> Tensor:
        with self._open(self._file_of[name]) as shard:
            tensor: Tensor = shard.get_tensor(name)
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConversionError(
                f"{name} has dtype {tensor.dtype}; only float32, bfloat16 and float16 can be converted"
            )
        return tensor
