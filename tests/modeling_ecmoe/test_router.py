"""The router's product: float32 scores of 16-bit inputs and weights, and no more kept for backward than these."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modeling_ecmoe.router_ecmoe import EcMoeRouter
from modeling_ecmoe.routing_ecmoe import choose_tokens


@pytest.fixture
def router(make_config: Any) -> EcMoeRouter:
    torch.manual_seed(0)
    router = EcMoeRouter(make_config("Llama"))
    nn.init.normal_(router.weight)
    return router


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bits_of_a_float32_product(dtype: torch.dtype, router: EcMoeRouter) -> None:
    router.to(dtype)
    hidden = torch.randn(50, router.hidden_size).to(dtype).requires_grad_()
    grad = torch.randn(50, router.num_experts)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        logits, scores, _ = router(hidden)
    logits.backward(grad)
    plain, weight = hidden.detach().requires_grad_(), router.weight.detach().requires_grad_()
    expected = nn.functional.linear(plain.float(), weight.float())
    expected.backward(grad)
    assert logits.dtype == scores.dtype == torch.float32 and torch.equal(logits, expected)
    assert torch.equal(hidden.grad, plain.grad) and torch.equal(router.weight.grad, weight.grad)
    assert {x.dtype for x in kept if x.shape[-1] == router.hidden_size} == {dtype}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_route_changes_on_a_gpu(router: EcMoeRouter) -> None:
    """16-bit units add up in float32: the choice is that of a float32 product, of 16 thousand tokens."""
    router.to("cuda", torch.bfloat16)
    hidden = torch.randn(16_384, router.hidden_size, device="cuda").bfloat16()
    _, scores, _ = router(hidden)
    exact = nn.functional.linear(hidden.double(), router.weight.double()).softmax(-1)
    found, wanted = (choose_tokens(x[None].float(), 2).token_index.sort(-1).values for x in (scores, exact))
    assert (found != wanted).float().mean() < 1e-3  # ties of float32 itself
