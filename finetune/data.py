"""From rows to training and held-out sequences, and from sequences to batches."""

from typing import Any

import datasets
import torch
from datasets import Dataset, IterableDataset

from .encode import IGNORE, Encoder
from .recipe import Recipe, RecipeError
from .sources import Rows, load_rows

PART = 10_000  # rows tokenized at a time


def prepare(
    recipe: Recipe, tokenizer: Any, vocab_size: int, train_sequences: int | None = None
) -> tuple[Rows, Dataset]:
    """Training and held-out sequences: input_ids, labels, and position_ids where documents are packed.

    train_sequences: as many as the run will use, when that is known; the rest of the text is not tokenized.

    Raises:
        RecipeError: when either part does not fill one sequence.
    """
    train_rows, held_out_rows, kind = load_rows(recipe)
    encoder = Encoder(recipe, tokenizer, kind, vocab_size)
    held_out = _encode(held_out_rows, encoder, "held-out", recipe.max_eval_sequences)
    if isinstance(train_rows, IterableDataset):
        seed = recipe.training.get("data_seed") or recipe.training.get("seed", 42)
        shuffled = train_rows.shuffle(seed=seed, buffer_size=recipe.shuffle_buffer)
        return shuffled.map(encoder, batched=True, remove_columns=list(shuffled.column_names)), held_out
    return _encode(train_rows, encoder, "training", train_sequences), held_out


def _encode(rows: Rows, encoder: Encoder, part: str, wanted: int | None) -> Dataset:
    """The sequences of these rows, at most `wanted`."""
    if isinstance(rows, IterableDataset):
        stream = rows.map(encoder, batched=True, remove_columns=list(rows.column_names))
        sequences = Dataset.from_list(list(stream.take(wanted)))
    else:
        parts: list[Dataset] = []
        for start in range(0, len(rows), PART):
            block = rows.select(range(start, min(start + PART, len(rows))))
            parts.append(
                block.map(encoder, batched=True, remove_columns=block.column_names, desc=f"Tokenizing ({part})")
            )
            if wanted is not None and sum(map(len, parts)) >= wanted:
                break
        sequences = datasets.concatenate_datasets(parts) if parts else Dataset.from_list([])
    if not len(sequences):
        raise RecipeError(
            f"dataset={encoder.recipe.dataset} gives no {part} sequence of "
            f"sequence_length={encoder.recipe.sequence_length} tokens; give more text, shorter sequences, or another "
            "validation_fraction"
        )
    return sequences if wanted is None else sequences.select(range(min(len(sequences), wanted)))


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
