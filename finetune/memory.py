"""What a run takes of a device's memory, counted and estimated before weights are loaded; what is free; the peak."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoModelForCausalLM

from ecmoe.progress import gigabytes
from modeling_ecmoe.block_ecmoe import EcMoeBlock
from modeling_ecmoe.registry_ecmoe import is_own

from .adapters import add_lora, group_of
from .errors import RecipeError
from .recipe import Recipe
from .sources import say

# A trained parameter's weight, gradient and moments: AdamW in float32, and in bfloat16 with moments of 8 bits. A frozen
# one is its weight alone.
TRAINING_BYTES = {"float32": 16, "bfloat16": 6}
SPARE = 0.9  # of the free memory; nobody counts to the last byte
_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
_BYTES_IN_4BIT = 0.5 + (1 + 4 / 256) / 64  # a number, its share of a block's scale, and that one's of another
_TILE = (4096, 32768)  # tokens and vocabulary of what TRL's head computes at once
# Copies of that, where Triton folds it in place and where torch does; measured on a CPU (docs/finetuning.md).
_TILES = {"cuda": 2, "cpu": 8}
_KEPT = 1.25  # of the widths of a layer's products, what autograd keeps; twice as much while it is computed again
_CGROUP = Path("/sys/fs/cgroup")


def empty_model(config: Any) -> Any:
    """The model of a config with shapes alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def kept_bytes(recipe: Recipe, model: nn.Module) -> dict[str, int]:
    """Weights, gradients and moments on each device, by dtype; of adapters by "adapters", whose base is as stored.

    model: an `empty_model`; gets adapters where the recipe has some. Of a checkpoint that is quantised nothing is
        counted.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return {}
    shards = (recipe.distributed or {}).get("fsdp_size")
    shards = shards if isinstance(shards, int) and shards > 1 else 1
    if recipe.lora is not None:
        stored = {"auto": getattr(model.config, "dtype", None) or torch.float32}.get(recipe.dtype, recipe.dtype)
        size = stored.itemsize if isinstance(stored, torch.dtype) else _WEIGHT_BYTES.get(stored, 2)
        small = _quantized_weights(model) if recipe.quantization else 0
        base = sum(p.numel() for p in model.parameters()) - small
        with torch.device("meta"):
            model = add_lora(model, recipe.lora)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        kept_in_4bit = round(small * _BYTES_IN_4BIT)
        return {"adapters": (base * size + kept_in_4bit + trained * TRAINING_BYTES["float32"]) // shards}
    rates = {"router": recipe.router_learning_rate, "routed experts": recipe.experts_learning_rate}
    total = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for name, p in model.named_parameters() if rates.get(group_of(name)) == 0)
    return {
        dtype: ((total - frozen) * size + frozen * _WEIGHT_BYTES[dtype]) // shards
        for dtype, size in TRAINING_BYTES.items()
    }


def _quantized_weights(model: nn.Module) -> int:
    """How many numbers bitsandbytes takes: of linear layers but the head, and of stacked experts."""
    linear = [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    blocks = [module for module in model.modules() if isinstance(module, EcMoeBlock)]
    stacks = [weight for block in blocks for weight in block.experts.parameters() if weight.dim() == 3]
    return sum(weight.numel() for weight in [*linear, *stacks])


def passing_bytes(recipe: Recipe, config: Any, tokens: int, itemsize: int) -> int:
    """About what a training step keeps and computes on the way, of so many tokens with padding.

    itemsize: of the products.
    """
    config = config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    width = 8 * hidden + 4 * _active_width(config)
    body = layers * hidden + 2 * _KEPT * width if _recomputes(recipe) else layers * _KEPT * width
    tiles = _TILES["cuda" if on_gpu(recipe) else "cpu"]
    head = min(tokens, _TILE[0]) * min(config.vocab_size, _TILE[1]) * tiles * 4
    return int(tokens * itemsize * body + head + config.vocab_size * hidden * 4)


def _recomputes(recipe: Recipe) -> bool:
    """Whether activations are computed again in the backward pass."""
    training = recipe.training
    return bool(training.get("activation_checkpointing", training.get("gradient_checkpointing", True)))


def _active_width(config: Any) -> int:
    """Of the FFNs that a token meets on average, [I]."""
    if not is_own(config):
        return getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return round(config.capacity_factor * config.moe_intermediate_size) + config.shared_expert_intermediate_size


def on_gpu(recipe: Recipe) -> bool:
    """Whether a recipe trains on an accelerator of CUDA's."""
    return torch.cuda.is_available() and not recipe.training.get("use_cpu")


