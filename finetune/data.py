"""From rows to training and held-out sequences, and from sequences to batches."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from datasets import Dataset, IterableDataset

from .encode import IGNORE, Encoder, stop_token
from .errors import RecipeError
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


def prepare(
    recipe: Recipe, tokenizer: Any, vocab_size: int, train_sequences: int | None = None
) -> tuple[Dataset | Endless, Dataset]:
    """Training and held-out sequences: input_ids, labels, and position_ids where documents are packed.

    train_sequences: as many as the run will use, when that is known; the rest of the text is not tokenized.

    Raises:
        RecipeError: when either part does not fill one sequence.
    """
    train_rows, held_out_rows, kind = load_rows(recipe)
    encoder = Encoder(recipe, tokenizer, kind, vocab_size)
    stop, end = stop_token(tokenizer) if encoder.has_template else (None, "")
    if kind != "text" and encoder.has_template and stop is None:
        ends = (
            f"ends an answer with {end!r}, which is no token of its own" if end else "does not show what ends an answer"
        )
        say(
            f"chat_template {ends}: generate and pipeline will go on after it; end it with the tokenizer's eos_token, "
            "as chat_template=chatml does"
        )
    held_out = _encode(held_out_rows, encoder, recipe, "held-out", recipe.max_eval_sequences)
    if not isinstance(train_rows, IterableDataset):
        return _encode(train_rows, encoder, recipe, "training", train_sequences), held_out
    _encode(train_rows, encoder, recipe, "training", 1)  # an endless stream must hold something
    seeds = (recipe.training.get(name) for name in ("data_seed", "seed"))
    seed = next((seed for seed in seeds if seed is not None), 42)
    return Endless(_mapped(train_rows.shuffle(seed=seed, buffer_size=recipe.shuffle_buffer), encoder)), held_out


def _encode(rows: Rows, encoder: Encoder, recipe: Recipe, part: str, wanted: int | None) -> Dataset:
    """The sequences of these rows, at most `wanted`."""
    if isinstance(rows, IterableDataset):
        sequences = Dataset.from_list(list(_mapped(rows, encoder).take(wanted)))
    else:
        parts: list[Dataset] = []
        too_long = end = 0
        for start in range(0, len(rows), PART):
            end = min(start + PART, len(rows))
            found, its_too_long = _counted(rows.select(range(start, end)), encoder, f"Tokenizing ({part})")
            parts.append(found)
            too_long += its_too_long
            if wanted is not None and sum(map(len, parts)) >= wanted:
                break
        if too_long and part == "training":
            read = f"{end:,}" if end == len(rows) else f"the first {end:,}"
            say(
                f"{too_long:,} of {read} training rows are longer than sequence_length={recipe.sequence_length} and "
                f"are {'left out' if recipe.too_long == 'drop' else 'cut'} (too_long={recipe.too_long})"
            )
        sequences = datasets.concatenate_datasets(parts) if parts else Dataset.from_list([])
    if not len(sequences):
        raise RecipeError(
            f"dataset={recipe.dataset} gives no {part} sequence of sequence_length={recipe.sequence_length} tokens; "
            "give more text, shorter sequences, or another validation_fraction"
        )
    return sequences if wanted is None else sequences.select(range(min(len(sequences), wanted)))


def _counted(rows: Dataset, encoder: Encoder, desc: str) -> tuple[Dataset, int]:
    """The sequences of these rows, and how many rows were too long; packed ones never are."""
    if encoder.is_packed:
        return _mapped(rows, encoder, desc=desc), 0
    marked = _mapped(rows, encoder, ["is_kept", "is_too_long"], desc=desc)
    kept = [number for number, is_kept in enumerate(marked["is_kept"]) if is_kept]
    return marked.select(kept).remove_columns(["is_kept", "is_too_long"]), sum(marked["is_too_long"])


def _mapped(rows: Any, encoder: Encoder, marks: Sequence[str] = (), **options: Any) -> Any:
    names = ["input_ids", "labels", *(["position_ids"] if encoder.is_packed else [])]
    # Said aloud, because a part without a single sequence has no types to read off.
    features = datasets.Features({name: datasets.List(datasets.Value("int64")) for name in names})
    features |= {name: datasets.Value("bool") for name in marks}
    encode = encoder.mark if marks else encoder
    return rows.map(encode, batched=True, remove_columns=list(rows.column_names), features=features, **options)


class Collator:
    """A batch of sequences: as they are where all are equally long and packed, padded on the right elsewhere."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """input_ids and labels [B, S], with position_ids of packed documents or the attention_mask of padding."""
        if "position_ids" in rows[0]:
            return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        longest = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in rows:
            missing = longest - len(row["input_ids"])
            batch["input_ids"].append(row["input_ids"] + [self.pad_token_id] * missing)
            batch["labels"].append(row["labels"] + [IGNORE] * missing)
            batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * missing)
        return {name: torch.tensor(values) for name, values in batch.items()}
