"""The sparse block in training, forward and backward: `python -m benchmarks block`.

Against the bare matrix products on rows that are dispatched already (the limit), a dense FFN of the same FLOPs, and
Transformers' Mixtral block with each of its implementations at as many active experts per token.
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

from .harness import interleaved, summarize, table
from .machine import save

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
    figures: dict[str, Any] = {"sizes": {name: SIZES[name] for name in options.sizes}, "rounds": options.rounds}
    for size in options.sizes:
        for dtype in options.dtypes:
            steps = candidates(*SIZES[size], getattr(torch, dtype), device, options.compile)
            rows = summarize(interleaved(steps, options.rounds), "matrix products")
            figures[f"{size} {dtype}"] = rows
            print(f"\n{size} {dtype}: D, I, E, T, c = {SIZES[size]}\n\n{table(rows, 'matrix products')}", flush=True)
    print(save(f"block-{device}{'-compiled' if options.compile else ''}", figures))


def candidates(
    hidden: int, width: int, experts: int, tokens: int, capacity: int, dtype: torch.dtype, device: str, compiles: bool
) -> dict[str, Callable[[], object]]:
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
    steps: dict[str, Callable[[], object]] = {
        name: _step(
            torch.compile(block) if compiles and name in ("expert choice", "dense FFN") else block,
            *((rows, row_grad) if block is dense else (inputs, grad)),
        )
        for name, block in blocks.items()
    }

    def products(hidden_states: Tensor) -> Tensor:
        return ours.experts._equal_rows(hidden_states[0], capacity * tokens // experts)[None]

    steps["matrix products"] = _step(products, rows, row_grad, list(ours.experts.parameters()))
    return steps


def _step(
    function: Callable[[Tensor], Any], inputs: Tensor, grad: Tensor, parameters: list[nn.Parameter] | None = None
) -> Callable[[], None]:
    weights = parameters if parameters is not None else list(function.parameters())  # type: ignore[attr-defined]
    inputs = inputs.clone().requires_grad_()

    def step() -> None:
        for tensor in (inputs, *weights):
            tensor.grad = None
        output = function(inputs)
        (output[0] if isinstance(output, tuple) else output).backward(grad)

    return step


if __name__ == "__main__":
    main()
