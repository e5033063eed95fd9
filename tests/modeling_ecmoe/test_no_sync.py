"""A training forward and backward pass of a block never makes the host wait for a value of the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from blocks import build_block, random_hidden
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_ecmoe import use_inference_routing
from modeling_ecmoe.block_ecmoe import EcMoeBlock
from modeling_ecmoe.router_ecmoe import _update_thresholds

aten = torch.ops.aten
READS = {  # their results, or the sizes of their results, are values of the device
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.item,
    aten.equal,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.argwhere,
    aten.masked_select,
    aten.bincount,
    aten.unique_consecutive,
    aten.unique_dim,
    aten._unique,
    aten._unique2,
}
BY_MASK = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class HostWaitsError(RuntimeError):
    pass


class ForbidReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        packet = func.overloadpacket
        by_mask = packet in BY_MASK and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = func is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None
        if packet in READS or by_mask or repeats:
            raise HostWaitsError(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def host_never_waits() -> Iterator[None]:
    """Raises when a tensor is read back; `tolist` and `numpy` go round the dispatcher on the CPU."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise HostWaitsError("the tensor was read back")

    with pytest.MonkeyPatch.context() as patch, ForbidReads():
        for name in ("item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(Tensor, name, refuse)
        patch.setattr(torch, "nonzero", refuse)
        yield


def training_pass(block: EcMoeBlock, hidden: Tensor) -> None:
    block(hidden).square().sum().backward()


CASES = {
    "batch": {},
    "sequence": {"routing_pool": "sequence"},
    "sigmoid, normalised": {"router_score_function": "sigmoid", "normalize_combine_weights": True},
    "complement": {
        "shared_expert_intermediate_size": 6,
        "shared_expert_weighting": "complement",
        "normalize_combine_weights": True,
    },
    "jitter": {"router_jitter_noise": 0.1},
    "bounded": {"min_experts_per_token": 1, "max_experts_per_token": 2},
    "bounded by sequence": {"min_experts_per_token": 1, "routing_pool": "sequence"},
    "threshold": {"routing": "threshold"},
}


def half_padded(hidden: Tensor) -> Tensor:
    mask_BS = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    mask_BS[0, :3] = False
    return mask_BS


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_training_reads_nothing_back(case: str, padded: bool) -> None:
    block, hidden = build_block(**CASES[case]).train(), random_hidden()
    block.token_mask = half_padded(hidden) if padded else None
    with host_never_waits():
        training_pass(block, hidden)
        _update_thresholds()
    assert all(parameter.grad is not None for parameter in block.parameters())
    assert block.gate.threshold_updates == 1


def test_the_guard_sees_the_rows_of_threshold_routing() -> None:
    """Negative control: how many rows there are is read back where routes are ragged."""
    block, hidden = build_block().train(), random_hidden()
    with use_inference_routing(block), host_never_waits(), pytest.raises(HostWaitsError):
        block(hidden)
    with use_inference_routing(block):
        block(hidden)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.sum() > 0),
        lambda x: int(x.sum()),
        lambda x: float(x.sum()),
        lambda x: x.nonzero(),
        lambda x: torch.nonzero(x),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.index_put((x > 0,), x.new_zeros(())),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.long)),
        lambda x: list(range(x.long().sum())),
    ],
)
def test_the_guard_sees_every_way_to_read(read: Callable[[Tensor], Any]) -> None:
    """Negative control."""
    value = torch.tensor([1.0, 0.0, 2.0, 0.0])
    read(value)
    with host_never_waits(), pytest.raises(HostWaitsError):
        read(value)


@pytest.mark.parametrize("fields", [{}, {"normalize_combine_weights": True, "min_experts_per_token": 1}])
@torch.no_grad()
def test_decoding_reads_nothing_back(fields: dict[str, Any], make_routed_model: Callable) -> None:
    """A step of decoding gives every token and expert a place, in a back-end that leaves the others out."""
    model = make_routed_model("Llama", **fields)
    model.set_experts_implementation("grouped_mm")
    block = model.base_model.layers[0].mlp
    if not hasattr(block.experts, "_is_expert_parallel"):
        pytest.skip("the grouped product of this Transformers leaves no rows out")
    hidden = torch.randn(3, 1, block.gate.hidden_size)
    for change in (0.0, 9.0):  # as calibrated, and where no token exceeds a threshold
        block.gate.threshold += change
        expected = block(hidden)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("modeling_ecmoe.serving_ecmoe._WAITING", {"cpu"})
            assert block._choose(*block.gate(hidden[:, 0])[1:], (3, 1), False).is_meeting is not None
            with host_never_waits():
                found = block(hidden)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_places_without_a_pair_have_no_gradient(make_routed_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A back-end leaves the gradients of rows that it leaves out as memory was: in eval mode they are not taken."""
    model = make_routed_model("Llama")
    model.set_experts_implementation("grouped_mm")
    ids = torch.randint(3, model.vocab_size, (2, 9))
    grads = []
    for waiting in ((), ("cpu",)):
        monkeypatch.setattr("modeling_ecmoe.serving_ecmoe._WAITING", set(waiting))
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, plain, atol=1e-7, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_training_on_a_gpu_never_waits(case: str, padded: bool) -> None:
    torch.use_deterministic_algorithms(False)  # whose checks may wait themselves
    block, hidden = build_block(**CASES[case]).cuda().train(), random_hidden().detach().cuda().requires_grad_()
    block.token_mask = half_padded(hidden) if padded else None
    training_pass(block, hidden)  # libraries and workspaces are set up in the first pass
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_pass(block, hidden)
        _update_thresholds()
        with pytest.raises(RuntimeError, match="synchroniz"):
            hidden.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
