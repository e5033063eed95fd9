"""From rows to training and held-out sequences, and from sequences to batches."""

import itertools
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .encode import Encoder, stop_token, wrap
from .errors import RecipeError
from .losses import IGNORE
from .recipe import Recipe
from .sources import Rows, load_rows, say

PART = 10_000  # rows tokenized at a time


class Endless(torch.utils.data.IterableDataset):
    """A stream that begins again where it ends, in another order each time.

    So a resumed run finds its place by counting batches alone, however often the rows were read.
    """

    def __init__(self, rows: IterableDataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            is_empty = True
            for row in self.rows:
                is_empty = False
                yield row
            if is_empty:  # a worker of the loader beyond the parts that the stream can be read in
                return


class Collator(DataCollatorForLanguageModeling):
    """TRL's; packed rows stay rows. TRL makes one row of them, whose attention costs the square of all of their tokens
    unless it is FlashAttention's; for that `padding_free` does so here."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """input_ids and labels [B, S], with position_ids of packed documents or the attention_mask of padding."""
        is_packed = "seq_lengths" in examples[0]
        self.return_position_ids = is_packed
        batch: dict[str, Any] = super().torch_call(examples)
        if is_packed and not self.padding_free:
            del batch["attention_mask"]  # beside it Transformers does not read documents off the positions
            batch["labels"][batch["position_ids"] == 0] = IGNORE
        return batch


def prepare(
    recipe: Recipe, arguments: SFTConfig, tokenizer: Any, vocab_size: int, wanted: int | None = None
) -> tuple[Rows, Dataset]:
    """Training and held-out sequences: input_ids, labels, and seq_lengths where documents were put into one row.

    TRL's own packing, and cutting rows that are too long, are left to its trainer, in `arguments`.

    wanted: training sequences that the run will use, when that is known; the rest of the text is not tokenized.

    Raises:
        RecipeError: when a row does not fit, and when either part gives no sequence.
    """
    train_rows, held_out_rows, kind = load_rows(recipe)
    only = arguments.completion_only_loss if kind == "prompt" else recipe.training.get("assistant_only_loss")
    encoder = Encoder(tokenizer, kind, vocab_size, recipe.append_eos, learns_all=only is False)
    if kind != "text" and encoder.has_template:
        _say_where_answers_go_on(tokenizer)
    if "packing_strategy" not in recipe.training:
        arguments.packing_strategy = "wrapped" if kind == "text" else "bfd"
    held_out = _sequences(held_out_rows, encoder, recipe, arguments, "held-out", recipe.max_eval_sequences)
    # An endless stream must hold something.
    is_stream = isinstance(train_rows, IterableDataset)
    train: Rows = _sequences(train_rows, encoder, recipe, arguments, "training", 1 if is_stream else wanted)
    if isinstance(train_rows, IterableDataset):
        seeds = (recipe.training.get(name) for name in ("data_seed", "seed"))
        seed = next((seed for seed in seeds if seed is not None), 42)
        train = _stream(train_rows.shuffle(seed=seed, buffer_size=recipe.shuffle_buffer), encoder, recipe, arguments)
    if _is_wrapped(arguments):
        arguments.packing, arguments.max_length = False, None  # done
    return train, held_out


def _say_where_answers_go_on(tokenizer: Any) -> None:
    stop, end = stop_token(tokenizer)
    if stop is None:
        ends = (
            f"ends an answer with {end!r}, which is no token of its own" if end else "does not show what ends an answer"
        )
        say(
            f"the chat template {ends}: generate and pipeline will go on after it; end it with the tokenizer's "
            "eos_token, as chat_template_path=chatml does"
        )


def _is_wrapped(arguments: SFTConfig) -> bool:
    return bool(arguments.packing) and arguments.packing_strategy == "wrapped"


def _limit(arguments: SFTConfig) -> int:
    """Tokens of a row that is neither cut nor refused; documents that are packed piece by piece have no limit."""
    is_split = arguments.packing and arguments.packing_strategy in ("wrapped", "bfd_split")
    return sys.maxsize if is_split or arguments.max_length is None else arguments.max_length


def _stream(rows: IterableDataset, encoder: Encoder, recipe: Recipe, arguments: SFTConfig) -> IterableDataset:
    limit = _limit(arguments)

    def fits(row: dict[str, Any]) -> bool:
        _refuse_long(len(row["input_ids"]), limit, recipe)
        return recipe.too_long != "drop" or len(row["input_ids"]) <= limit

    sequences = rows.map(encoder, remove_columns=list(rows.column_names or []), features=_features()).filter(fits)
    if _is_wrapped(arguments):
        return sequences.map(
            partial(wrap, length=arguments.max_length), batched=True, features=_features("seq_lengths")
        )
    return sequences


def _sequences(
    rows: Rows, encoder: Encoder, recipe: Recipe, arguments: SFTConfig, part: str, wanted: int | None
) -> Dataset:
    """The sequences of these rows, at least `wanted` of them where the rows give as many."""
    if isinstance(rows, IterableDataset):
        found = Dataset.from_list(list(_stream(rows, encoder, recipe, arguments).take(wanted)))
    else:
        limit, parts, end, too_long = _limit(arguments), [], 0, 0
        while end < len(rows) and (wanted is None or sum(_count(one, arguments) for one in parts) < wanted):
            start, end = end, min(end + PART, len(rows))
            options = {"num_proc": arguments.dataset_num_proc, "desc": f"Tokenizing ({part})"}
            one = rows.select(range(start, end)).map(
                encoder, remove_columns=rows.column_names, features=_features(), **options
            )
            sizes = _sizes(one)
            _refuse_long(max(sizes, default=0), limit, recipe)
            too_long += int((sizes > limit).sum())
            if recipe.too_long == "drop":
                one = one.select(np.flatnonzero(sizes <= limit))
            if _is_wrapped(arguments):
                options = {"features": _features("seq_lengths"), "desc": f"Packing ({part})"}
                one = one.map(partial(wrap, length=arguments.max_length), batched=True, **options)
            parts.append(one)
        found = datasets.concatenate_datasets(parts) if parts else Dataset.from_list([])
        if too_long and part == "training":
            read = f"{end:,}" if end == len(rows) else f"the first {end:,}"
            fate = "left out" if recipe.too_long == "drop" else "cut"
            say(f"{too_long:,} of {read} training rows are longer than max_length={limit} and are {fate}")
    if not len(found):
        raise RecipeError(
            f"dataset={recipe.dataset} gives no {part} sequence of max_length={arguments.max_length} tokens; give more "
            "text, shorter sequences, or another validation_fraction"
        )
    return found if wanted is None or _is_packed_later(arguments) else found.select(range(min(len(found), wanted)))


def _features(*more: str) -> datasets.Features:
    """Said aloud, because a part without a single sequence has no types to read off."""
    return datasets.Features({name: datasets.List(datasets.Value("int64")) for name in ("input_ids", "labels", *more)})


def _sizes(rows: Dataset) -> Any:
    return pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy()


def _is_packed_later(arguments: SFTConfig) -> bool:
    return bool(arguments.packing) and not _is_wrapped(arguments)


def _count(rows: Dataset, arguments: SFTConfig) -> int:
    """How many sequences they are; of those that TRL will pack, how many at least."""
    return int(_sizes(rows).sum() // arguments.max_length) if _is_packed_later(arguments) else len(rows)


def _refuse_long(size: int, limit: int, recipe: Recipe) -> None:
    if size > limit and recipe.too_long == "refuse":
        raise RecipeError(
            f"a row has {size} tokens, more than max_length={limit}; raise it, or say too_long=truncate or "
            "too_long=drop"
        )
