"""The experts: FFNs with stacked weights, on equal or on any numbers of rows.

Shapes: E experts, C rows of each, D hidden size, I expert width, T tokens, K experts of one token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2CLS, ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.utils.generic import maybe_autocast

from .kernels_ecmoe import ACTIVATIONS, gated, gated_backward, kernels_run_on
from .quantized_ecmoe import Stacked4bit, part_name, through_expert


@use_experts_implementation
class EcMoeRaggedExperts(nn.Module):
    """FFNs with stacked weights, any number of rows each; the contract of Transformers' experts back-ends."""

    config: Any  # set, like `_apply_gate` and `has_gate`, by the decorator
    _apply_gate: Callable[[Tensor], Tensor]
    has_gate: bool
    has_bias: bool
    gate_up_proj: nn.Parameter  # [E, 2I, D]; up_proj [E, I, D] without a gate
    up_proj: nn.Parameter
    down_proj: nn.Parameter  # [E, D, I]; each may have a bias
    down_proj_bias: nn.Parameter  # [E, D]

    def __init__(self, config: Any, width_multiple: int = 1) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        for name, shape in config.expert_shapes(width_multiple * config.moe_intermediate_size).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        if config.hidden_act == "xielu":  # it learns, and Transformers' table makes it in bfloat16
            activation: Any = ACT2CLS["xielu"]
            self.act_fn = activation(dtype=config.dtype)
        else:
            self.act_fn = ACT2FN[config.hidden_act]
        self.loads_in_4bit: dict[str, nn.Parameter] = {}  # of quantizer_ecmoe.py, while weights are loaded

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K] -> [T, D], one expert after the other."""
        output = torch.zeros_like(hidden_states)
        into, into_bias, down, down_bias = self._stacks()
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if token.numel() == 0:
                continue
            hidden = self._activate(_expert_linear(hidden_states[token], into, into_bias, expert))
            hidden = _expert_linear(hidden, down, down_bias, expert) * top_k_weights[token, slot, None]
            output.index_add_(0, token, hidden.to(output.dtype))
        return output

    def _stacks(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The weights [E, 2I or I, D] into the experts' width and their biases, those back [E, D, I] and theirs; None
        is the dtype they have."""
        first = "gate_up_proj" if self.has_gate else "up_proj"
        into, down = getattr(self, first), self.down_proj
        into_bias = getattr(self, f"{first}_bias") if self.has_bias else None
        down_bias = self.down_proj_bias if self.has_bias else None
        if dtype is None:
            return into, into_bias, down, down_bias
        biases = (None if bias is None else bias.to(dtype) for bias in (into_bias, down_bias))
        return into.to(dtype), next(biases), down.to(dtype), next(biases)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As torch's; of a stack in 4 bits what it is made of."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self.named_parameters(recurse=False):
            if isinstance(weight, Stacked4bit):
                parts = weight.parts().items()
                destination.update({prefix + part_name(name, part): tensor for part, tensor in parts})

    def extra_repr(self) -> str:
        shapes = [f"{name}={list(weight.shape)}" for name, weight in self.named_parameters(recurse=False)]
        return ", ".join([f"num_experts={self.num_experts}", *shapes])

    def _activate(self, product: Tensor) -> Tensor:
        """The first product [..., 2I or I] -> [..., I]."""
        return self._apply_gate(product) if self.has_gate else self.act_fn(product)


