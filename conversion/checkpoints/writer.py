"""Safetensors shards, written piece by piece: at no time is more than a piece of one tensor in memory.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length, little endian, the header
in JSON with each tensor's dtype, shape and place, and the tensors' bytes. The library writes a file from tensors that
are all in memory, and the stacked experts of one layer of a large model alone are many gigabytes.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from ecmoe.progress import progress_bar
from modeling_ecmoe.names_ecmoe import layer_number

from .folder import INDEX_NAME, WEIGHTS_NAME

_BORDER = 64  # bytes
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output, made piece by piece; the pieces in turn are its bytes.

    sources: the source tensors it is made of, with the shape that each must have.
    same_as: the source tensor that it is, unchanged; None where it is made.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]
    sources: dict[str, tuple[int, ...]] = field(default_factory=dict)
    same_as: str | None = None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def write_shards(folder: Path, tensors: list[PlannedTensor], num_layers: int, max_shard_size: int) -> None:
    """Writes the tensors in their order, and the index where there are several shards.

    A shard gets its name when it is complete; one that has its name already is left as it is.
    """
    shards = _shards(tensors, max_shard_size)
    total_size = sum(tensor.nbytes for tensor in tensors)
    weight_map: dict[str, str] = {}
    with progress_bar(total=total_size, desc="Writing", unit="B", unit_scale=True) as progress:
        for number, shard in enumerate(shards, start=1):
            file_name = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= {tensor.name: file_name for tensor in shard}
            if (folder / file_name).exists():
                progress.update(sum(tensor.nbytes for tensor in shard))
            else:
                _write_shard(folder / file_name, shard, num_layers, progress)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        write_whole(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _shards(tensors: list[PlannedTensor], max_shard_size: int) -> list[list[PlannedTensor]]:
    """Fills shards in order; a tensor larger than a shard gets one of its own."""
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _write_shard(path: Path, tensors: list[PlannedTensor], num_layers: int, progress: tqdm) -> None:
    # Widest dtypes first, as the library orders them: then every tensor lies on a border of its own width.
    # Of one width those whose size would move the next ones off such a border as products read best come last.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.nbytes % _BORDER != 0))
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.write(_header(ordered))
        for tensor in ordered:
            layer = layer_number(tensor.name)
            if layer is not None:
                progress.set_description(f"Layer {layer + 1} of {num_layers}", refresh=False)
            before = file.tell()
            for piece in tensor.pieces():
                file.write(_bytes(piece))
                progress.update(piece.nbytes)
            if file.tell() - before != tensor.nbytes:
                raise RuntimeError(f"{tensor.name} has {file.tell() - before} bytes, planned were {tensor.nbytes}")
    unfinished.rename(path)


def _header(tensors: list[PlannedTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    # A file is mapped into memory as it is, and grouped products take no weights but on borders of 16 bytes.
    narrowest = min(tensor.dtype.itemsize for tensor in tensors)
    before = 8 + sum(tensor.nbytes for tensor in tensors if tensor.dtype.itemsize > narrowest)
    header += b" " * (-(len(header) + before - before % 8) % _BORDER)  # a multiple of eight, whatever comes before
    return len(header).to_bytes(8, "little") + header


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a small file that is there complete or not at all.

    Shards are not forced to the disk, as `cp` does not either: it would double the time of a conversion, and a kill
    loses nothing that was written.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        _to_disk(file)
    unfinished.rename(path)


def overwrite_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Replaces the values of tensors in the shards of a folder, in place: their sizes are known, nothing moves."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for name in header.keys() & tensors.keys():
                first, last = header[name]["data_offsets"]
                content = _bytes(tensors[name])
                if last - first != len(content):
                    raise RuntimeError(f"{name} has {len(content)} bytes, its place in {path.name} {last - first}")
                file.seek(8 + length + first)
                file.write(content)
