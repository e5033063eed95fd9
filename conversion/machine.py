"""The machine at hand: the devices that models run on, what is free there, and how fast they multiply."""

import functools
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from ecmoe.progress import announce, duration

from . import texts
from .errors import ConversionError

_MOST = 1024  # rows and columns of the products that are timed: enough for full speed, and quick on a slow CPU
_SECONDS = 0.2
_WORTH_A_LINE = 10.0  # seconds; of less nothing is said before
# Rough: of the speed of its products alone a converted model of SmolLM2's widths reached 0.5 to 0.8 on two busy cores,
# the dense one about all of it.
_OF_PRODUCTS = 0.6
_BYTES_PER_SECOND = 5e8  # of shards that are made and written (benchmarks/results/conversion.json)
_WORTH_A_MEASUREMENT = 1e11  # FLOPs; less takes no time
# Logits of both models and the logarithms of their softmax, in float32, are held at once.
_LOGITS_AT_ONCE = 4


@dataclass(frozen=True)
class Machine:
    """device: that one model runs on, as torch calls it. name: for the reader. count: of such devices. free: bytes on
    each of them, of the CPU the memory that is available."""

    device: str
    name: str
    count: int
    free: int


def machine_at_hand(device: str | None) -> Machine:
    """Where models run with that option; None is the first accelerator, or the CPU, and "auto" all there is.

    Raises:
        ConversionError: for a device that is not there.
    """
    place = device
    if device in (None, "auto"):
        place = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.empty(1, device=place).device.type
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConversionError(
            f"device={device} cannot be used here ({reason}); leave it out, or name cpu, cuda or cuda:0"
        ) from error
    if kind == "cuda":
        count = torch.cuda.device_count()
        free = min(torch.cuda.mem_get_info(number)[0] for number in range(count))
        return Machine(str(place), torch.cuda.get_device_name(place), count, free)
    return Machine(str(place), "this CPU" if kind == "cpu" else str(place), 1, psutil.virtual_memory().available)


@functools.cache
def flops_per_second(device: str, dtype: torch.dtype, hidden: int, width: int) -> float:
    """Of matrix products about as large as those of a model, measured for a fraction of a second."""
    left = torch.ones(512, min(hidden, _MOST), device=device, dtype=dtype)
    right = torch.ones(min(hidden, _MOST), min(width, 2 * _MOST), device=device, dtype=dtype)
    repeats = 10 if left.is_cuda else 1

    def run() -> None:
        for _ in range(repeats):
            left @ right
        if left.is_cuda:
            torch.cuda.synchronize()

    run()  # the first product is slow
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        run()
        count += repeats
    return count * 2 * left.shape[0] * right.numel() / (time.perf_counter() - began)


def seconds_of(nbytes: int, flops: float, machine: Machine, dtype: torch.dtype, hidden: int, width: int) -> float:
    """About how long it takes to write so many bytes and to compute so much, with products of those sizes."""
    seconds = nbytes / _BYTES_PER_SECOND
    if flops > _WORTH_A_MEASUREMENT:
        seconds += flops / (_OF_PRODUCTS * flops_per_second(machine.device, dtype, hidden, width))
    return seconds


def logits_bytes(config: Any) -> int:
    """Memory of the logits by which two models of this config are held against each other."""
    window = min(texts.WINDOW, config.max_position_embeddings)
    return _LOGITS_AT_ONCE * texts.VERIFICATION_BATCH * window * config.vocab_size * 4


def announce_work(seconds: float, what: str) -> None:
    """A line before work of that length, unless it is short."""
    if seconds >= _WORTH_A_LINE:
        announce(f"ecmoe-convert: {what}: about {duration(seconds)}")
