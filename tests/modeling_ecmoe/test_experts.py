"""The experts on equal rows: gradients, what is kept for them, 16 bits, and the way other devices take."""

import itertools
from typing import Any

import pytest
import torch
from conftest import build_config
from torch import Tensor, nn

from benchmarks.harness import kept_bytes
from modeling_ecmoe import experts_ecmoe
from modeling_ecmoe.experts_ecmoe import EcMoeExperts

E, C, D, I = 3, 5, 4, 6  # noqa: E741  the field's letters


KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "gated": ("Llama", {}),
    "gated with biases": ("Llama", {"mlp_bias": True}),
    "ungated": ("Starcoder2", {"use_bias": False, "hidden_act": "silu"}),
    "ungated with biases": ("Starcoder2", {"hidden_act": "silu"}),
}


def make_experts(dtype: torch.dtype = torch.float64, kind: str = "gated") -> EcMoeExperts:
    family, fields = KINDS[kind]
    config = build_config(family, num_experts=E, hidden_size=D, moe_intermediate_size=I, **fields)
    experts = EcMoeExperts(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return experts


def run(experts: EcMoeExperts, rows: Tensor) -> Tensor:
    """The dispatched rows through the experts as the block enters them; the other arguments are not read."""
    nothing = torch.empty(0)
    return experts(rows, nothing, nothing, rows_per_expert=C)


def reference(experts: EcMoeExperts, rows: Tensor) -> Tensor:
    """One dense FFN per expert, by plain autograd."""
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    outputs = []
    for expert, own in enumerate(rows.view(E, C, D)):
        into, down, *biases = (stack[expert] for stack in experts.parameters())
        into_bias, down_bias = biases or (None, None)
        hidden = linear(own, into, into_bias)
        if experts.has_gate:
            gate, up = hidden.chunk(2, -1)
            hidden = silu(gate) * up
        else:
            hidden = silu(hidden)
        outputs.append(linear(hidden, down, down_bias))
    return torch.cat(outputs)


@pytest.fixture(params=["expert by expert", "two and one", "all at once"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of large and small experts on a CPU, and of every other device."""
    if request.param == "all at once":
        monkeypatch.setattr(experts_ecmoe, "_parts", lambda *_: [...])
    else:
        monkeypatch.setattr(
            experts_ecmoe, "_PART_BYTES", 1 if request.param == "expert by expert" else 2 * C * 2 * I * 8
        )
    return request.param


@pytest.mark.parametrize(("size", "expected"), [(1, [0, 1, 2]), (959, [0, 1, 2]), (960, [slice(0, 2), slice(2, 4)])])
def test_parts_fit_into_the_cache(size: int, expected: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_ecmoe, "_PART_BYTES", size)
    assert experts_ecmoe._parts(torch.empty(E, C, D, dtype=torch.float64), 2 * I) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
def test_gradients_of_what_is_not_frozen(way: str, kind: str, wanted: tuple[bool, bool, bool]) -> None:
    experts = make_experts(kind=kind)
    rows = torch.randn(E * C, D, dtype=torch.float64)
    into, down, *biases = experts.parameters()
    tensors = (rows, into, down, *biases)
    for tensor, is_wanted in zip(tensors, (*wanted, *wanted[1:]), strict=False):
        tensor.requires_grad_(is_wanted)
    output = run(experts, rows)
    torch.testing.assert_close(output, reference(experts, rows))
    assert output.requires_grad == any(wanted)
    if any(wanted):
        grad = torch.randn_like(output)
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        expected = torch.autograd.grad(reference(experts, rows), leaves, grad)
        for found, other in zip(torch.autograd.grad(output, leaves, grad), expected, strict=True):
            torch.testing.assert_close(found, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_alone_learns(way: str, kind: str) -> None:
    experts = make_experts(kind=kind)
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(name.endswith("_bias"))
    leaves = [parameter for parameter in experts.parameters() if parameter.requires_grad]
    rows = torch.randn(E * C, D, dtype=torch.float64)
    output = run(experts, rows)
    assert output.requires_grad == experts.has_bias
    if leaves:
        expected = torch.autograd.grad(reference(experts, rows).square().sum(), leaves)
        for found, other in zip(torch.autograd.grad(output.square().sum(), leaves), expected, strict=True):
            torch.testing.assert_close(found, other)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(way: str, kind: str) -> None:
    experts = make_experts(kind=kind)
    rows = torch.randn(E * C, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows, *_: run(experts, rows), (rows, *experts.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_rows(kind: str) -> None:
    """The other way through the same experts, one expert after the other and by Transformers' back-ends."""
    experts = make_experts(torch.float32, kind)
    rows = torch.randn(E * C, D)
    index = torch.arange(E).repeat_interleave(C)[:, None]
    expected = reference(experts, rows)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        experts.config._experts_implementation = implementation
        found = experts(rows, index, torch.ones_like(rows[:, :1]))
        torch.testing.assert_close(found, expected, msg=implementation)


def test_keeps_the_first_product_alone(way: str) -> None:
    """Rows and [C, 2I] for each expert; plain autograd keeps the activation and its product with `up` beside them."""
    experts = make_experts()
    rows = torch.randn(E * C, D, dtype=torch.float64, requires_grad=True)
    weights = list(experts.parameters())
    assert kept_bytes(lambda: run(experts, rows), weights) == E * C * (D + 2 * I) * 8
    assert kept_bytes(lambda: reference(experts, rows), weights) > E * C * (D + 2 * I) * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(way: str, dtype: torch.dtype) -> None:
    """As near to float32 on the same rounded numbers as 16 bits can tell, gradients included."""
    experts, exact = make_experts(dtype), make_experts(dtype).float()
    rows = torch.randn(E * C, D).to(dtype).requires_grad_()
    exact_rows = rows.detach().float().requires_grad_()
    run(experts, rows).sum().backward()
    reference(exact, exact_rows).sum().backward()
    pairs = [(rows.grad, exact_rows.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(experts.parameters(), exact.parameters(), strict=True)]
    for found, expected in pairs:
        assert found is not None and expected is not None
        assert found.dtype == dtype
        assert (found.float() - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_autocast(way: str) -> None:
    """Products in bfloat16, weights and their gradients in float32."""
    experts = make_experts(torch.float32)
    rows = torch.randn(E * C, D, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(experts, rows)
        output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert all(
        parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in experts.parameters()
    )
    expected = reference(experts, rows)
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_second_derivative_is_refused(way: str) -> None:
    experts = make_experts()
    rows = torch.randn(E * C, D, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(run(experts, rows).square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_an_activation_with_weights_learns() -> None:
    experts = make_experts()
    experts.act_fn = torch.nn.PReLU().double()
    rows = torch.randn(E * C, D, dtype=torch.float64)
    run(experts, rows).square().sum().backward()
    assert experts.act_fn.weight.grad is not None and experts.act_fn.weight.grad.abs().sum() > 0


def test_frozen_weights_keep_no_rows() -> None:
    experts = make_experts().requires_grad_(False)
    rows = torch.randn(E * C, D, dtype=torch.float64, requires_grad=True)
    first = rows * 1  # what the block gathers is no leaf
    weights = list(experts.parameters())
    assert kept_bytes(lambda: run(experts, first), weights) == E * C * 2 * I * 8


@torch.no_grad()
def test_weights_that_are_views_off_a_border(make_model: Any, make_tokens: Any) -> None:
    """As DeepSpeed's, into one flat buffer: torch's grouped product takes no such weights."""
    model = make_model("Llama")
    model.set_experts_implementation("grouped_mm")
    experts = model.base_model.layers[0].mlp.experts
    expected = model(make_tokens(2, 9)).logits
    assert experts._suits_grouped_mm(experts.down_proj)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name)
        flat = torch.empty(weight.numel() + 1)[1:]
        flat.copy_(weight.flatten())
        setattr(experts, name, nn.Parameter(flat.view_as(weight)))
    assert not experts._suits_grouped_mm(experts.down_proj)
    torch.testing.assert_close(model(make_tokens(2, 9)).logits, expected, atol=1e-6, rtol=1e-6)
