"""The thresholds in the files of a checkpoint: found, and replaced so that a kill leaves the old files or the new ones.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length, little endian, the header
in JSON with each tensor's dtype, shape and place, and the tensors' bytes.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ecmoe.progress import gigabytes

from .errors import AnalysisError

RECORD_NAME = "ecmoe_calibration.json"
_UNFINISHED = ".unfinished"
_INDEX_NAME = "model.safetensors.index.json"
_WEIGHTS_NAME = "model.safetensors"
_THRESHOLDS = (".mlp.gate.threshold", ".mlp.gate.threshold_updates")
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}


@dataclass(frozen=True)
class Calibrated:
    """thresholds: the new tensors, by the ends of their names. entry: what the record says of them.
    replaced, replaced_from: the old tensors, and what the config said of them."""

    thresholds: dict[str, Tensor]
    entry: dict[str, Any]
    replaced: dict[str, Tensor]
    replaced_from: str | None


class Shards:
    """The safetensors files of a folder that hold thresholds.

    Raises:
        AnalysisError: when there are none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / "adapter_config.json").is_file():
            raise AnalysisError(f"checkpoint={folder} is an adapter; merge it into its model, and calibrate that")
        self.headers = {path: _header(path) for path in _weight_files(folder)}
        self.places = {
            ".".join(name.split(".")[-5:]): (path, name)  # from "layers" or "h" on
            for path, (_, header) in self.headers.items()
            for name in header
            if name.endswith(_THRESHOLDS)
        }
        if not self.places:
            raise AnalysisError(
                f"checkpoint={folder} holds no thresholds in safetensors files: it is no expert-choice checkpoint, or "
                "one in another format; save it with save_pretrained"
            )

    def write(self, calibrated: Calibrated) -> None:
        """Puts thresholds into the files, the old ones and the entry into the record, the text into config and card.

        Everything is written beside its place first, and put there by renaming at the end, so that there is never a
        file half written.

        Raises:
            AnalysisError: when the disk has no room, or the files are not those of the model.
        """
        contents = self._contents(calibrated.thresholds)
        needed = sum(path.stat().st_size for path in contents)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise AnalysisError(
                f"checkpoint={self.folder}: {gigabytes(needed)} are written beside the old files before these go, "
                f"and {gigabytes(free)} are free; free some"
            )
        try:
            written = [_write(self.folder / RECORD_NAME, _record(self.folder, calibrated))]
            written += [_copy_with(path, pieces) for path, pieces in contents.items()]
            written.append(_write(self.folder / "config.json", _config(self.folder, calibrated.entry)))
            if (self.folder / "README.md").is_file():
                written.append(_write(self.folder / "README.md", _card(self.folder, calibrated.entry)))
            for path in written:
                os.replace(path, path.with_name(path.name.removesuffix(_UNFINISHED)))
        except OSError as error:
            raise AnalysisError(f"checkpoint={self.folder} cannot be written: {error}") from error

    def _contents(self, thresholds: dict[str, Tensor]) -> dict[Path, dict[int, bytes]]:
        """For each file what is written where in it."""
        if thresholds.keys() != self.places.keys():
            raise AnalysisError(
                f"checkpoint={self.folder}: its files hold the thresholds of other layers than its config.json names; "
                "they do not belong together"
            )
        contents: dict[Path, dict[int, bytes]] = {}
        for end, tensor in thresholds.items():
            path, name = self.places[end]
            start, header = self.headers[path]
            found = header[name]
            if found["dtype"] != _DTYPES[tensor.dtype] or found["shape"] != list(tensor.shape):
                raise AnalysisError(
                    f"checkpoint={self.folder}: {name} in {path.name} is {found['dtype']} {found['shape']} and must be "
                    f"{_DTYPES[tensor.dtype]} {list(tensor.shape)}; load the model and save it with save_pretrained"
                )
            contents.setdefault(path, {})[start + found["data_offsets"][0]] = tensor.numpy().tobytes()
        return contents


@contextlib.contextmanager
def threshold_shards(folder: Path) -> Iterator[Shards]:
    """The shards of a folder, for one process at a time; what a killed one left is swept away, before and after.

    Raises:
        AnalysisError: when there are none, or another process is at work.
    """
    place = folder / ".ecmoe_calibration.lock"
    try:
        with FileLock(place, timeout=0):
            try:
                _sweep(folder)
                yield Shards(folder)
            finally:
                _sweep(folder)
                place.unlink(missing_ok=True)
    except Timeout as error:
        raise AnalysisError(f"checkpoint={folder} is being calibrated by another process; wait for it") from error
    except PermissionError as error:
        raise AnalysisError(f"checkpoint={folder} cannot be written: {error}") from error


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


def _weight_files(folder: Path) -> list[Path]:
    """The files that Transformers loads: the single one, also beside an index, or those of the index; no others that
    lie there."""
    if (folder / _WEIGHTS_NAME).is_file():
        return [folder / _WEIGHTS_NAME]
    index = folder / _INDEX_NAME
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise AnalysisError(f"{index} is damaged ({error}); fetch the checkpoint again") from error
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise AnalysisError(f"checkpoint={folder} lacks {missing[0]}; fetch it again")
    return sorted(folder / name for name in names)


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin in a file, and its header."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            return 8 + length, json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise AnalysisError(f"{path} is damaged ({error}); fetch the checkpoint again") from error


def _copy_with(path: Path, pieces: dict[int, bytes]) -> Path:
    """A copy of a file beside it with some of its bytes replaced; header and metadata stay as they are."""
    copy = path.with_name(path.name + _UNFINISHED)
    shutil.copyfile(path, copy)
    shutil.copymode(path, copy)
    with copy.open("r+b") as file:
        for start, content in pieces.items():
            file.seek(start)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return copy


def _write(path: Path, content: str) -> Path:
    unfinished = path.with_name(path.name + _UNFINISHED)
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return unfinished


def _record(folder: Path, calibrated: Calibrated) -> str:
    """All calibrations of the folder, the latest one last, each with the thresholds that it replaced."""
    path = folder / RECORD_NAME
    earlier = []
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))["calibrations"]
        except (ValueError, KeyError, TypeError) as error:
            raise AnalysisError(f"{path} is damaged ({error}); move it away, it is only a record") from error
    replaced = {"thresholds_from": calibrated.replaced_from}
    replaced |= {name: tensor.tolist() for name, tensor in calibrated.replaced.items()}
    entry = {**calibrated.entry, "text": Path(calibrated.entry["text"]).name, "replaced": replaced}
    del entry["checkpoint"]  # the folder's name, which may change
    return json.dumps({"calibrations": [*earlier, entry]}, indent=2) + "\n"


def _config(folder: Path, entry: dict[str, Any]) -> str:
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    decoder = fields.get("text_config", fields)  # of a composite
    decoder["thresholds_from"] = entry["thresholds_from"]
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _card(folder: Path, entry: dict[str, Any]) -> str:
    """The card with the line that says where the thresholds come from, in the place of an older one or at the end."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    line = (
        f"Thresholds from: {entry['thresholds_from']}, calibrated anew on {entry['date'][:10]}. Loads of before and "
        f"after are in `{RECORD_NAME}`; those above are older."
    )
    changed, count = re.subn(r"^Thresholds from: .*$", lambda _: line, card, flags=re.MULTILINE)
    return changed if count else f"{card.rstrip()}\n\n{line}\n"
