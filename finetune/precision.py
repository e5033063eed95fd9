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

import torch
from accelerate.utils import gather_object
from transformers import AutoConfig

from ecmoe.progress import gigabytes

from .errors import RecipeError
from .memory import SPARE, empty_model, free_bytes, kept_bytes
from .recipe import Recipe
from .sources import say

STOCHASTIC = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}


@dataclass(frozen=True)
class Precision:
    """dtype: of the weights. autocast: whether products are in bfloat16. stochastic: whether steps are rounded at
    random. needed: bytes of weights, gradients and moments on each device for each dtype, or of "adapters"; free: what
    is there. why: in a few words."""

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

    @property
    def kept(self) -> int:
        """Bytes of weights, gradients and moments, as chosen."""
        return self.needed.get("adapters") or self.needed.get(self.dtype, 0)

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
    needed, free = (
        kept_bytes(recipe, empty_model(config)),
        min(gather_object([free_bytes(recipe)])),
    )  # one for all ranks
    if recipe.lora is not None:
        small = "linear layers and experts in 4 bits, " if recipe.quantization else ""
        return Precision(recipe.dtype, autocast, False, needed, free, f"{small}adapters and router in float32")
    dtype, why = recipe.dtype, "as the recipe says"
    if dtype == "auto" and resume is not None and (resume / "config.json").is_file():
        dtype, why = str(AutoConfig.from_pretrained(resume).dtype).removeprefix("torch."), f"as {resume.name} is"
    if dtype == "auto" and config.dtype == torch.float64:
        why = "as stored"
    elif dtype == "auto":
        fits = needed["float32"] <= SPARE * free
        dtype = "float32" if fits else "bfloat16"
        sizes = f"{gigabytes(needed['float32'])} with gradients and moments in float32, {gigabytes(free)} free"
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
