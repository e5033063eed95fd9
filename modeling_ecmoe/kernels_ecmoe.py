"""What lies between the products of an expert-choice FFN, as Triton kernels: dispatch, activation, combine.

Each is one pass over memory, sums in float32, and adds nothing atomically: the same inputs give the same bits. Beside
each stands what it computes in plain torch, its oracle and what runs without Triton. No route is made here.

Shapes: T tokens, R (token, expert) pairs, D hidden size, I expert width, N rows.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=None)

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu_fast": 1, "gelu": 2, "relu": 3}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1024  # columns at a time


def kernels_run_on(tensor: Tensor) -> bool:
    """Whether there is Triton, and a device and dtype for it. A compiler fuses by itself."""
    return (
        triton is not None
        and (tensor.is_cuda or triton.knobs.runtime.interpret)
        and tensor.dtype in _DTYPES
        and not torch.compiler.is_compiling()
    )


class PairList(NamedTuple):
    """The pairs in the order of their tokens: those of token t are order[first[t] : first[t + 1]].

    order: [R] long, by token and then as they came. first: [T + 1] long. Static shapes; no size is read back.
    """

    order: Tensor
    first: Tensor


def list_pairs(token_R: Tensor, num_tokens: int) -> PairList:
    """Sorts the pairs by their token, those of one token left in their order."""
    sorted_R, order_R = token_R.sort(stable=True)
    first = torch.searchsorted(sorted_R, torch.arange(num_tokens + 1, device=token_R.device))
    return PairList(order_R, first)


def dispatch(tokens_TD: Tensor, token_R: Tensor, pairs: PairList | None) -> Tensor:
    """The row of each pair's token, [R, D].

    pairs: for the kernel, whose gradient is summed up token by token in float32; None is plain torch.
    """
    if pairs is None:
        return tokens_TD.index_select(0, token_R)
    rows_RD: Tensor = _Dispatch.apply(tokens_TD, token_R, *pairs)
    return rows_RD


def combine(
    rows_RD: Tensor, weight_R: Tensor, token_R: Tensor, num_tokens: int, pairs: PairList | None, dtype: torch.dtype
) -> Tensor:
    """out[t] = sum over the pairs of t of weight * row: [T, D].

    In the weights' precision, float32 or float64: low precision would round each weighted row by itself, and copies of
    one FFN would no longer add up to it.

    pairs: for the kernel, which rounds the sum to dtype; None is plain torch, which leaves that to the caller.
    """
    if pairs is None:
        output_TD = weight_R.new_zeros(num_tokens, rows_RD.shape[-1])
        return output_TD.index_add_(0, token_R, rows_RD * weight_R[:, None])
    summed_TD: Tensor = _Combine.apply(rows_RD, weight_R, token_R, *pairs, dtype)
    return summed_TD


def gated(product_NW: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of [..., 2I], gate first -> [..., I], computed in float32 and rounded once."""
    width = product_NW.shape[-1] // 2
    hidden = product_NW.new_empty(*product_NW.shape[:-1], width)
    grid = (hidden.numel() // width, triton.cdiv(width, _BLOCK))
    with torch.cuda.device_of(product_NW):  # Triton launches on the current device
        _gated_kernel[grid](product_NW, hidden, width, ACTIVATIONS[activation], _BLOCK)
    return hidden


def gated_backward(product_NW: Tensor, grad_NI: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """What `gated` gave [..., I], and the gradient of its input [..., 2I], in one pass."""
    width = grad_NI.shape[-1]
    hidden, grad_product = torch.empty_like(grad_NI), torch.empty_like(product_NW)
    grid = (grad_NI.numel() // width, triton.cdiv(width, _BLOCK))
    with torch.cuda.device_of(product_NW):
        _gated_backward_kernel[grid](product_NW, grad_NI, hidden, grad_product, width, ACTIVATIONS[activation], _BLOCK)
    return hidden, grad_product


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, token_R: Tensor, order_R: Tensor, first: Tensor) -> Tensor:
        ctx.save_for_backward(order_R, first)
        return tokens_TD.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        order_R, first = ctx.saved_tensors
        return _sum_up(grad_RD.contiguous(), None, order_R, first, grad_RD.dtype), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        weight_R: Tensor,
        token_R: Tensor,
        order_R: Tensor,
        first: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        rows_RD = rows_RD.contiguous()
        ctx.save_for_backward(rows_RD, weight_R, token_R)
        return _sum_up(rows_RD, weight_R, order_R, first, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weight_R, token_R = ctx.saved_tensors
        grad_rows, grad_weight = torch.empty_like(rows_RD), torch.empty_like(weight_R)
        width = rows_RD.shape[1]
        with torch.cuda.device_of(rows_RD):
            _combine_backward_kernel[(len(rows_RD),)](
                grad_TD.contiguous(), rows_RD, weight_R, token_R, grad_rows, grad_weight, width, _BLOCK
            )
        return grad_rows, grad_weight, None, None, None, None


def _sum_up(rows_RD: Tensor, weight_R: Tensor | None, order_R: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    num_tokens, width = len(first) - 1, rows_RD.shape[1]
    output = rows_RD.new_empty(num_tokens, width, dtype=dtype)
    weights = rows_RD if weight_R is None else weight_R
    grid = (num_tokens, triton.cdiv(width, _BLOCK))
    with torch.cuda.device_of(rows_RD):
        _sum_up_kernel[grid](rows_RD, weights, order_R, first, output, width, weight_R is not None, _BLOCK)
    return output


_jit = (lambda function: function) if triton is None else triton.jit


@_jit
def _sum_up_kernel(rows, weights, order, first, output, width, is_weighted: tl.constexpr, block: tl.constexpr):
    """One token's columns: its pairs one after the other, in float32."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    total = tl.zeros([block], dtype=tl.float32)
    place = tl.load(first + token)
    end = tl.load(first + token + 1)
    while place < end:
        pair = tl.load(order + place)
        row = tl.load(rows + pair * width + columns, mask=inside, other=0.0).to(tl.float32)
        if is_weighted:
            row = row * tl.load(weights + pair)
        total += row
        place += 1
    tl.store(output + token * width + columns, total.to(output.dtype.element_ty), mask=inside)


@_jit
def _combine_backward_kernel(grads, rows, weights, tokens, grad_rows, grad_weights, width, block: tl.constexpr):
    """One pair: the gradient of its row, and of its weight the product of row and gradient."""
    pair = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + pair)
    weight = tl.load(weights + pair)
    total = tl.zeros([block], dtype=tl.float32)
    start = 0
    while start < width:
        columns = start + tl.arange(0, block)
        inside = columns < width
        grad = tl.load(grads + token * width + columns, mask=inside, other=0.0).to(tl.float32)
        row = tl.load(rows + pair * width + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_rows + pair * width + columns, (grad * weight).to(grad_rows.dtype.element_ty), mask=inside)
        total += grad * row
        start += block
    tl.store(grad_weights + pair, tl.sum(total))


@_jit
def _activate(x, activation: tl.constexpr):
    """The activation and its derivative."""
    if activation == 0:
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid + value * (1 - sigmoid)
    elif activation == 1:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        tanh = 2 * tl.sigmoid(2 * inner) - 1
        value = 0.5 * x * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * 0.7978845608028654 * (1 + 0.134145 * x * x)
    elif activation == 2:
        share = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        value = tl.maximum(x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    return value, slope


@_jit
def _gated_kernel(product, hidden, width, activation: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    gate = tl.load(product + 2 * row * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(product + (2 * row + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(gate, activation)
    tl.store(hidden + row * width + columns, (value * up).to(hidden.dtype.element_ty), mask=inside)


@_jit
def _gated_backward_kernel(product, grads, hidden, grad_product, width, activation: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    gate = tl.load(product + 2 * row * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(product + (2 * row + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grads + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(gate, activation)
    dtype = hidden.dtype.element_ty
    tl.store(hidden + row * width + columns, (value * up).to(dtype), mask=inside)
    tl.store(grad_product + 2 * row * width + columns, (grad * up * slope).to(dtype), mask=inside)
    tl.store(grad_product + (2 * row + 1) * width + columns, (grad * value).to(dtype), mask=inside)
