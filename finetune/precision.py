"""In which precision the weights of a run are trained, what that takes, and what is there.

A step of AdamW moves a weight by about the learning rate. bfloat16 keeps eight bits of a weight, so steps of less than
some 0.2 to 0.4 % of it are rounded away: at the rates of fine-tuning nearly all of them. Weights are therefore trained
in float32, with products in bfloat16 where the device has them; where memory does not allow it, in bfloat16 with steps
that are rounded at random, up or down by their size (torchao's AdamW8bit), so that they arrive on average.
"""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoConfig, AutoModelForCausalLM

from .errors import RecipeError
from .recipe import Recipe
from .sources import say

# A parameter's weight, gradient and moments: of AdamW in float32, and in bfloat16 with moments of 8 bits.
TRAINING_BYTES = {"float32": 16, "bfloat16": 6}
STOCHASTIC = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
_SPARE = 0.9  # of the free memory; activations come on top of what is counted here


@dataclass(frozen=True)
class Precision:
    """dtype: of the weights. autocast: whether products are in bfloat16. stochastic: whether steps are rounded at
    random. needed: bytes on each device for each dtype, free: what is there; none are counted where adapters alone are
    trained. why: in a few words."""

    dtype: str
    autocast: bool
    stochastic: bool
    needed: dict[str, int]
    free: int
    why: str

    def settle(self, recipe: Recipe) -> Recipe:
        """The recipe with what it left open filled in."""
        training = dict(recipe.training)
        if self.autocast:
            training["bf16"] = True
        if self.stochastic:
            training = STOCHASTIC | training
        return replace(recipe, dtype=self.dtype, training=training)

    def say(self) -> None:
        products = " products in bfloat16," if self.autocast else ""
        steps = " steps rounded at random (AdamW of 8-bit moments)," if self.stochastic else ""
        dtype = "as stored" if self.dtype == "auto" else f"in {self.dtype}"
        say(f"weights {dtype},{products}{steps} {self.why}")


def choose(recipe: Recipe, config: Any, resume: Path | None = None) -> Precision:
    """What a recipe trains in.

    Args:
        recipe: whose dtype=auto leaves the choice.
        config: of the model.
        resume: the checkpoint that a run goes on from, in its dtype: the free memory may be another one by now.

    Raises:
        RecipeError: when bfloat16 weights are to be trained and torchao is not installed.
    """
    autocast = _has_bfloat16() and not recipe.training.keys() & {"bf16", "fp16"} and not _is_mixed_already(recipe)
    if recipe.lora is not None:
        return Precision(recipe.dtype, autocast, False, {}, 0, "adapters and router in float32")
    needed, free = _needed(recipe, config), min(gather_object([_free_bytes()]))  # one choice for all ranks
    dtype, why = recipe.dtype, "as the recipe says"
    if dtype == "auto" and resume is not None and (resume / "config.json").is_file():
        dtype, why = str(AutoConfig.from_pretrained(resume).dtype).removeprefix("torch."), f"as {resume.name} is"
    if dtype == "auto" and config.dtype == torch.float64:
        why = "as stored"
    elif dtype == "auto":
        fits = needed["float32"] <= _SPARE * free
        dtype = "float32" if fits else "bfloat16"
        sizes = f"{needed['float32'] / 1e9:.1f} GB with gradients and moments in float32, {free / 1e9:.1f} GB free"
        why = sizes if fits else f"for want of memory: {sizes}"
    stochastic = dtype == "bfloat16" and "optim" not in recipe.training
    if stochastic and importlib.util.find_spec("torchao") is None:
        raise RecipeError(
            f"dtype=bfloat16 ({why}): AdamW's steps are rounded away in bfloat16 weights unless they are rounded at "
            "random; pip install torchao, or train adapters with lora={}"
        )
    return Precision(dtype, autocast, stochastic, needed, free, why)


def _has_bfloat16() -> bool:
    """Whether the accelerator has products in bfloat16. Of a CPU the recipe says so: it may be slower there."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _is_mixed_already(recipe: Recipe) -> bool:
    """Whether FSDP2's own mixed precision does it."""
    return bool((recipe.distributed or {}).get("fsdp_mixed_precision"))


def _needed(recipe: Recipe, config: Any) -> dict[str, int]:
    """Bytes on each device for training every weight, by dtype."""
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    shards = (recipe.distributed or {}).get("fsdp_size")
    shards = shards if isinstance(shards, int) and shards > 1 else 1
    return {dtype: parameters * size // shards for dtype, size in TRAINING_BYTES.items()}


def _free_bytes() -> int:
    """On this process's accelerator, or its part of the machine's memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(PartialState().device)[0])
    return int(psutil.virtual_memory().available // PartialState().num_processes)