def free_bytes(recipe: Recipe, with_swap: bool = False) -> int:
    """On this process's accelerator, or its part of the machine's memory, within the limit of its container."""
    if on_gpu(recipe):
        return int(torch.cuda.mem_get_info(PartialState().device)[0])
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
        free = min(free, limit - used + int(cached))
    free += psutil.swap_memory().free if with_swap else 0
    return int(free // PartialState().num_processes)


def begin_peak() -> None:
    """Lets `peak_bytes` count from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # of Linux


def peak_bytes() -> int:
    """The most that was allocated on the accelerator; on a CPU resident, or resident at this moment without Linux."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    return int(psutil.Process().memory_info().rss)


def refuse_impossible(recipe: Recipe, config: Any, needed: dict[str, int], kept: int) -> None:
    """Refuses weights, gradients and moments beyond all that is free, swap space too.

    Not where DeepSpeed or FSDP put them elsewhere, nor for an optimiser that keeps less than AdamW.

    Raises:
        RecipeError: with what would fit.
    """
    optimizer = str(recipe.training.get("optim", "adamw_torch"))
    is_counted = optimizer.startswith("adamw_torch") and ("bit" not in optimizer or kept == needed.get("bfloat16"))
    free = free_bytes(recipe, with_swap=True)
    if kept > free and is_counted and not _is_divided(recipe):
        raise RecipeError(
            f"model={recipe.model} does not fit: weights, gradients and moments take {gigabytes(kept)} on each device "
            f"and {gigabytes(free)} are free. {_remedies(recipe, config, needed, kept)}"
        )


def warn_of_memory(recipe: Recipe, config: Any, precision: Any, rows: int, length: int) -> None:
    """Says so where a step takes about more than is free: the system ends such a run without a word.

    rows, length: of the largest batch on a device, in tokens with padding.
    """
    half = precision.autocast or precision.dtype in ("bfloat16", "float16")
    passing = passing_bytes(recipe, config, rows * length, 2 if half else 4)
    if not precision.kept or precision.kept + passing <= SPARE * precision.free or _is_divided(recipe):
        return
    say(
        f"memory: weights, gradients and moments take {gigabytes(precision.kept)} on each device and a batch of {rows} "
        f"rows of {length:,} tokens about {gigabytes(passing)} more. That is beyond or close to the "
        f"{gigabytes(precision.free)} that are free, and a system without memory ends a run without a word. "
        + _remedies(recipe, config, precision.needed, precision.kept, rows, length)
    )


def _is_divided(recipe: Recipe) -> bool:
    """Whether DeepSpeed or FSDP put weights, gradients and moments where nothing of this counts them."""
    named = any(recipe.training.get(name) for name in ("deepspeed", "fsdp", "fsdp_config"))
    return named or str(PartialState().distributed_type).rpartition(".")[2] in ("DEEPSPEED", "FSDP")


def _remedies(recipe: Recipe, config: Any, needed: dict[str, int], kept: int, rows: int = 1, length: int = 0) -> str:
    """What takes less, the strongest first."""
    found = []
    if recipe.lora is None:
        adapters = kept_bytes(replace(recipe, lora={}), empty_model(config)).get("adapters", 0)
        found += [f"lora={{}} (adapters alone, {gigabytes(adapters)})"] * (0 < adapters < kept)
        if needed.get("bfloat16", kept) < kept:
            found.append(f"dtype=bfloat16 ({gigabytes(needed['bfloat16'])})")
    if rows > 1:
        steps = recipe.training.get("gradient_accumulation_steps", 1) * rows
        found.append(f"per_device_train_batch_size=1 gradient_accumulation_steps={steps}")
    if length > 512:
        found.append("a smaller max_length")
    if length and not _recomputes(recipe):
        found.append("activation_checkpointing=true")
    if on_gpu(recipe):
        found.append("several GPUs with the recipe fsdp2")
    return f"Try {', or '.join(found)}" if found else "Free some memory"
