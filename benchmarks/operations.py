"""What a block of experts does for one token, operation by operation: `python -m benchmarks operations`.

A decoding step on one thread of the CPU, ours and Mixtral's of the same widths, by torch's profiler: how often each
operation runs in a call, and its own time.
"""

import argparse
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import MixtralConfig, MixtralForCausalLM

import modeling_ecmoe

WIDTHS: dict[str, Any] = {"vocab_size": 512, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1}
HEADS: dict[str, Any] = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
EXPERTS, TOP_K = 8, 2
SHOWN = 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--calls", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = modeling_ecmoe.config_class("llama")(**WIDTHS, **HEADS, num_experts=EXPERTS, capacity_factor=TOP_K)
    ours: Any = modeling_ecmoe.model_class("llama")(config).eval()
    mixtral = MixtralForCausalLM(MixtralConfig(**WIDTHS, **HEADS, num_local_experts=EXPERTS)).eval()
    modeling_ecmoe.calibrate_thresholds(ours, [{"input_ids": torch.randint(0, WIDTHS["vocab_size"], (8, 256))}])
    for name, model in (("expert choice", ours), ("Mixtral", mixtral)):
        print("\n".join(table(name, model.model.layers[0].mlp, options.calls)))


@torch.no_grad()
def table(name: str, block: Any, calls: int) -> list[str]:
    """The operations of a block on one token, those that take longest first."""
    hidden = torch.randn(1, 1, WIDTHS["hidden_size"])
    while hasattr(block, "routes") and int(block.routes(block.gate(hidden[0])[1]).sum()) != TOP_K:
        hidden = torch.randn(1, 1, WIDTHS["hidden_size"])  # until a token has as many experts as Mixtral's
    for _ in range(20):
        block(hidden)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(calls):
            block(hidden)
    found = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in found) / calls
    lines = [f"\n{name}: {total:,.0f} microseconds in {sum(event.count for event in found) / calls:.0f} operations\n"]
    lines += ["| operation | times | microseconds |", "| --- | ---: | ---: |"]
    for event in found[:SHOWN]:
        lines.append(f"| {event.key} | {event.count / calls:.1f} | {event.self_cpu_time_total / calls:,.1f} |")
    return lines


if __name__ == "__main__":
    main()
