"""From rows to training and held-out sequences, and from sequences to batches."""

import itertools
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ecmoe.encoding import IGNORE
from ecmoe.progress import number_of

from .encode import Encoder, fit, wrap
from .errors import RecipeError
from .recipe import Recipe, learned_of
from .sources import Rows, load_rows, say

PART = 10_000  # rows tokenized at a time
_LOOKED_AT = 1_000  # rows, for a message


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
            if not batch["attention_mask"].all():
                raise RecipeError(
                    "packed rows of unlike length cannot stand side by side; leave pad_to_multiple_of out"
                )
            del batch["attention_mask"]  # beside it Transformers does not read documents off the positions
            batch["labels"][batch["position_ids"] == 0] = IGNORE
        return batch


def prepare(
    recipe: Recipe, arguments: SFTConfig, tokenizer: Any, vocab_size: int, wanted: int | None = None
) -> tuple[Rows, Dataset, str]:
    """Training and held-out sequences, and the kind of their rows, as of `load_rows`.

    A sequence has input_ids and labels, and seq_lengths where documents were put into one row.

    TRL's own packing is left to its trainer, in `arguments`; what is done here is taken out of them.

    wanted: training sequences that the run will use, when that is known; the rest of the text is not tokenized.

    Raises:
        RecipeError: when a row does not fit, and when either part gives no sequence.
    """
    train_rows, held_out_rows, kind = load_rows(recipe)
    encoder = Encoder(tokenizer, kind, vocab_size, recipe.append_eos, learned_of(recipe, kind))
    if "packing_strategy" not in recipe.training:
        arguments.packing_strategy = "wrapped" if kind == "text" else "bfd"
    read = _Reader(encoder, recipe, arguments)
    multiple: Any = arguments.pad_to_multiple_of
    if read.wraps and multiple and read.length % multiple:
        raise RecipeError(
            f"pad_to_multiple_of={multiple} fills packed rows of max_length={read.length} with padding that nothing "
            "marks, and the experts would choose it; leave it out, or set max_length to a multiple"
        )
    held_out = read.sequences(held_out_rows, "held-out", recipe.max_eval_sequences)
    if isinstance(train_rows, IterableDataset):
        read.sequences(train_rows, "training", 1)  # an endless stream must hold something
        seeds = (recipe.training.get(name) for name in ("data_seed", "seed"))
        seed = next((seed for seed in seeds if seed is not None), 42)
        train: Rows = read.stream(train_rows.shuffle(seed=seed, buffer_size=recipe.shuffle_buffer))
    else:
        train = read.sequences(train_rows, "training", wanted)
    if not read.is_packed_later:
        arguments.packing, arguments.max_length = False, None  # done
    return train, held_out, kind


