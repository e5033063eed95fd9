"""Safetensors shards, written one at a time; the thresholds come last, because they are known last."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .errors import ConversionError
from .plan import PlannedTensor
from .source import INDEX_NAME, WEIGHTS_NAME

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, in the powers of ten that Transformers uses."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise ConversionError(f"max_shard_size={text} is no size; write it as 500MB or 5GB")
    return int(match[1]) * _UNITS[match[2]]


def write_shards(folder: Path, tensors: list[PlannedTensor], itemsize: int, max_shard_size: int) -> Path:
    """Writes the tensors in their order and returns the last shard, the one that holds every threshold.

    Peak memory is one shard. A tensor larger than a shard gets one of its own.
    """
    shards = _shards(tensors, itemsize, max_shard_size)
    weight_map: dict[str, str] = {}
    total_size = 0
    with tqdm(total=len(tensors), desc="Writing tensors", unit="tensor") as progress:
        for number, shard in enumerate(shards, start=1):
            file_name = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            content: dict[str, Tensor] = {}
            for tensor in shard:
                content[tensor.name] = tensor.make()
                total_size += content[tensor.name].nbytes
                progress.update()
            save_file(content, folder / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(content, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder / file_name


def _shards(tensors: list[PlannedTensor], itemsize: int, max_shard_size: int) -> list[list[PlannedTensor]]:
    """Fills shards in order; all router buffers go together at the end."""
    late = [tensor for tensor in tensors if _is_router_buffer(tensor.name)]
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in [tensor for tensor in tensors if not _is_router_buffer(tensor.name)]:
        size = itemsize * torch.Size(tensor.shape).numel()
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) == 1:
        shards[0].extend(late)
    elif late:
        shards.append(late)
    return shards


def _is_router_buffer(name: str) -> bool:
    return ".mlp.gate.threshold" in name


def rewrite_tensors(shard: Path, tensors: dict[str, Tensor]) -> None:
    """Replaces tensors in a shard that is on disk already."""
    content = load_file(shard)
    save_file(
        content | {name: tensors[name] for name in content.keys() & tensors.keys()}, shard, metadata={"format": "pt"}
    )
