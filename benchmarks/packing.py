"""Packed rows as rows, and as one row: `python -m benchmarks packing`.

TRL's collator makes one row of a packed batch. FlashAttention reads the documents off it; any other attention computes
the square of all of its tokens. Training steps of two dense models under SDPA, interleaved; tokens per second as
medians. Writes benchmarks/results/packing.json.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .harness import device, interleaved
from .machine import save

MODELS: dict[str, dict[str, Any]] = {
    "stories260K": {
        "shape": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8},
        "rows": 8,
        "tokens": 256,
    },
    "SmolLM2-135M, 4 of its 30 layers": {
        "shape": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9},
        "rows": 4,
        "tokens": 512,
    },
}
DOCUMENTS = 4  # in a row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    results = {name: measure(options, **model) for name, model in MODELS.items()}
    path = save("packing", {"repeats": options.repeats, "models": results})
    print("| model | batch | tokens/s as rows | as one row | rows / one row |\n| --- | --- | ---: | ---: | ---: |")
    for name, row in results.items():
        print(f"| {name} | {row['batch']} | {row['rows']:,.0f} | {row['one row']:,.0f} | {row['ratio']:.2f} |")
    print(f"\n{path}")


def measure(options: argparse.Namespace, shape: dict[str, Any], rows: int, tokens: int) -> dict[str, Any]:
    """Tokens per second of forward and backward in both shapes of the same batch."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, vocab_size=512)
    model: Any = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    model.to(device())
    ids = torch.randint(0, 512, (rows, tokens), device=device())
    positions = torch.arange(tokens // DOCUMENTS, device=device()).repeat(DOCUMENTS).expand(rows, -1)
    batches = {"rows": (ids, positions), "one row": (ids.reshape(1, -1), positions.reshape(1, -1))}
    seconds = interleaved({name: partial(step, model, *batch) for name, batch in batches.items()}, options.repeats)
    speed = {name: rows * tokens / statistics.median(took) for name, took in seconds.items()}
    return {"batch": f"{rows} x {tokens}", "seconds": seconds, **speed, "ratio": speed["rows"] / speed["one row"]}


def step(model: Any, ids: Tensor, positions: Tensor) -> None:
    model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()


if __name__ == "__main__":
    main()
