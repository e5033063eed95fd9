"""Stacked weights in 4 bits: each expert's matrix is quantised by itself, as bitsandbytes quantises a linear layer, and
is in 16 or 32 bits while it is computed with.

Shapes: E experts, W x N the matrix of one ([2I, D] or [D, I]), B = W * N / 64 blocks, R rows.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers.utils.generic import maybe_autocast

BLOCK = 64  # numbers that share a scale
_NESTED_BLOCK = 256  # scales that share one, where they are quantised too
PARTS = ("qdata", "absmax", "nested_absmax", "offset")  # the last two where scales are quantised


class Stacked4bit(Tensor):
    """A frozen stack [E, W, N] in 4 bits, with the shape and the dtype that it has to those who only ask for them, such
    as PEFT. `weight[expert]` is a matrix in that dtype.

    qdata: [E, W * N / 2] uint8, two numbers each. absmax: [E, B], the largest of each block; float32, or uint8 with
        nested_absmax [E, B / 256] and offset [E], both float32, where the scales are quantised too ("double quant").
    quant_type: "nf4" or "fp4". compute_dtype: of the products, unless autocast says another; None is that of the rows.
    """

    qdata: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    quant_type: str
    compute_dtype: torch.dtype | None

    @staticmethod
    def __new__(
        cls,
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        quant_type: str,
        compute_dtype: torch.dtype | None = None,
    ) -> "Stacked4bit":
        stack = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts["qdata"].device)
        for name in PARTS:
            setattr(stack, name, parts.get(name))
        stack.quant_type, stack.compute_dtype = quant_type, compute_dtype
        return stack

    def parts(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        return {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}

    @property
    def nbytes(self) -> int:
        """That it takes in memory."""
        return sum(part.nbytes for part in self.parts().values())

    def matrix(self, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix of one expert, [W, N], in the stack's dtype or another one."""
        bnb = _bitsandbytes()
        scales = {"absmax": self.absmax[expert]}
        if self.nested_absmax is not None and self.offset is not None:
            code = _dynamic_map(self.device)
            state = bnb.QuantState(absmax=self.nested_absmax[expert], blocksize=_NESTED_BLOCK, code=code)
            state.dtype = torch.float32
            scales |= {"offset": self.offset[expert], "state2": state}
        # As one row: bitsandbytes' code for a CPU takes the scales of other blocks where a row is no number of blocks.
        state = bnb.QuantState(
            **scales,
            shape=torch.Size([self.shape[1] * self.shape[2]]),
            dtype=dtype or self.dtype,
            blocksize=BLOCK,
            quant_type=self.quant_type,
        )
        return bnb.dequantize_4bit(self.qdata[expert, :, None], state).view(self.shape[1:])

    def _like(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "Stacked4bit":
        parts = {name: change(part) for name, part in self.parts().items()}
        return Stacked4bit(parts, tuple(self.shape), dtype or self.dtype, self.quant_type, self.compute_dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(self.parts()), (self.dtype, self.quant_type, self.compute_dtype)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], meta: Any, shape: Any, stride: Any) -> "Stacked4bit":
        return Stacked4bit(parts, tuple(shape), *meta)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, self = torch.ops.aten, args[0]
        if function in (aten.detach.default, aten.alias.default):
            return self._like(lambda part: part)
        if function is aten.clone.default:
            return self._like(Tensor.clone)
        if function is aten._to_copy.default:
            device = (kwargs or {}).get("device")
            return self._like(lambda part: part.to(device, copy=True), (kwargs or {}).get("dtype"))
        if function is aten.select.int and args[1] == 0:
            return self.matrix(args[2])
        if function in (aten.add_.Tensor, aten.sub_.Tensor):  # PEFT's merge, which asks nobody beforehand
            raise NotImplementedError(
                "experts in 4 bits are frozen, and no adapter can be merged into them; other layers of this model may "
                "be merged already, so load it again, call dequantize() on it, load the adapter, and then "
                "merge_and_unload()"
            )
        raise NotImplementedError(
            f"{function} on experts in 4 bits, which are frozen and computed with one by one; call the model's "
            "dequantize() before"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Stacked4bit({self.quant_type}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


@torch.no_grad()
def quantize_stack(stack: Tensor, quant_type: str, double: bool) -> dict[str, Tensor]:
    """The parts of a stack [E, W, N] in 4 bits, each matrix by itself.

    double: whether the scales are quantised too.
    """
    bnb = _bitsandbytes()
    found: dict[str, list[Tensor]] = {}
    for matrix in stack.unbind():
        qdata, state = bnb.quantize_4bit(
            matrix.contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type=quant_type
        )
        parts = {"qdata": qdata.flatten(), "absmax": state.absmax}
        if double:
            parts |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
        for name, part in parts.items():
            found.setdefault(name, []).append(part)
    return {name: torch.stack(parts) for name, parts in found.items()}


def empty_parts(shape: tuple[int, ...], double: bool) -> dict[str, Tensor]:
    """The shapes and dtypes of the parts of a stack [E, W, N], without memory."""
    experts, size = shape[0], shape[1] * shape[2]
    blocks = -(-size // BLOCK)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qdata": ((experts, -(-size // 2)), torch.uint8),
        "absmax": ((experts, blocks), torch.uint8 if double else torch.float32),
    }
    if double:
        shapes["nested_absmax"] = ((experts, -(-blocks // _NESTED_BLOCK)), torch.float32)
        shapes["offset"] = ((experts,), torch.float32)
    return {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in shapes.items()}


def part_name(name: str, part: str) -> str:
    """Under which a part of a stack is saved: the numbers under that of the stack."""
    return name if part == "qdata" else f"{name}_{part}"


def through_expert(rows: Tensor, weight: Tensor, expert: Any) -> Tensor:
    """Rows [R, N] through the matrix of one expert of a stack [E, W, N] -> [R, W].

    Of a stack in 4 bits nothing but its bits is kept for the backward pass, which dequantises the matrix again; torch
    would keep it in full.
    """
    if not isinstance(weight, Stacked4bit):
        return linear(rows, weight[expert])
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        return _Product4bit.apply(rows.to(torch.get_autocast_dtype(device)), weight, expert)
    return _Product4bit.apply(rows.to(weight.compute_dtype or rows.dtype), weight, expert).to(rows.dtype)


class _Product4bit(torch.autograd.Function):
    """rows [R, N], one of E matrices [W, N] in 4 bits -> [R, W]; the matrix is in the precision of the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Stacked4bit, expert: int) -> Tensor:
        ctx.weight, ctx.expert = weight, expert
        with maybe_autocast(rows.device.type, enabled=False):
            return linear(rows, weight.matrix(expert, rows.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with maybe_autocast(grad.device.type, enabled=False):
            return grad @ ctx.weight.matrix(ctx.expert, grad.dtype), None, None


_maps: dict[torch.device, Tensor] = {}


def _dynamic_map(device: torch.device) -> Tensor:
    """The 256 numbers that quantised scales stand for."""
    if device not in _maps:
        _maps[device] = _bitsandbytes().create_dynamic_map().to(device)
    return _maps[device]


def _bitsandbytes() -> Any:
    """Its functions. Named as text: what a checkpoint's code imports has to be installed to load it."""
    return importlib.import_module("bitsandbytes.functional")
