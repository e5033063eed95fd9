"""What an evaluation costs beside plain forward passes: `python -m benchmarks evaluation DENSE CONVERTED [--layers N]`.

The parts of `ecmoe-inspect evaluate` on random tokens, dense model and converted one in one process, in a new order
every round. Processor seconds, so that other work on the machine counts little. Writes
benchmarks/results/evaluation-NAME.json.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ecmoe.analysis.evaluation import TOP_K_EVERY
from ecmoe.analysis.losses import token_losses
from modeling_ecmoe import record_routing, use_inference_routing

from .machine import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", help="checkpoint folder")
    parser.add_argument("converted", help="checkpoint folder made of it")
    parser.add_argument("--layers", type=int, help="the first ones alone")
    parser.add_argument("--tokens", type=int, default=4096, help="in rows of 512")
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up")
    options = parser.parse_args()
    dense, converted = (load(folder, options.layers) for folder in (options.dense, options.converted))
    ids = torch.randint(dense.config.vocab_size, (options.tokens // 512, 512))
    seconds = measure(parts_of(dense, converted, ids), options.rounds)
    reference = seconds["dense, forward pass"]
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, reference, strict=True))
        for name, values in seconds.items()
    }
    path = save(
        f"evaluation-{Path(options.converted).resolve().name}",
        {
            "models": [Path(folder).resolve().name for folder in (options.dense, options.converted)],
            "layers": options.layers,
            "tokens": options.tokens,
            "threads": torch.get_num_threads(),
            "processor_seconds": seconds,
            "over_dense": ratios,
        },
    )
    print("| part | processor seconds | over the dense forward pass |\n| --- | ---: | ---: |")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} | {ratios[name]:.2f} |")
    print(f"\nThe top-k losses are of one batch in {TOP_K_EVERY}. {path}")


def load(folder: str, layers: int | None) -> Any:
    """In eval mode, with so many layers."""
    config = AutoConfig.from_pretrained(folder)
    if layers is not None:
        config.num_hidden_layers = layers
        if hasattr(config, "mlp_layer_types"):
            config.mlp_layer_types = config.mlp_layer_types[:layers]
    return AutoModelForCausalLM.from_pretrained(folder, config=config).eval()


def parts_of(dense: Any, converted: Any, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    is_predicted = torch.ones_like(ids[:, 1:], dtype=torch.bool)

    def recorded() -> None:
        with record_routing(converted):
            token_losses(converted, batch, is_predicted)

    def top_k() -> None:
        with use_inference_routing(converted, "expert_choice"):
            token_losses(converted, batch, is_predicted)

    return {
        "dense, forward pass": lambda: dense(**batch, use_cache=False),
        "dense, losses": lambda: token_losses(dense, batch, is_predicted),
        "converted, forward pass": lambda: converted(**batch, use_cache=False),
        "converted, losses": lambda: token_losses(converted, batch, is_predicted),
        "converted, losses and routes": recorded,
        "converted, top-k losses": top_k,
    }


@torch.no_grad()
def measure(parts: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each part in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    shuffle, order = random.Random(0).shuffle, list(parts)
    for turn in range(1 + rounds):
        shuffle(order)
        for name in order:
            begin = time.process_time()
            parts[name]()
            if turn:
                seconds[name].append(time.process_time() - begin)
    return seconds
