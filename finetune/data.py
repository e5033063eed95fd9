"""Text to packed sequences: documents, held-out split, tokens, windows."""

import difflib
import itertools
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from .recipe import Recipe, RecipeError

DOCUMENT_SEPARATOR = "<|endoftext|>"
SPLIT_SEED = 0  # not the recipe's: every seed is judged on the same documents


def load_documents(recipe: Recipe) -> Dataset:
    """The documents of a recipe in one column, `text`.

    Raises:
        RecipeError: when the dataset cannot be found or read, is empty, or lacks the text column.
    """
    path = Path(recipe.dataset).expanduser()
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
    documents = documents.select_columns([recipe.text_column])
    if recipe.text_column != "text":
        documents = documents.rename_column(recipe.text_column, "text")
    if len(documents) < 2:
        raise RecipeError(
            f"dataset={recipe.dataset} holds {len(documents)} documents; at least two are needed, one of them held out"
        )
    return documents


def prepare(recipe: Recipe, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """Training and held-out sequences, each a row of `sequence_length` input_ids and labels.

    Raises:
        RecipeError: when either part does not fill one sequence.
    """
    split = load_documents(recipe).train_test_split(test_size=recipe.validation_fraction, seed=SPLIT_SEED)
    train, held_out = (_pack(split[name], recipe, tokenizer, name) for name in ("train", "test"))
    return train, held_out.select(range(min(len(held_out), recipe.max_eval_sequences)))


def _pack(documents: Dataset, recipe: Recipe, tokenizer: Any, name: str) -> Dataset:
    """Documents end to end, cut into sequences; what does not fill the last one is left out."""
    length = recipe.sequence_length
    eos = [tokenizer.eos_token_id] if recipe.append_eos and tokenizer.eos_token_id is not None else []

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [ids + eos for ids in tokenizer(batch["text"], verbose=False)["input_ids"]]}

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        ids = list(itertools.chain.from_iterable(batch["input_ids"]))
        rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        return {"input_ids": rows, "labels": rows}

    tokens = documents.map(tokenize, batched=True, remove_columns=["text"], desc=f"Tokenizing ({name})")
    # One batch would hold everything; of each thousand documents at most one part of a sequence is lost.
    packed = tokens.map(cut, batched=True, remove_columns=["input_ids"], desc=f"Packing ({name})")
    if not len(packed):
        part = "training" if name == "train" else "held-out"
        raise RecipeError(
            f"dataset={recipe.dataset} gives no {part} sequence of sequence_length={length} tokens; "
            "give more text, shorter sequences, or another validation_fraction"
        )
    return packed