class _Reader:
    """Makes sequences of rows; those that are packed by TRL afterwards are not packed yet."""

    def __init__(self, encoder: Encoder, recipe: Recipe, arguments: SFTConfig) -> None:
        self.encoder, self.recipe, self.arguments = encoder, recipe, arguments
        self.length = arguments.max_length or sys.maxsize
        self.wraps = bool(arguments.packing) and arguments.packing_strategy == "wrapped"
        self.is_packed_later = bool(arguments.packing) and not self.wraps
        # Documents that are packed piece by piece may be of any length.
        is_split = self.wraps or (self.is_packed_later and arguments.packing_strategy == "bfd_split")
        if is_split:
            self.finish: Any = partial(wrap, length=self.length) if self.wraps else None
        else:
            keeps_end = arguments.truncation_mode == "keep_end"
            self.finish = partial(fit, length=self.length, too_long=recipe.too_long, keeps_end=keeps_end)
        self.features = _features(*(["seq_lengths"] if self.wraps else []))

    def stream(self, rows: IterableDataset) -> IterableDataset:
        """Sequences, one after the other, as they are read."""
        found = rows.map(self.encoder, remove_columns=list(rows.column_names or []), features=_features())
        if self.finish is None:
            return found
        size = self._batch([len(row["input_ids"]) for row in found.take(100)]) if self.wraps else 1000
        return found.map(self.finish, batched=True, batch_size=size, features=self.features)

    def _batch(self, sizes: Any) -> int:
        """Documents that are packed together: some 64 rows of them, whose last one may stay unfilled."""
        return max(1000, 64 * self.length * len(sizes) // max(1, int(sum(sizes))))

    def sequences(self, rows: Rows, part: str, wanted: int | None) -> Dataset:
        """As many sequences as are wanted, where the rows give as many; before TRL's packing at least as many."""
        if isinstance(rows, IterableDataset):
            found = Dataset.from_list(list(self.stream(rows).take(wanted)))
        else:
            found = self._tokenized(rows, part, wanted)
        if not len(found):
            raise self._gives_nothing(rows, part)
        return found if wanted is None or self.is_packed_later else found.select(range(min(len(found), wanted)))

    def _gives_nothing(self, rows: Rows, part: str) -> RecipeError:
        """How much there is, and the nearest length that would give a sequence."""
        first = [self.encoder(row) for row in itertools.islice(rows, _LOOKED_AT)]
        batch = {name: [row[name] for row in first] for name in ("input_ids", "labels")}
        tokens = sum(map(len, batch["input_ids"]))
        nearest = next((length for length in self._other_lengths() if self._gives(batch, length)), None)
        of, have = "the first " * (len(first) == _LOOKED_AT), "has" if len(first) == 1 else "have"
        remedies = [f"max_length={nearest} gives some"] if nearest else []
        remedies += ["packing=false takes each row by itself"] if self.wraps and nearest else []
        remedies += ["or give more text" if remedies else "give more text"]
        if self.recipe.validation_dataset is None:
            remedies[-1] += ", or another validation_fraction"
        return RecipeError(
            f"dataset={self.recipe.dataset} gives no {part} sequence of max_length={self.arguments.max_length} tokens "
            f"with something to learn: {of}{number_of(len(first), f'{part} row')} {have} {number_of(tokens, 'token')}; "
            + ", ".join(remedies)
        )

    def _other_lengths(self) -> list[int]:
        """Powers of two, the nearest to max_length first: rows that are filled have to be shorter, others longer."""
        lengths = [2**n for n in range(1, 21)]
        return [n for n in lengths[::-1] if n < self.length] if self.wraps else [n for n in lengths if n > self.length]

    def _gives(self, batch: dict[str, list[list[int]]], length: int) -> bool:
        """Whether documents give a sequence of that length."""
        if self.wraps:
            return bool(wrap(batch, length)["input_ids"])
        cut = "drop" if self.recipe.too_long == "refuse" else self.recipe.too_long
        return bool(fit(batch, length, cut, self.arguments.truncation_mode == "keep_end")["input_ids"])

    def _tokenized(self, rows: Dataset, part: str, wanted: int | None) -> Dataset:
        """PART by PART, until there is enough."""
        parts: list[Dataset] = []
        end = too_long = count = lost = 0
        while end < len(rows) and (wanted is None or count < wanted):
            start, end = end, min(end + PART, len(rows))
            options = {"num_proc": self.arguments.dataset_num_proc, "desc": f"Tokenizing ({part})"}
            found = rows.select(range(start, end)).map(
                self.encoder, remove_columns=rows.column_names, features=_features(), **options
            )
            sizes = lengths_of(found)
            if self.finish is not None:
                options = {"batch_size": self._batch(sizes) if self.wraps else 1000, "desc": f"Fitting ({part})"}
                found = found.map(self.finish, batched=True, features=self.features, **options)
            parts.append(found)
            if not self.wraps:
                too_long += int((sizes > self.length).sum()) if self.finish is not None else 0
                lost += len(sizes) - len(found)
            count += int(sizes.sum() // self.length) if self.is_packed_later else len(found)
        if (too_long or lost) and part == "training":
            read = f"{end:,}" if end == len(rows) else f"the first {end:,}"
            fate = "" if self.recipe.too_long == "drop" else " and are cut"
            say(
                f"{too_long:,} of {read} training rows are longer than max_length={self.length}{fate}; {lost:,} are "
                "left out, too long or without anything to learn"
            )
        return datasets.concatenate_datasets(parts) if parts else Dataset.from_list([])


def lengths_of(rows: Dataset) -> Any:
    """Tokens of each row [N], without making lists of them."""
    return pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy()


def _features(*more: str) -> datasets.Features:
    """Said aloud, because a part without a single sequence has no types to read off."""
    return datasets.Features({name: datasets.List(datasets.Value("int64")) for name in ("input_ids", "labels", *more)})
