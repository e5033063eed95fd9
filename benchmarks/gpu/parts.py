"""The parts of `python -m benchmarks gpu`, in the order of their worth; each hands its figures over as it goes."""

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modeling_ecmoe import calibrate_thresholds, kernels_ecmoe
from modeling_ecmoe.bounded_ecmoe import choose_tokens_within_bounds
from modeling_ecmoe.llama_ecmoe import EcMoeLlamaForCausalLM
from modeling_ecmoe.routing_ecmoe import choose_tokens

from .. import block, decode
from ..harness import TrainingStep, device, interleaved, summarize
from ..peers import Sizes, blocks

Keep = Callable[[dict[str, Any]], None]


class Part(NamedTuple):
    """run(tiny, keep): measures, calling keep with all figures whenever there is a new one. seconds: its limit."""

    run: Callable[[bool, Keep], None]
    seconds: float


# D, I, E, T, c
BLOCKS = {"coarse": (4096, 14_336, 8, 16_384, 2), "fine": (2048, 768, 128, 16_384, 8)}
TINY_BLOCKS = {"coarse": (32, 48, 4, 64, 2), "fine": (32, 16, 8, 64, 4)}
MODEL = Sizes(576, 1536, 4, 1, layers=30, heads=9, vocabulary=49_152, positions=4096)  # of SmolLM2-135M
TINY_MODEL = Sizes(32, 48, 4, 1, layers=2, heads=4, vocabulary=64)


def dtype_of(tiny: bool) -> torch.dtype:
    return torch.float32 if tiny and device() == "cpu" else torch.bfloat16


def ceilings(tiny: bool, keep: Keep) -> None:
    """What the card can do: bytes copied and floating-point operations of a 16-bit product, per second."""
    size, side = (1 << 20, 128) if tiny else (1 << 30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=device(), dtype=dtype_of(tiny))
    seconds = interleaved({"copy": lambda: target.copy_(source), "product": lambda: left @ left}, 3 if tiny else 20)
    best = {name: min(values) for name, values in seconds.items()}
    keep({"copied_bytes_per_second": 2 * size / best["copy"], "flops": 2 * side**3 / best["product"]})


GPU_TESTS = [f"tests/modeling_ecmoe/test_{name}.py" for name in ("kernels", "graphs", "router", "no_sync")]


