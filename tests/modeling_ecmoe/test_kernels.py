"""The kernels between the products: in Triton's interpreter against float64, compiled for GPUs, left out elsewhere."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_ecmoe import kernels_ecmoe
from modeling_ecmoe.kernels_ecmoe import kernels_run_on

HERE = Path(__file__).parent
POINTERS = {
    "_sum_up_kernel": {"rows": "{t}", "weights": "*fp32", "order": "*i64", "first": "*i64", "output": "{t}"},
    "_combine_backward_kernel": {
        "grads": "{t}", "rows": "{t}", "weights": "*fp32", "tokens": "*i64", "grad_rows": "{t}",
        "grad_weights": "*fp32",
    },
    "_gated_kernel": {"product": "{t}", "hidden": "{t}"},
    "_gated_backward_kernel": {"product": "{t}", "grads": "{t}", "hidden": "{t}", "grad_product": "{t}"},
}  # fmt: skip
CONSTANTS: dict[str, list[dict[str, Any]]] = {
    "_sum_up_kernel": [{"is_weighted": weighted, "block": 1024} for weighted in (True, False)],
    "_combine_backward_kernel": [{"block": 1024}],
    "_gated_kernel": [{"activation": number, "block": 1024} for number in range(4)],
    "_gated_backward_kernel": [{"activation": number, "block": 1024} for number in range(4)],
}


def test_against_float64_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    found = subprocess.run(
        [sys.executable, str(HERE / "kernels_process.py")], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.split() == ["compare_sums", "compare_activations", "compare_models"]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles(capability: int) -> None:
    """For Ampere, Hopper and Blackwell, on a machine without any of them."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name, pointers in POINTERS.items():
        for dtype in ("*bf16", "*fp32"):
            for constants in CONSTANTS[name]:
                signature = {key: kind.format(t=dtype) for key, kind in pointers.items()} | {"width": "i32"}
                signature |= dict.fromkeys(constants, "constexpr")
                source = ASTSource(getattr(kernels_ecmoe, name), signature, constexprs=constants)
                code = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                assert len(code.asm["cubin"]) > 1000 and "atom" not in code.asm["ptx"]


def test_left_out_where_there_is_no_device(make_model: Any, make_tokens: Any) -> None:
    """A config that asks for them computes what it did, bit for bit."""
    ids = make_tokens(2, 20)
    losses = []
    for kernels in (False, True):
        model = make_model("Llama", experts_kernels=kernels).train()
        losses.append(model(ids, labels=ids).loss)
    assert torch.equal(*losses) and not kernels_run_on(torch.zeros(1))
    assert not kernels_run_on(torch.zeros(1, dtype=torch.float64))


@pytest.fixture
def plain_order() -> None:
    """As users run it: deterministic algorithms would make plain torch repeatable too."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_a_gpu(dtype: torch.dtype, make_model: Any, make_tokens: Any, plain_order: None) -> None:
    """Losses and gradients near those of plain torch, and the same bits of every gradient when a step is repeated."""
    ids = make_tokens(4, 64).cuda()
    losses, grads = [], []
    for kernels in (False, True, True):
        model = make_model("Llama", experts_kernels=kernels).cuda().to(dtype).train()
        assert kernels_run_on(model.lm_head.weight)
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad for p in model.parameters()])
    near = {"atol": 1e-5, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 0.1}
    torch.testing.assert_close(losses[1], losses[0], **near)
    for plain, found in zip(grads[0], grads[1], strict=True):
        torch.testing.assert_close(found, plain, **near)
    assert all(torch.equal(one, two) for one, two in zip(grads[1], grads[2], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_large_sums_on_a_gpu(plain_order: None) -> None:
    """Several blocks of columns, thousands of rows: against float64."""
    tokens, width = 5000, 2050
    token = torch.stack([torch.randperm(tokens, device="cuda")[:2500] for _ in range(4)]).flatten()
    rows, weight = torch.randn(len(token), width, device="cuda"), torch.rand(len(token), device="cuda")
    pairs = kernels_ecmoe.list_pairs(token, tokens)
    found = kernels_ecmoe.combine(rows, weight, token, tokens, pairs, torch.float32)
    expected = kernels_ecmoe.combine(rows.double(), weight.double(), token, tokens, None, torch.float64)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    product, grad = torch.randn(3000, 2 * width, device="cuda"), torch.randn(3000, width, device="cuda")
    exact = product.double().requires_grad_()
    (torch.nn.functional.silu(exact[:, :width]) * exact[:, width:]).backward(grad.double())
    _, grad_product = kernels_ecmoe.gated_backward(product, grad, "silu")
    torch.testing.assert_close(grad_product.double(), exact.grad, atol=1e-5, rtol=1e-5)
