"""What has stopped a run, in one line: a full disk, too little memory, a rank that is gone."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError

from .errors import RecipeError
from .folder import after_a_stop
from .recipe import Recipe

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}


@contextlib.contextmanager
def refusals_in_one_line(recipe: Recipe) -> Iterator[None]:
    """Around a run: what stops it for want of something is a RecipeError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, ImportError) as error:
        refusal = refusal_of_stop(error, recipe)
        if refusal is None:
            raise
        raise refusal from error


def refusal_of_stop(error: Exception, recipe: Recipe) -> RecipeError | None:
    """What a stopped run says: the disk is full, memory is, or a rank is gone; None of anything else."""
    output = Path(recipe.output_dir).expanduser()
    goes_on = after_a_stop(recipe)
    reason = " ".join(str(error).split())[:200]
    if isinstance(error, ImportError):
        return RecipeError(f"the recipe asks for a package that is not installed: {reason}")
    if isinstance(error, torch.OutOfMemoryError):
        size = recipe.training.get("per_device_train_batch_size", "default")
        return RecipeError(
            f"per_device_train_batch_size={size} does not fit into memory; lower it and raise "
            f"gradient_accumulation_steps, or set activation_checkpointing=true; {goes_on}"
        )
    if getattr(error, "errno", None) in _DISK or isinstance(error, SafetensorError) or "inline_container" in reason:
        return RecipeError(f"output_dir={output} cannot be written: {reason}; free some space; {goes_on}")
    if isinstance(error, OSError):  # such as a dataset that is streamed from a server
        return RecipeError(f"dataset={recipe.dataset} cannot be read any more: {reason}; {goes_on}")
    lost = isinstance(error, torch.distributed.DistError) or "gloo" in reason.lower() or "connection" in reason.lower()
    if PartialState().num_processes > 1 and lost:
        return RecipeError(f"another process of this run has ended: {reason}; {goes_on}")
    return None