def tests(tiny: bool, keep: Keep) -> None:
    """The tests that want a GPU; what they say is in the part's log."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", *GPU_TESTS]
    keep({"exit": subprocess.run(command, check=False).returncode})


def works(name: str, step: Callable[[], Any], figures: dict[str, Any]) -> bool:
    """Whether a candidate runs at all; what it said goes into the figures, and the others are measured."""
    try:
        step()
    except Exception as error:  # no compiler for Triton, no code for a card
        figures.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:300]
        return False
    return True


def kernels(tiny: bool, keep: Keep) -> None:
    """Largest errors against float64, relative to the largest number; and seconds beside plain torch."""
    tokens, width, experts, share = (50, 40, 4, 12) if tiny else (16_384, 4096, 8, 4096)
    figures: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(tokens, width, device=device(), dtype=dtype)
        token = torch.stack([torch.randperm(tokens, device=x.device)[:share] for _ in range(experts)]).flatten()
        weight = torch.rand(len(token), device=x.device)
        grad = torch.randn_like(x)
        runs = kernels_ecmoe.kernels_run_on(x)

        def step(pairs: Any, x: Tensor = x, token: Tensor = token, weight: Tensor = weight, grad: Tensor = grad) -> Any:
            inputs, weights = x.detach().requires_grad_(), weight.detach().requires_grad_()
            rows = kernels_ecmoe.dispatch(inputs, token, pairs)
            out = kernels_ecmoe.combine(rows, weights, token, len(x), pairs, x.dtype)
            out.backward(grad.to(out.dtype))
            return out, inputs.grad, weights.grad

        def ours(step: Any = step, token: Tensor = token, runs: bool = runs) -> Any:
            return step(kernels_ecmoe.list_pairs(token, tokens) if runs else None)

        if not works(str(dtype), ours, figures):
            keep(figures)
            continue
        exact = step(None, x.double(), token, weight.double(), grad.double())
        found = ours()
        with torch.no_grad():
            errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]
        seconds = summarize(
            interleaved({"plain": lambda step=step: step(None), "kernels": ours}, 2 if tiny else 10), "plain"
        )
        figures[str(dtype)] = {"kernels run": runs, "errors": errors, "seconds": seconds}
        keep(figures)


def block_times(tiny: bool, keep: Keep) -> None:
    """A training step of the block beside bare products, the dense FFN and Transformers' Mixtral block."""
    figures: dict[str, Any] = {}
    for name, sizes in (TINY_BLOCKS if tiny else BLOCKS).items():
        hidden, width, experts, tokens, active = sizes
        steps: dict[str, Any] = block.candidates(*sizes, dtype_of(tiny), device(), False)
        inputs, grad = (getattr(steps["expert choice"], what).detach() for what in ("inputs", "grad"))
        rows, row_grad = (getattr(steps[block.LIMIT], what).detach() for what in ("inputs", "grad"))
        for extra, fields in {"kernels": {}, "kernels, bounded": {"min_experts_per_token": 1}}.items():
            ours: Any = blocks(Sizes(hidden, width, experts, active), (), experts_kernels=True, **fields)[
                "expert choice"
            ]
            ours.to(device(), dtype_of(tiny)).train()
            steps[f"expert choice, {extra}"] = TrainingStep(ours, inputs, grad)
            if not fields:  # the same limit with the fused activation
                limit = partial(_rows_through, ours.experts, active * tokens // experts)
                steps[f"{block.LIMIT}, kernels"] = TrainingStep(limit, rows, row_grad, list(ours.experts.parameters()))
        found: dict[str, Any] = {"D, I, E, T, c": sizes}
        figures[name] = found
        steps = {one: step for one, step in steps.items() if works(one, step, found)}
        found["rows"] = summarize(interleaved(steps, 2 if tiny else 8), block.LIMIT)
        flops = 3 * 2 * active * tokens * 3 * hidden * width  # forward, and twice that for backward
        for row in found["rows"].values():
            row["flops"] = flops / row["seconds"]
        keep(figures)


def _rows_through(experts: Any, rows_per_expert: int, rows: Tensor) -> Tensor:
    output: Tensor = experts._equal_rows(rows[0], rows_per_expert)[None]
    return output


def choice(tiny: bool, keep: Keep) -> None:
    """Seconds of the plain and of the bounded choice, without the experts."""
    figures: dict[str, Any] = {}
    for experts, active in ((8, 2), (128, 8)):
        scores = torch.rand(1, 256 if tiny else 16_384, experts, device=device())
        ways = {
            "plain": lambda s=scores, c=active: choose_tokens(s, c),
            "at least one": lambda s=scores, c=active: choose_tokens_within_bounds(s, c, 1, None),
        }
        if device() == "cuda":
            ways["at least one, in a graph"] = lambda s=scores, c=active: choose_tokens_within_bounds(
                s, c, 1, None, in_graph=True
            )
        figures[f"E {experts}, c {active}"] = summarize(interleaved(ways, 2 if tiny else 10), "plain")
        keep(figures)


def model_of(tiny: bool, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = EcMoeLlamaForCausalLM((TINY_MODEL if tiny else MODEL).ecmoe(**fields))
    return nn.Module.to(model, device(), dtype_of(tiny))


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kernels": {"experts_kernels": True},
    "bounded": {"min_experts_per_token": 1},
    "bounded, kernels": {"min_experts_per_token": 1, "experts_kernels": True},
}


def training(tiny: bool, keep: Keep) -> None:
    """SmolLM2-135M's shape with 4 experts: tokens per second and waits of the host in a step."""
    batch = (2, 16) if tiny else (8, 2048)
    figures: dict[str, Any] = {"B, S": batch}
    for name, fields in WAYS.items():
        step, _ = steps_of(model_of(tiny, **fields), batch)
        if works(name, step, figures):
            seconds = interleaved({"step": step}, 3 if tiny else 12)["step"]
            median = sorted(seconds)[len(seconds) // 2]
            figures[name] = {
                "tokens_per_second": batch[0] * batch[1] / median,
                "synchronisations": synchronisations(step),
            }
        keep(figures)


def repeated(tiny: bool, keep: Keep) -> None:
    """Whether two runs of 20 steps have the same bits; attention is eager, for fused ones add up atomically."""
    batch = (2, 16) if tiny else (4, 256)
    figures: dict[str, Any] = {"B, S": batch}
    for name, fields in WAYS.items():
        weights = []
        for _ in range(2):
            model = model_of(tiny, **fields)
            model.set_attn_implementation("eager")
            step, parameters = steps_of(model, batch)
            if works(name, step, figures):
                for _ in range(2 if tiny else 19):
                    step()
                weights.append([p.detach().clone() for p in parameters])
        if len(weights) == 2:
            figures[name] = all(torch.equal(one, two) for one, two in zip(*weights, strict=True))
        keep(figures)


def steps_of(model: Any, batch: tuple[int, int]) -> tuple[Callable[[], None], list[Tensor]]:
    """A training step on random tokens, the same ones for every model, and what it trains."""
    model.train()
    model.config.use_cache = False
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    generator = torch.Generator(device()).manual_seed(0)

    def step() -> None:
        ids = torch.randint(model.vocab_size, batch, device=device(), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, parameters


def synchronisations(step: Callable[[], None]) -> int | None:
    """How often the host waits for the GPU in a step; None where there is none."""
    if device() != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in caught)


def decoding(tiny: bool, keep: Keep) -> None:
    """Tokens per second beside Mixtral; then also with a static cache in a CUDA graph."""
    sizes = TINY_MODEL if tiny else decode.SIZES["cuda"]
    options = argparse.Namespace(
        new_tokens=4 if tiny else 16,
        prompt=8 if tiny else 32,
        rounds=1 if tiny else 5,
        dtype=str(dtype_of(tiny)).removeprefix("torch."),
        static=False,
    )
    with torch.device(device()):  # weights are drawn where they are used
        compared = decode.compared_models(sizes, options)
    figures: dict[str, Any] = {}
    for options.static in (False,) if tiny else (False, True):
        for batch in (1,) if tiny else (1, 8, 64):
            name = f"batch {batch}" + ", compiled too" * options.static
            experts, rows = decode.of_batch(compared, sizes, options, batch)
            figures[name] = {"experts per token": experts, "rows": rows}
            keep(figures)


def calibration(tiny: bool, keep: Keep) -> None:
    """Peak memory and seconds of measuring thresholds."""
    model = model_of(tiny).eval()
    ids = torch.randint(model.vocab_size, (2, 16) if tiny else (8, 2048), device=device())
    before = torch.cuda.memory_allocated() if device() == "cuda" else 0
    seconds = interleaved({"calibration": lambda: calibrate_thresholds(model, [{"input_ids": ids}])}, 2, warmup=1)
    peak = torch.cuda.max_memory_allocated() - before if device() == "cuda" else None
    keep({"seconds": seconds["calibration"], "peak_bytes": peak})


PARTS = {
    "ceilings": Part(ceilings, 40),
    "kernels": Part(kernels, 60),
    "block": Part(block_times, 90),
    "tests": Part(tests, 90),
    "training": Part(training, 90),
    "repeated": Part(repeated, 60),
    "choice": Part(choice, 30),
    "decoding": Part(decoding, 120),
    "calibration": Part(calibration, 30),
}
