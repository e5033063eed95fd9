"""The sparse block in training, forward and backward: `python -m benchmarks block`.

Against the bare matrix products on rows that are dispatched already (the limit; also by torch.bmm and grouped_mm, to
choose the fastest), a dense FFN of the same FLOPs, and Transformers' Mixtral block with each of its implementations at
as many active experts per token. Beside the time stands the memory that is kept for backward.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from modeling_ecmoe import EcMoeLlamaConfig
from modeling_ecmoe.block_ecmoe import EcMoeBlock

from .harness import interleaved, summarize
from .machine import save

LIMIT = "matrix products"
SIZES = {  # D, I, E, T, c
    "small": (512, 1408, 8, 2048, 2),
    "middle": (1024, 2816, 16, 4096, 2),
    "large": (4096, 7168, 32, 16_384, 2),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks block", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["small", "middle"], choices=SIZES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="torch.compile our block and the dense FFN")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict[str, Any] = {}
    for size in options.sizes:
        for dtype in options.dtypes:
            steps = candidates(*SIZES[size], getattr(torch, dtype), device, options.compile)
            rows = summarize(interleaved(steps, options.rounds, warmup=min(2, options.rounds - 1)), LIMIT)
            for name, row in rows.items():
                row["kept_bytes"] = steps[name].kept_bytes()
            figures[f"{size} {dtype}"] = {"D, I, E, T, c": SIZES[size], "rounds": options.rounds, "rows": rows}
            print(f"\n{size} {dtype}: D, I, E, T, c = {SIZES[size]}\n\n{_table(rows)}", flush=True)
    print(save(f"block-{device}{'-compiled' if options.compile else ''}", figures))


def _table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"| | ms | over {LIMIT} | kept for backward, MB |", "| --- | ---: | ---: | ---: |"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['seconds'] * 1e3:.1f} | {row['ratio']:.2f} | {row['kept_bytes'] / 1e6:.1f} |")
    return "\n".join(lines)


def candidates(
    hidden: int, width: int, experts: int, tokens: int, capacity: int, dtype: torch.dtype, device: str, compiles: bool
) -> dict[str, "Step"]:
    """One training step, forward and backward, of each block; the same shapes and FLOPs in all of them."""
    torch.manual_seed(0)
    inputs = torch.randn(1, tokens, hidden, dtype=dtype, device=device)
    grad = torch.randn_like(inputs)
    rows = torch.randn(1, capacity * tokens, hidden, dtype=dtype, device=device)
    row_grad = torch.randn_like(rows)
    shared: dict[str, Any] = {"hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 8}

    config = EcMoeLlamaConfig(**shared, intermediate_size=width, num_experts=experts, capacity_factor=capacity)
    ours = EcMoeBlock(config, LlamaMLP)
    dense = LlamaMLP(LlamaConfig(**shared, intermediate_size=width))
    blocks: dict[str, nn.Module] = {"expert choice": ours, "dense FFN": dense}
    for name in ("eager", "grouped_mm", "batched_mm"):
        mixtral_config = MixtralConfig(
            **shared, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=capacity
        )
        mixtral_config._experts_implementation = name
        blocks[f"Mixtral {name}"] = MixtralSparseMoeBlock(mixtral_config)
    if 3 * capacity * tokens * width * hidden * dtype.itemsize > 10**9:
        del blocks["Mixtral batched_mm"]  # it copies the weights of each token's experts
    for block in blocks.values():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
        block.to(device, dtype).train()
    steps = {
        name: Step(
            torch.compile(block) if compiles and name in ("expert choice", "dense FFN") else block,
            *((rows, row_grad) if block is dense else (inputs, grad)),
        )
        for name, block in blocks.items()
    }

    weights = list(ours.experts.parameters())
    for name, function in _products(ours.experts, capacity * tokens // experts).items():
        steps[name] = Step(function, rows, row_grad, weights)
    return steps


def _products(experts: Any, rows_per_expert: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to take dispatched rows [1, E * C, D] through the experts; the first is the one that the block takes."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    offsets = rows_per_expert * torch.arange(1, len(down) + 1, dtype=torch.int32, device=down.device)

    def bmm(rows: Tensor) -> Tensor:
        rows_ECD = rows.view(len(down), rows_per_expert, -1)
        hidden = experts._apply_gate(torch.bmm(rows_ECD, gate_up.mT))
        return torch.bmm(hidden, down.mT).view_as(rows)

    def grouped_mm(rows: Tensor) -> Tensor:
        hidden = experts._apply_gate(nn.functional.grouped_mm(rows[0], gate_up.mT, offs=offsets))
        return nn.functional.grouped_mm(hidden, down.mT, offs=offsets)[None]

    ours = {LIMIT: lambda rows: experts._equal_rows(rows[0], rows_per_expert)[None]}
    return ours | {f"{LIMIT}, bmm": bmm, f"{LIMIT}, grouped_mm": grouped_mm}


class Step:
    """Forward and backward of a function of [1, T, D], with gradients of its weights and its input."""

    def __init__(
        self, function: Callable[[Tensor], Any], inputs: Tensor, grad: Tensor, weights: list[nn.Parameter] | None = None
    ) -> None:
        self.function = function
        self.inputs = inputs.clone().requires_grad_()
        self.grad = grad
        self.weights = list(function.parameters()) if weights is None else weights  # type: ignore[attr-defined]

    def __call__(self) -> None:
        for tensor in (self.inputs, *self.weights):
            tensor.grad = None
        self._forward().backward(self.grad)

    def _forward(self) -> Tensor:
        output = self.function(self.inputs)
        return output[0] if isinstance(output, tuple) else output

    def kept_bytes(self) -> int:
        """What autograd keeps of a forward pass for the backward pass, beside weights and the input itself."""
        own = {tensor.untyped_storage().data_ptr() for tensor in (self.inputs, *self.weights)}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self._forward()  # held, so that nothing is freed and its place counted for something else
        del output
        return sum(size for pointer, size in kept.items() if pointer not in own)


if __name__ == "__main__":
    main()
