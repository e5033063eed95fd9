"""The kernels in Triton's interpreter, which has to be asked for before they are defined: a process of its own.

Prints what it has compared; fails with an assertion.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2])]
from modeling_ecmoe import EcMoeLlamaConfig, EcMoeLlamaForCausalLM, kernels_ecmoe, sparse_blocks  # noqa: E402

ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu_pytorch_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Against float64, by the largest number that is expected."""
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < TOLERANCE[dtype], (error, dtype)


def pairs_of(kind: str, tokens: int) -> Tensor:
    """The tokens of pairs: each of E experts takes C of them."""
    if kind == "nobody":
        return torch.zeros(1, dtype=torch.long)
    if kind == "all by one token":  # E pairs of one token, none of the others
        return torch.zeros(6, dtype=torch.long)
    return torch.stack([torch.randperm(tokens - 2)[:5] for _ in range(4)]).flatten()  # two tokens without a pair


def compare_sums() -> None:
    kinds = ("some", "nobody", "all by one token")
    for dtype, kind, width in itertools.product(TOLERANCE, kinds, (1, 1030)):
        token = pairs_of(kind, 9)
        tokens = torch.randn(9, width).to(dtype).requires_grad_()
        weight = torch.rand(len(token))
        weight[::3] = 0  # masked slots
        weight.requires_grad_()
        grad = torch.randn(9, width)
        pairs = kernels_ecmoe.list_pairs(token, 9)
        rows = kernels_ecmoe.dispatch(tokens, token, pairs)
        out = kernels_ecmoe.combine(rows * 2, weight, token, 9, pairs, dtype)
        out.backward(grad.to(dtype))
        exact = tokens.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        doubled = kernels_ecmoe.dispatch(exact[0], token, None) * 2
        expected = kernels_ecmoe.combine(doubled, exact[1], token, 9, None, dtype)
        expected.backward(grad.to(dtype).double())
        for one, other in ((out, expected), (tokens.grad, exact[0].grad), (weight.grad, exact[1].grad)):
            near(one.detach(), other.detach(), dtype)
        # The same bits again, and of pairs in the same order for each token.
        again = kernels_ecmoe.combine(rows.detach() * 2, weight.detach(), token, 9, pairs, dtype)
        assert torch.equal(again, out)


def compare_activations() -> None:
    for dtype, (name, function), width in itertools.product(TOLERANCE, ACTIVATIONS.items(), (3, 1030)):
        product, grad = (torch.randn(2, 3, size).to(dtype) for size in (2 * width, width))
        exact = product.double().requires_grad_()
        gate, up = exact.chunk(2, dim=-1)
        expected = function(gate) * up
        expected.backward(grad.double())
        hidden, grad_product = kernels_ecmoe.gated_backward(product, grad, name)
        near(hidden, expected.detach(), dtype)
        near(grad_product, exact.grad, dtype)
        assert torch.equal(hidden, kernels_ecmoe.gated(product, name))


def compare_models() -> None:
    """Whole models: losses and gradients with and without kernels, in training and by threshold."""
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ways = (
        {},
        {"shared_expert_intermediate_size": 16, "shared_expert_weighting": "complement"},
        {"min_experts_per_token": 1, "normalize_combine_weights": True, "hidden_act": "gelu_pytorch_tanh"},
        {"capacity_factor": 2, "routing_pool": "sequence"},
    )
    ids = torch.randint(0, 64, (2, 19))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    for way in ways:
        found = []
        for kernels in (False, True):
            torch.manual_seed(0)
            config = EcMoeLlamaConfig(vocab_size=64, num_experts=4, experts_kernels=kernels, **fields, **way)
            model = EcMoeLlamaForCausalLM(config).train()
            loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            loss.backward()
            with torch.no_grad():
                logits = model.eval()(ids, attention_mask=mask).logits
            found.append((loss.detach(), logits, {n: p.grad for n, p in model.named_parameters()}))
        plain, kernel = found
        torch.testing.assert_close(kernel[0], plain[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(kernel[1], plain[1], atol=1e-5, rtol=1e-5)
        for name, grad in plain[2].items():
            torch.testing.assert_close(kernel[2][name], grad, atol=1e-6, rtol=1e-4, msg=name)
        assert len(sparse_blocks(model)) == 2


if __name__ == "__main__":
    torch.manual_seed(0)
    assert kernels_ecmoe.kernels_run_on(torch.zeros(1))
    for compare in (compare_sums, compare_activations, compare_models):
        compare()
        print(compare.__name__)
