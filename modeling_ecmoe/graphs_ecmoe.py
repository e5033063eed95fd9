"""Functions of hundreds of small operations as one CUDA graph: launched once, with the bits they have by themselves."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST = 8  # graphs that are kept; inputs of more shapes are computed as they come


class Captured(NamedTuple):
    """A graph with the tensors that it reads and writes."""

    graph: Any
    inputs: list[Tensor | None]
    outputs: tuple[Tensor, ...]


_captured: dict[Any, Captured] = {}
_pools: dict[Any, Any] = {}  # the memory of all graphs of a stream, whose outputs are copied before another runs
_lock = threading.Lock()  # the tensors of a graph are everybody's


def replay(function: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor | None, ...], *options: Any) -> Any:
    """function(*tensors, *options), in a graph that is captured for inputs of these shapes when they come first.

    function: static shapes, nothing read back, no gradient, no random numbers.
    tensors: the first one says on which device.
    """
    if is_capturing():  # of somebody's own graph, which takes the operations as they are
        return function(*tensors, *options)
    first = tensors[0]
    assert first is not None
    with _lock, torch.cuda.device_of(first):
        stream = current_stream(first)
        key = stream, function, options, *(None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors)
        if key not in _captured:
            if len(_captured) >= MOST:
                return function(*tensors, *options)
            _captured[key] = capture(function, tensors, options, stream)
        captured = _captured[key]
        for own, given in zip(captured.inputs, tensors, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        captured.graph.replay()
        return tuple(output.clone() for output in captured.outputs)  # the next replay writes over them


def is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def current_stream(tensor: Tensor) -> Any:
    """Of the tensor's device, its address in CUDA; the device alone elsewhere."""
    return (tensor.device, torch.cuda.current_stream().cuda_stream if tensor.is_cuda else None)


def capture(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    stream: Any,
) -> Captured:
    """Warms up beside the current stream, as libraries want before a capture, and records one call."""
    with torch.inference_mode(False), torch.no_grad():  # training copies into the inputs, whoever was here first
        inputs = [None if t is None else torch.empty_like(t).copy_(t) for t in tensors]
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):
                function(*inputs, *options)
        torch.cuda.current_stream().wait_stream(beside)
        if stream not in _pools:
            _pools[stream] = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Its own stream: torch's for captures belongs to the device that captured first.
        with torch.cuda.graph(graph, pool=_pools[stream], stream=beside, capture_error_mode="thread_local"):
            outputs = function(*inputs, *options)
    return Captured(graph, inputs, outputs)
