"""Side-by-side timing: all candidates in one run, interleaved in a new order each round, medians and ratios."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call of each candidate, `rounds` of them, the order drawn anew in every round."""
    laps = interleaved_laps({name: [candidate] for name, candidate in candidates.items()}, rounds, warmup)
    return {name: [seconds for (seconds,) in values] for name, values in laps.items()}


def interleaved_laps(
    candidates: Mapping[str, Sequence[Callable[[], object]]], rounds: int, warmup: int = 2
) -> dict[str, list[list[float]]]:
    """As `interleaved`, for candidates of several parts that run one after the other: seconds of each part."""
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    seconds: dict[str, list[list[float]]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        shuffle(order)
        for name in order:
            laps = [_seconds(part) for part in candidates[name]]
            if turn >= warmup:
                seconds[name].append(laps)
    return seconds


def _seconds(call: Callable[[], object]) -> float:
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def summarize(seconds: Mapping[str, Sequence[float]], reference: str) -> dict[str, dict[str, float]]:
    """For each candidate the median of its seconds, and of its ratio to the reference in the same round."""
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, seconds[reference], strict=True)),
        }
        for name, values in seconds.items()
    }


def table(rows: Mapping[str, Mapping[str, float]], reference: str) -> str:
    lines = [f"| | ms | over {reference} |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {row['seconds'] * 1e3:.1f} | {row['ratio']:.2f} |" for name, row in rows.items()]
    return "\n".join(lines)


class TrainingStep:
    """Forward and backward from these inputs and this gradient of the output, all gradients made anew.

    function: a module, or anything else with the parameters that are given.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        inputs: Tensor,
        grad: Tensor,
        parameters: Sequence[nn.Parameter] | None = None,
    ) -> None:
        self.function = function
        self.inputs = inputs.clone().requires_grad_()
        self.grad = grad
        self.weights = parameters if parameters is not None else list(function.parameters())  # type: ignore[attr-defined]

    def __call__(self) -> None:
        for tensor in (self.inputs, *self.weights):
            tensor.grad = None
        self._forward().backward(self.grad)

    def _forward(self) -> Tensor:
        output = self.function(self.inputs)
        return output[0] if isinstance(output, tuple) else output

    def kept_bytes(self) -> int:
        """What autograd keeps of a forward pass for the backward pass, beside weights and the input itself."""
        return kept_bytes(self._forward, [self.inputs, *self.weights])


def kept_bytes(forward: Callable[[], Tensor], own: Sequence[Tensor]) -> int:
    """Of different memory that autograd keeps of a forward pass, that of one's own tensors left out."""
    pointers = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # held, so that nothing is freed and its place counted for something else
    del output
    return sum(size for pointer, size in kept.items() if pointer not in pointers)
