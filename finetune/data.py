"""Text to packed sequences: documents, held-out split, tokens, windows."""

import difflib
import itertools
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset

from .recipe import Recipe, RecipeError

DOCUMENT_SEPARATOR = "<|endoftext|>"
PART = 10_000  # documents tokenized at a time
SPLIT_SEED = 0  # not the recipe's: every seed is judged on the same documents


def load_documents(recipe: Recipe) -> Dataset:
    """The documents of a recipe in one column, `text`.

    Raises:
        RecipeError: when the dataset cannot be found or read, is empty, or lacks the text column.
    """
    path = Path(recipe.dataset).expanduser()
    looks_local = path.is_absolute() or recipe.dataset.startswith((".", "~"))
    if looks_local and not path.exists():
        raise RecipeError(f"dataset={recipe.dataset} does not exist")
    try:
        if path.suffix == ".txt":
            parts = (part.strip() for part in path.read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR))
            documents = Dataset.from_dict({recipe.text_column: [part for part in parts if part]})
        elif path.suffix in (".json", ".jsonl", ".parquet"):
            if not path.is_file():
                raise FileNotFoundError("no such file")
            kind = "parquet" if path.suffix == ".parquet" else "json"
            documents = datasets.load_dataset(kind, data_files=str(path), split="train")
        elif path.exists():
            raise RecipeError(f"dataset={recipe.dataset} must be a .txt, .jsonl or .parquet file or a Hub dataset id")
        else:
            documents = datasets.load_dataset(recipe.dataset, recipe.dataset_config, split=recipe.dataset_split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, RecipeError):
            raise
        reason = " ".join(str(error).split())
        raise RecipeError(f"dataset={recipe.dataset} cannot be read: {reason}") from error
    if recipe.text_column not in documents.column_names:
        nearest = difflib.get_close_matches(recipe.text_column, documents.column_names, n=1, cutoff=0.0)
        raise RecipeError(
            f"text_column={recipe.text_column} is not in dataset={recipe.dataset}, which has "
            f"{', '.join(documents.column_names)}; did you mean {nearest[0]}?"
        )
    if documents.features[recipe.text_column] not in (datasets.Value("string"), datasets.Value("large_string")):
        kind = documents.features[recipe.text_column]
        raise RecipeError(f"text_column={recipe.text_column} holds {kind}, not text; name the column that holds text")
    documents = documents.select_columns([recipe.text_column]).filter(
        lambda batch: [bool(text and text.strip()) for text in batch[recipe.text_column]],
        batched=True,
        desc="Leaving out empty documents",
    )
    if recipe.text_column != "text":
        documents = documents.rename_column(recipe.text_column, "text")
    if len(documents) < 2:
        raise RecipeError(
            f"dataset={recipe.dataset} holds {len(documents)} documents; at least two are needed, one of them held out"
        )
    return documents


def prepare(recipe: Recipe, tokenizer: Any, train_sequences: int | None = None) -> tuple[Dataset, Dataset]:
    """Training and held-out sequences, each a row of `sequence_length` input_ids.

    train_sequences: as many as the run will use, when that is known; the rest of the text is not tokenized.

    Raises:
        RecipeError: when either part does not fill one sequence.
    """
    documents = load_documents(recipe)
    try:
        split = documents.train_test_split(test_size=recipe.validation_fraction, seed=SPLIT_SEED)
    except ValueError as error:
        raise RecipeError(
            f"validation_fraction={recipe.validation_fraction} leaves nothing to learn from or nothing to hold out of "
            f"{len(documents)} documents"
        ) from error
    train = _pack(split["train"], recipe, tokenizer, "train", train_sequences)
    return train, _pack(split["test"], recipe, tokenizer, "test", recipe.max_eval_sequences)


def _pack(documents: Dataset, recipe: Recipe, tokenizer: Any, name: str, wanted: int | None) -> Dataset:
    """Documents end to end, cut into sequences, at most `wanted`; what does not fill a part's last one is left out."""
    length = recipe.sequence_length
    eos = [tokenizer.eos_token_id] if recipe.append_eos and tokenizer.eos_token_id is not None else []

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [ids + eos for ids in tokenizer(batch["text"], verbose=False)["input_ids"]]}

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        ids = list(itertools.chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]}

    parts: list[Dataset] = []
    for start in range(0, len(documents), PART):
        part = documents.select(range(start, min(start + PART, len(documents))))
        tokens = part.map(tokenize, batched=True, remove_columns=["text"], desc=f"Tokenizing ({name})")
        parts.append(tokens.map(cut, batched=True, desc=f"Packing ({name})"))
        if wanted is not None and sum(map(len, parts)) >= wanted:
            break
    packed = datasets.concatenate_datasets(parts)
    if not len(packed):
        part_name = "training" if name == "train" else "held-out"
        raise RecipeError(
            f"dataset={recipe.dataset} gives no {part_name} sequence of sequence_length={length} tokens; "
            "give more text, shorter sequences, or another validation_fraction"
        )
    return packed if wanted is None else packed.select(range(min(len(packed), wanted)))


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of sequences without padding; every token is a label."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}