class EcMoeFFN(nn.Module):
    """A plain FFN without a gate, the shared expert of families that have no class for it: y = down act(up x)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, width, bias = config.hidden_size, config.intermediate_size, config.ffn_has_bias
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        output: Tensor = self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return output


class EcMoeExperts(EcMoeRaggedExperts):
    """The experts, entered through `forward` alone: adapters, parallel plans and quantisers hook there.

    rows_per_expert: set by the block for the time of a call where `forward` is a dispatcher of expert parallelism,
        which takes no further argument; an `EPImplementation` reads it.
    """

    rows_per_expert: int | None = None

    def __init__(self, config: Any, width_multiple: int = 1) -> None:
        super().__init__(config, width_multiple)
        # The decorator says one thing for every model; the back-ends read it off the module.
        self.has_gate, self.has_bias = config.dense_ffn.has_gate, config.ffn_has_bias

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        rows_per_expert: int | list[int] | None = None,
    ) -> Tensor:
        """The contract of `EcMoeRaggedExperts`, with a short cut for rows that are sorted by expert.

        rows_per_expert: when given, hidden_states [R, D] holds so many rows of each expert in turn, or as many as a
            list says; top_k_index says so too, top_k_weights are ones, and the rows come back unweighted.
        """
        is_quantized = _is_quantized(self.down_proj)
        if rows_per_expert is not None and is_quantized:
            return self._quantized_rows(hidden_states, rows_per_expert)
        if isinstance(rows_per_expert, list):
            return self._counted_rows(hidden_states, rows_per_expert)
        if rows_per_expert is not None:
            return self._equal_rows(hidden_states, rows_per_expert)
        if is_quantized or not self._suits_grouped_mm(hidden_states):
            # The body above, without the dispatch to a back-end that would refuse these tensors.
            eager = EcMoeRaggedExperts.forward.__wrapped__  # type: ignore[attr-defined]
            return eager(self, hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def _equal_rows(self, hidden_states: Tensor, rows_per_expert: int) -> Tensor:
        """Two products per expert: no sorting, no sizes to exchange, static shapes."""
        device = hidden_states.device.type
        dtype = self.down_proj.dtype
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        rows_ECD = hidden_states.to(dtype).view(self.num_experts, rows_per_expert, -1)
        into, into_bias, down, down_bias = self._stacks(dtype)
        # The compiler fuses and plans memory itself; what an activation learns is not among EqualRows' gradients.
        if torch.compiler.is_compiling() or any(True for _ in self.act_fn.parameters()):
            hidden_ECI = self._activate(_linear(rows_ECD, into, into_bias))
            return _linear(hidden_ECI, down, down_bias).flatten(0, 1)
        act = self.config.hidden_act if self.config.experts_kernels and self.has_gate else None
        kernel = act if act in ACTIVATIONS and kernels_run_on(rows_ECD) else None
        return EqualRows.apply(self._activate, kernel, rows_ECD, into, down, into_bias, down_bias).flatten(0, 1)

    @torch.no_grad()
    def _counted_rows(self, hidden_states: Tensor, counts: list[int]) -> Tensor:
        """Rows [R, D] sorted by expert, so many of each: two products of every expert that has some, one activation."""
        into, into_bias, down, down_bias = self._stacks()
        with maybe_autocast(hidden_states.device.type, enabled=False):  # as in a grouped product
            hidden = self._activate(_counted_product(hidden_states.to(into.dtype), into, into_bias, counts))
            return _counted_product(hidden, down, down_bias, counts)

    def _quantized_rows(self, hidden_states: Tensor, counts: int | list[int]) -> Tensor:
        """Rows [R, D] sorted by expert, equally many or so many of each: one expert after the other."""
        into, into_bias, down, down_bias = self._stacks()
        outputs = []
        for expert, rows in enumerate(hidden_states.split(counts)):
            if len(rows):
                hidden = self._activate(_expert_linear(rows, into, into_bias, expert))
                outputs.append(_expert_linear(hidden, down, down_bias, expert))
        return torch.cat(outputs)

    def takes_counts(self) -> bool:
        """Whether `forward` takes the rows of each expert: where Transformers' grouped product, which on a CPU takes
        one expert after the other too, or the plain loop would serve them, or weights are quantised."""
        is_plain = self.config._experts_implementation in (None, "eager", "grouped_mm")
        is_parallel = getattr(self, "_is_expert_parallel", False)
        return (is_plain or _is_quantized(self.down_proj)) and not is_parallel

    def leaves_rows_out(self) -> bool:
        """Whether `forward` leaves rows out whose expert is beyond the last; what comes back for them is undefined.

        So does Transformers' grouped product, which sorts rows by expert, but for biases, which it looks up for each.
        """
        is_parallel = getattr(self, "_is_expert_parallel", True)
        is_grouped = self.config._experts_implementation == "grouped_mm" and not self.has_bias and not is_parallel
        return is_grouped and not _is_quantized(self.down_proj) and self._suits_grouped_mm(self.down_proj)

    def _suits_grouped_mm(self, hidden_states: Tensor) -> bool:
        """Whether torch's grouped product takes these tensors: no float64, weights and rows on 16-byte borders, which
        views into a flat buffer miss (DeepSpeed ZeRO's)."""
        if self.config._experts_implementation != "grouped_mm":
            return True
        into, _, down, _ = self._stacks()
        row_bytes = [weight.shape[-1] * weight.element_size() for weight in (into, down)]
        if not torch.compiler.is_compiling() and any(weight.data_ptr() % 16 for weight in (into, down)):
            return False
        return into.dtype != torch.float64 and all(size % 16 == 0 for size in row_bytes)


def _counted_product(rows: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
    """Rows [R, D] sorted by expert through their expert's linear layer, [E, W, D] and [E, W] or None -> [R, W].

    MKL reads a float32 weight two to three times as fast as the left factor of 2 or 3 rows, and a tall one somewhat
    faster up to 8 (docs/speed.md).
    """
    transposed = weight.mT
    few = 0 if weight.dtype != torch.float32 else 8 if weight.shape[1] > weight.shape[2] else 3
    output = rows.new_empty(len(rows), weight.shape[1])
    end = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        part = slice(end, end := end + count)
        if 1 < count <= few:
            output[part] = (weight[expert] @ rows[part].mT).mT
        else:
            torch.mm(rows[part], transposed[expert], out=output[part])
        if bias is not None:
            output[part] += bias[expert]
    return output


def _expert_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    """Rows [R, D] through one expert's linear layer of a stack [E, W, D] -> [R, W]."""
    if not isinstance(weight, Stacked4bit):
        return nn.functional.linear(rows, weight[expert], None if bias is None else bias[expert])
    product = through_expert(rows, weight, expert)
    return product if bias is None else product + bias[expert].to(product.dtype)


def _linear(rows_ECD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """C rows of every expert through its own linear layer."""
    product = torch.bmm(rows_ECD, weight.mT)
    return product if bias is None else product + bias[:, None]


def _is_quantized(weight: Tensor) -> bool:
    """Whether torchao or `Stacked4bit` holds it: such a weight is multiplied by one expert at a time, never whole."""
    return hasattr(weight, "qdata")  # the name of the small numbers in each of the types; a compiler can trace this


class EqualRows(torch.autograd.Function):
    """C rows through each of E FFNs: rows [E, C, D], weights [E, W, D] and [E, D, I], biases [E, W] and [E, D] or None
    -> [E, C, D]; W is 2I with a gate and I without.

    For backward it keeps the first product [E, C, W] and applies the activation to it again: half of what autograd
    would keep, at the cost of one elementwise pass; `kernel` names the activation where a Triton kernel does that. On a
    CPU it takes few experts at a time, so that what lies between the products stays in the cache and in memory that is
    touched already; elsewhere all at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activate: Callable[[Tensor], Tensor],
        kernel: str | None,
        rows_ECD: Tensor,
        into: Tensor,
        down: Tensor,
        into_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        output_ECD = torch.empty_like(rows_ECD, memory_format=torch.contiguous_format)
        kept = []
        with maybe_autocast(rows_ECD.device.type, enabled=False):  # the caller has chosen the precision
            for part in _parts(rows_ECD, into.shape[1]):
                rows, first, second = (_computable(tensor[part]) for tensor in (rows_ECD, into, down))
                product = rows @ first.mT
                if into_bias is not None:
                    product += into_bias[part].unsqueeze(-2)
                kept.append(product.to(rows_ECD.dtype))
                hidden = activate(product) if kernel is None else gated(product, kernel)
                _product(hidden, second.mT, output_ECD[part])
        if down_bias is not None:
            output_ECD += down_bias[:, None]
        ctx.activate, ctx.kernel = activate, kernel
        # Frozen weights need no rows.
        ctx.save_for_backward(rows_ECD if ctx.needs_input_grad[3] else None, into, down, *kept)
        return output_ECD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ECD: Tensor) -> tuple[Tensor | None, ...]:
        rows_ECD, into, down, *kept = ctx.saved_tensors
        # Frozen weights and inputs need no gradient.
        grads = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else None
            for tensor, needed in zip((grad_ECD, into, down, into[..., 0]), ctx.needs_input_grad[2:6], strict=True)
        ]
        with maybe_autocast(grad_ECD.device.type, enabled=False):
            for part, product in zip(_parts(grad_ECD, into.shape[1]), kept, strict=True):
                grad, first, second = (_computable(tensor[part]) for tensor in (grad_ECD, into, down))
                rows = None if rows_ECD is None else _computable(rows_ECD[part])
                wanted = (None if tensor is None else tensor[part] for tensor in grads)
                _backward(ctx.activate, ctx.kernel, _computable(product), grad, rows, first, second, *wanted)
        return None, None, *grads, grad_ECD.sum(1) if ctx.needs_input_grad[6] else None


def _backward(
    activate: Callable[[Tensor], Tensor],
    kernel: str | None,
    product: Tensor,
    grad: Tensor,
    rows: Tensor | None,
    into: Tensor,
    down: Tensor,
    grad_rows: Tensor | None,
    grad_into: Tensor | None,
    grad_down: Tensor | None,
    grad_into_bias: Tensor | None,
) -> None:
    """Writes the gradients that are wanted of one expert, [C, D] and so on, or of several."""
    ends_here = grad_rows is None and grad_into is None and grad_into_bias is None
    if kernel is not None and not ends_here:
        hidden, grad_product = gated_backward(product, grad @ down, kernel)
    elif kernel is not None:
        hidden = gated(product, kernel)
    else:
        with torch.enable_grad():
            product = product.detach().requires_grad_()
            hidden = activate(product)
    if grad_down is not None:
        _product(grad.mT, hidden.detach(), grad_down)
    if ends_here:
        return
    if kernel is None:
        (grad_product,) = torch.autograd.grad(hidden, product, grad @ down)
    if grad_into is not None:
        assert rows is not None
        _product(grad_product.mT, rows, grad_into)
    if grad_into_bias is not None:
        grad_into_bias.copy_(grad_product.sum(-2))
    if grad_rows is not None:
        _product(grad_product, into, grad_rows)


# Of the first product that is computed at once on a CPU; from 2 to 16 MiB little changes (docs/speed.md).
_PART_BYTES = 4 << 20


def _parts(rows_ECD: Tensor, product_width: int) -> list[Any]:
    """Indices of the experts that are computed together: on a CPU as many as fit into its cache, elsewhere all."""
    num_experts, rows, _ = rows_ECD.shape
    if rows_ECD.device.type != "cpu":
        return [...]
    size = _PART_BYTES // max(1, rows * product_width * _computable(rows_ECD[:0]).element_size())
    if size <= 1:
        return list(range(num_experts))  # torch.mm, which needs no batch of one
    return [slice(first, first + size) for first in range(0, num_experts, size)]


def _product(left: Tensor, right: Tensor, output: Tensor) -> None:
    """Writes left @ right into the output, rounded to its precision."""
    if output.dtype == left.dtype:
        torch.matmul(left, right, out=output)
    else:
        output.copy_(left @ right)


def _computable(tensor: Tensor) -> Tensor:
    """In float32 where the processor has no 16-bit products: torch would compute them one number at a time there."""
    if tensor.device.type != "cpu" or tensor.dtype not in _SLOW_DTYPES:
        return tensor
    return tensor.float()


def _slow_dtypes() -> set[torch.dtype]:
    """The 16-bit types whose products oneDNN has no code for on this processor."""
    try:
        mkldnn = torch.ops.mkldnn
        supported = {
            torch.bfloat16: mkldnn._is_mkldnn_bf16_supported(),
            torch.float16: mkldnn._is_mkldnn_fp16_supported(),
        }
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return {torch.bfloat16, torch.float16}
    return {dtype for dtype, is_supported in supported.items() if not is_supported}


_SLOW_DTYPES = _slow_dtypes()
