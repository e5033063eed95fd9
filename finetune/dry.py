"""A dry run: which rows it takes, and what its second step says of the whole run."""

import math
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import TrainerCallback

from ecmoe.progress import duration

from .calibration import CALIBRATION_TOKENS
from .data import Endless, lengths_of
from .memory import begin_peak
from .sources import say

_SHORT = 16  # tokens of a row of the first batch


class SecondStep(TrainerCallback):
    """Before the batch of the longest rows: says about how long it takes, by the short one, and watches memory."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            rows = self.trainer.train_dataset["input_ids"]
            first, second = (sum(map(len, half)) for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]))
            seconds = self.trainer.timer.seconds[0] * second / first
            say(f"a step of {second:,} tokens follows; at most about {duration(seconds)}")
            begin_peak()


def two_batches(rows: Any, size: int) -> Dataset:
    """`size` rows of few tokens, and the `size` longest ones; of a stream its first ones."""
    if isinstance(rows, (IterableDataset, Endless)):
        rows = Dataset.from_list(list(islice(iter(rows), size)))
    longest = np.argsort(-lengths_of(rows), kind="stable")
    longest = rows.select(np.resize(longest[:size], size).tolist())  # again where there are fewer
    return concatenate_datasets([longest.map(_shortened, load_from_cache_file=False), longest])


def _shortened(row: dict[str, Any]) -> dict[str, Any]:
    """Its first tokens, all learned, as one document."""
    ids = row["input_ids"][:_SHORT]
    return {"input_ids": ids, "labels": ids} | ({"seq_lengths": [len(ids)]} if "seq_lengths" in row else {})


def estimate_run(trainer: Any, whole: Any, rows: Any, longest: list[list[int]]) -> dict[str, float]:
    """About the run of which `trainer` took a batch: steps, seconds_per_step and tokens_per_step with padding, and
    whether there is any (has_padding); evaluations, and seconds_per_evaluation with the thresholds' calibration before
    each.

    whole: SFTConfig of the run. rows: all of its training rows. longest: those of the batch, whose last step was timed.
    """
    size, passes = trainer.args.train_batch_size * trainer.args.world_size, whole.gradient_accumulation_steps
    pads = not trainer.padding_free
    widest = len(longest) * max(map(len, longest)) if pads else sum(map(len, longest))
    mean, tokens, steps = float(widest), math.inf, whole.max_steps
    real = float(sum(map(len, longest)))
    if isinstance(rows, Dataset):
        lengths = lengths_of(rows)
        tokens = float(lengths.sum())
        mixed = np.random.default_rng(0).permutation(lengths)
        batches = [mixed[start : start + size] for start in range(0, len(mixed), size)]
        mean = float(np.mean([len(batch) * batch.max() if pads else batch.sum() for batch in batches]))
        real = tokens / len(batches)
        steps = steps if steps > 0 else math.ceil(whole.num_train_epochs * math.ceil(len(batches) / passes))
    rate = trainer.timer.seconds[-1] / widest
    every = {"steps": whole.eval_steps or whole.logging_steps, "epoch": max(1, steps / max(1, whole.num_train_epochs))}
    between = every.get(getattr(whole.eval_strategy, "value", whole.eval_strategy), math.inf)
    held_out = int(lengths_of(trainer.eval_dataset).sum()) * (2 if trainer.routes else 1)
    calibrated = min(tokens, CALIBRATION_TOKENS) if trainer.routes else 0
    forward = 1 / (4 if whole.activation_checkpointing or whole.gradient_checkpointing else 3)
    return {
        "steps": steps,
        "tokens_per_step": mean * passes,
        "has_padding": mean > real,
        "seconds_per_step": rate * mean * passes,
        "evaluations": 2 + (math.floor(steps / between) if between < math.inf else 0),
        "seconds_per_evaluation": rate * (held_out + calibrated) * forward,
    }
