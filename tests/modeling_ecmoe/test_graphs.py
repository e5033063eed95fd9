"""A function as one CUDA graph: what is kept, what is copied, and on a GPU the same choice."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling_ecmoe import graphs_ecmoe
from modeling_ecmoe.bounded_ecmoe import choose_tokens_within_bounds


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs that call their function again, on the tensors that they were captured with."""
    made: list[Any] = []

    def capture(function: Any, tensors: Any, options: Any, stream: Any) -> Any:
        inputs = [None if tensor is None else tensor.clone() for tensor in tensors]
        outputs = function(*inputs, *options)

        def again() -> None:
            for own, new in zip(outputs, function(*inputs, *options), strict=True):
                own.copy_(new)

        made.append(function)
        return graphs_ecmoe.Captured(SimpleNamespace(replay=again), inputs, outputs)

    monkeypatch.setattr(graphs_ecmoe, "capture", capture)
    monkeypatch.setattr(graphs_ecmoe, "_captured", {})
    return made


def scores_of(tokens: int, seed: int) -> Tensor:
    return torch.rand(1, tokens, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masked", [False, True])
def test_each_call_has_its_own_result(captures: list[Any], masked: bool) -> None:
    """The graph writes over its outputs, and every layer's choice is needed until backward."""
    mask = torch.arange(30)[None] < 23 if masked else None
    inputs = [scores_of(30, seed).requires_grad_() for seed in range(3)]
    found = [choose_tokens_within_bounds(scores, 1.5, 1, 3, mask, in_graph=True) for scores in inputs]
    assert len(captures) == 1
    for scores, choice in zip(inputs, found, strict=True):
        expected = choose_tokens_within_bounds(scores, 1.5, 1, 3, mask)
        assert all(torch.equal(one, two) for one, two in zip(choice, expected, strict=True))
        assert choice.scores.requires_grad


def test_other_shapes_and_bounds_are_other_graphs_and_not_without_end(
    captures: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_ecmoe, "MOST", 3)
    for tokens, least in ((30, 1), (31, 1), (30, 0), (32, 1), (33, 1), (30, 1)):
        scores = scores_of(tokens, tokens)
        found = choose_tokens_within_bounds(scores, 1.5, least, 3, in_graph=True)
        expected = choose_tokens_within_bounds(scores, 1.5, least, 3)
        assert torch.equal(found.token_index, expected.token_index)
    assert len(captures) == 3


def test_threads_get_their_own_choice(captures: list[Any]) -> None:
    """The inputs and outputs of a graph are everybody's: one at a time."""
    inputs = [scores_of(40, seed) for seed in range(120)]
    expected = [choose_tokens_within_bounds(scores, 1.5, 1, 3).token_index for scores in inputs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # without the lock some of these are another thread's
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda scores: choose_tokens_within_bounds(scores, 1.5, 1, 3, in_graph=True), inputs))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(one.token_index, two) for one, two in zip(found, expected, strict=True))


def test_within_somebody_s_capture_it_is_no_graph(captures: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_ecmoe, "is_capturing", lambda: True)
    choose_tokens_within_bounds(scores_of(30, 0), 1.5, 1, 3, in_graph=True)
    assert not captures


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [4096, 777])
def test_the_same_choice_on_a_gpu(tokens: int) -> None:
    """Captured in inference mode, used in training; on the last device there is."""
    place = torch.device("cuda", torch.cuda.device_count() - 1)
    mask = torch.arange(tokens, device=place)[None] < tokens - 100
    for seed in range(4):
        scores = torch.rand(1, tokens, 16, device=place, generator=torch.Generator(place).manual_seed(seed))
        for each in (None, mask):
            with torch.inference_mode(seed == 0):
                found = choose_tokens_within_bounds(scores, 2, 1, None, each, in_graph=True)
            expected = choose_tokens_within_bounds(scores, 2, 1, None, each)
            assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
