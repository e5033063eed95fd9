"""Greedy decoding with the KV cache: `python -m benchmarks decode`.

Tokens per second of our model by thresholds, the dense one of the same active width, and Mixtral, with each experts
implementation. Every step computes the argmax, but the next tokens are random: a random model would soon repeat itself
and send every sequence to the same experts.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from modeling_ecmoe import calibrate_thresholds, record_routing
from modeling_ecmoe.versions_ecmoe import CACHE

from .harness import device, interleaved
from .machine import save
from .peers import Sizes, models

REFERENCE = "Mixtral grouped_mm"  # its default
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
MOST_ROWS = 64  # for batched_mm, which copies the weights of the expert of every row
SIZES = {
    "cpu": Sizes(512, 1408, 8, 2, layers=4, vocabulary=8192),
    "cuda": Sizes(2048, 2816, 16, 2, layers=12, heads=16, vocabulary=32_000),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks decode", description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16" if device() == "cuda" else "float32")
    parser.add_argument("--layers", type=int, help="other than the preset's")
    parser.add_argument("--static", action="store_true", help="also compiled with a static cache, in a CUDA graph")
    options = parser.parse_args(arguments)
    sizes = SIZES[device()]
    sizes = replace(sizes, layers=options.layers or sizes.layers)
    figures = measure(sizes, options)
    for batch, rows in figures["rows"].items():
        print(f"\nbatch {batch}, {figures['experts per token'][batch]:.2f} experts per token\n\n{markdown(rows)}")
    print(save(f"decode-{device()}", figures))


def measure(sizes: Sizes, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of every candidate at every batch size, and their ratios to Mixtral's default."""
    compared = compared_models(sizes, options)
    figures: dict[str, Any] = {"sizes": sizes.json(), **vars(options), "experts per token": {}, "rows": {}}
    for batch in options.batches:
        figures["experts per token"][batch], figures["rows"][batch] = of_batch(compared, sizes, options, batch)
    return figures


def compared_models(sizes: Sizes, options: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """In eval mode, ours calibrated."""
    torch.manual_seed(0)
    compared = models(sizes, getattr(torch, options.dtype), device())
    for model in compared.values():
        model.eval()
    length = options.prompt + options.new_tokens
    ids = [torch.randint(sizes.vocabulary, (64, length), device=device()) for _ in range(2)]
    calibrate_thresholds(compared["expert choice"], [{"input_ids": one} for one in ids])
    return compared


def of_batch(
    compared: Mapping[str, PreTrainedModel], sizes: Sizes, options: argparse.Namespace, batch: int
) -> tuple[float, dict[str, dict[str, float]]]:
    """Experts per token of ours, and the candidates' figures."""
    tokens = torch.randint(sizes.vocabulary, (batch, options.prompt + options.new_tokens), device=device())
    ours = compared["expert choice"]
    with record_routing(ours) as record:
        decoder(ours, tokens, options.prompt, "eager")()
    torch._dynamo.reset()  # the compiler gives up on a function after eight shapes
    candidates: dict[str, Callable[[], object]] = {}
    for name, model in compared.items():
        candidates |= decoders(name, model, tokens, options.prompt, options.static)
    return record.experts_per_token(), summary(interleaved(candidates, options.rounds), batch * options.new_tokens)


def decoders(
    name: str, model: PreTrainedModel, tokens: Tensor, prompt: int, static: bool
) -> dict[str, Callable[[], object]]:
    """A candidate for each experts implementation that the model has and the batch allows."""
    found: dict[str, Callable[[], object]]
    if name == "dense":
        found = {name: decoder(model, tokens, prompt)}
    else:
        config = model.config
        rows = len(tokens) * int(config.num_experts_per_tok if name == "Mixtral" else config.capacity_factor)
        found = {
            f"{name} {one}": decoder(model, tokens, prompt, one)
            for one in IMPLEMENTATIONS
            if one != "batched_mm" or rows <= MOST_ROWS
        }
    if static:
        found[f"{name}, compiled"] = compiled_decoder(model, tokens, prompt)
    return found


def decoder(
    model: PreTrainedModel, tokens: Tensor, prompt: int, implementation: str | None = None
) -> Callable[[], None]:
    """tokens [B, prompt + N]: the prompt is read here, and each call decodes N tokens from it."""
    cache = DynamicCache(config=model.config)
    with _implementation(model, "eager"), torch.inference_mode():
        model(tokens[:, :prompt], **{CACHE: cache}, use_cache=True)

    @torch.inference_mode()
    def decode() -> None:
        cache.crop(prompt - cache.get_seq_length())
        with _implementation(model, implementation):
            for token in tokens[:, prompt:].split(1, dim=1):
                model(token, **{CACHE: cache}, use_cache=True).logits[:, -1].argmax(-1)

    return decode


def compiled_decoder(model: PreTrainedModel, tokens: Tensor, prompt: int) -> Callable[[], None]:
    """As `decoder`, with one compiled step of static shapes and a static cache; in a CUDA graph on a GPU."""
    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1])
    with _implementation(model, "eager"), torch.no_grad():
        model(tokens[:, :prompt], **{CACHE: cache}, use_cache=True)
    step = compiled_step(model, cache, mode="reduce-overhead" if device() == "cuda" else None)
    token = tokens[:, :1].clone()  # always at the same address

    @torch.no_grad()
    def decode() -> None:
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(prompt)
        with _implementation(model, "grouped_mm"):
            for one in tokens[:, prompt:].split(1, dim=1):
                step(token.copy_(one))

    return decode


def compiled_step(model: PreTrainedModel, cache: StaticCache, **compiler: Any) -> Callable[[Tensor], Tensor]:
    """A compiled step: the last tokens [B, 1] -> the next ones [B]; the static cache moves on by itself."""

    def step(token: Tensor) -> Tensor:
        return model(token, **{CACHE: cache}, use_cache=True).logits[:, -1].argmax(-1)

    return torch.compile(step, fullgraph=True, **compiler)


@contextmanager
def _implementation(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Another experts implementation for a while; a dense model has none."""
    if not hasattr(model.config, "num_experts") and not hasattr(model.config, "num_local_experts"):
        yield
        return
    before = model.config._experts_implementation
    model.config._experts_implementation = name or before
    try:
        yield
    finally:
        model.config._experts_implementation = before


def summary(seconds: Mapping[str, list[float]], tokens: int) -> dict[str, dict[str, float]]:
    """Tokens per second of each candidate, and the ratio to Mixtral's default in the same round: more is better."""
    return {
        name: {
            "tokens per second": tokens / statistics.median(values),
            "over Mixtral": statistics.median(b / a for a, b in zip(values, seconds[REFERENCE], strict=True)),
            "least": tokens / max(values),
            "most": tokens / min(values),
        }
        for name, values in seconds.items()
    }


def markdown(rows: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"| | tokens/s | over {REFERENCE} |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {row['tokens per second']:,.0f} | {row['over Mixtral']:.2f} |" for name, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
