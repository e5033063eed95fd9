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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype, make_model: Any, make_tokens: Any) -> None:
    """Losses near those of plain torch, and the same bits of every gradient when a step is repeated."""
    ids = make_tokens(4, 64).cuda()
    losses, grads = [], []
    for kernels in (False, True, True):
        model = make_model("Llama", experts_kernels=kernels).cuda().to(dtype).train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)
    assert all(torch.equal(one, two) for one, two in zip(grads[1], grads[2], strict=True))
