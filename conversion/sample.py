"""Text for calibration and verification: the user's, or a little English that every CPython carries."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from .errors import ConversionError
from .source import Source

OWN_TEXT = "pydoc_data.topics"  # what a record calls the help topics, where there was no file
DOCUMENT_SEPARATOR = "<|endoftext|>"


def read_documents(path: Path | None) -> list[str]:
    """Documents of a UTF-8 text file, split at <|endoftext|>; without a file, Python's own help topics.

    Raises:
        ConversionError: when the file is missing, empty or no text.
    """
    if path is None:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"text={path} cannot be read as UTF-8 text ({error})") from error
    documents = [part.strip() for part in text.split(DOCUMENT_SEPARATOR)]
    documents = [document for document in documents if document]
    if not documents:
        raise ConversionError(f"text={path} is empty; give text the model is meant for, or leave it out")
    return documents


def load_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(
            f"source={folder} has no tokenizer that loads, and calibration needs one: {reason}"
        ) from error


def check_same_tokenizer(first: Source, other: Source) -> None:
    """Checkpoints that are mixed must mean the same by every token id.

    Raises:
        ConversionError: when their vocabularies differ.
    """
    ours, theirs = (load_tokenizer(source.folder).get_vocab() for source in (first, other))
    if ours != theirs:
        token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise ConversionError(
            f"init=mix needs checkpoints of one tokenizer: token {token!r} is {ours.get(token)} in {first.source} and "
            f"{theirs.get(token)} in {other.source}"
        )


def sample_windows(tokenizer: Any, documents: list[str], length: int, num_windows: int, seed: int) -> Tensor:
    """[num_windows or fewer, length] token ids: the documents in a seeded order, end to end, cut into windows.

    Raises:
        ConversionError: when there is not even one window for calibration and one for verification.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    ids: list[int] = []
    for number in order:
        ids.extend(tokenizer(documents[number], verbose=False)["input_ids"])
        if len(ids) >= num_windows * length:
            break
    complete = min(len(ids) // length, num_windows)
    if complete < 2:
        raise ConversionError(f"text holds {len(ids)} tokens; calibration and verification need at least {2 * length}")
    return torch.tensor(ids[: complete * length]).view(complete, length)
