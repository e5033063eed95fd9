"""In inference only the chosen experts' weights are read."""

from typing import Any

import pytest
import torch
from blocks import build_block
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_ecmoe.block_ecmoe import EcMoeBlock

EXPERTS = 8
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


@pytest.fixture
def routed() -> tuple[EcMoeBlock, Tensor, set[int]]:
    """A float32 block, one token [1, 1, D], and the two experts whose thresholds it exceeds."""
    block = build_block(16, num_experts=EXPERTS, intermediate_size=8, capacity_factor=2).float().eval()
    block.gate.threshold_updates.fill_(1)
    hidden = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        scores = block.gate(hidden[0])[1][0]
    block.gate.threshold.fill_(scores.sort().values[-3:-1].mean())
    return block, hidden, set(scores.topk(2).indices.tolist())


def poison(block: EcMoeBlock, chosen: set[int]) -> None:
    """NaN in every other expert's weights: what reads them shows it."""
    for expert in set(range(EXPERTS)) - chosen:
        for weight in block.experts.parameters():
            weight.data[expert] = torch.nan


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_other_experts_do_not_enter_the_output(implementation: str, routed: tuple) -> None:
    block, hidden, chosen = routed
    block.config._experts_implementation = implementation
    with torch.no_grad():
        before = block(hidden)
        poison(block, chosen)
        assert torch.equal(block(hidden), before)
        poison(block, set())
        assert block(hidden).isnan().all()  # negative control


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_nor_where_shapes_are_static(implementation: str, routed: tuple) -> None:
    """Compiled, a token has as many slots as there are experts; the unused ones repeat its best expert."""
    block, hidden, chosen = routed
    block.config._experts_implementation = implementation
    with torch.no_grad():
        plain = block(hidden)
        poison(block, chosen)
        torch._dynamo.reset()
        found = torch.compile(block, fullgraph=True, backend="aot_eager")(hidden)
    torch._dynamo.reset()
    torch.testing.assert_close(found, plain)


class ReadExperts(TorchDispatchMode):
    """Which slices of a stacked weight enter an operation that computes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.experts = weight, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        own = self.weight.untyped_storage().data_ptr()
        if isinstance(output, Tensor) and output.untyped_storage().data_ptr() == own:
            return output  # a view, which reads nothing
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() == own:
                first = tensor.storage_offset() // self.weight.stride(0)
                self.experts |= set(range(first, first + tensor.numel() // self.weight.stride(0)))
        return output


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_eager_products_take_the_chosen_slices_alone(name: str, routed: tuple) -> None:
    block, hidden, chosen = routed
    block.config._experts_implementation = "eager"
    with torch.no_grad(), ReadExperts(getattr(block.experts, name)) as reads:
        block(hidden)
    assert reads.experts == chosen
    with torch.no_grad(), ReadExperts(getattr(block.experts, name)) as reads:
        getattr(block.experts, name).sum()
    assert reads.experts == set(range(EXPERTS))  # negative control
