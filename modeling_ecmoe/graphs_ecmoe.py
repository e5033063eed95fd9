"""Functions of hundreds of small operations as one CUDA graph: launched once, with the bits they have by themselves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST = 16  # graphs that are kept, each with the memory of its function; inputs of more shapes are computed as they come


class Captured(NamedTuple):
    """A graph with the tensors that it reads and writes."""

    graph: Any
    inputs: list[Tensor | None]
    outputs: tuple[Tensor, ...]


_captured: dict[Any, Captured] = {}


def replay(function: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor | None, ...], *options: Any) -> Any:
    """function(*tensors, *options), in a graph that is captured for inputs of these shapes when they come first.

    function: static shapes, nothing read back, no gradient, no random numbers.
    """
    key = function, options, *(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors)
    if key not in _captured:
        if len(_captured) >= MOST:
            return function(*tensors, *options)
        _captured[key] = capture(function, tensors, options)
    captured = _captured[key]
    for own, given in zip(captured.inputs, tensors, strict=True):
        if own is not None and given is not None:
            own.copy_(given)
    captured.graph.replay()
    return tuple(output.clone() for output in captured.outputs)  # the next replay writes over them


def capture(
    function: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> Captured:
    """Warms up beside the current stream, as libraries want before a capture, and records one call."""
    inputs = [None if tensor is None else tensor.detach().clone() for tensor in tensors]
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(beside):
            for _ in range(2):
                function(*inputs, *options)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function(*inputs, *options)
    return Captured(graph, inputs, outputs)
