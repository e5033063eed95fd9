"""Text for calibration and verification: the user's, or a little English that every CPython carries."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints.source import Source
from .errors import ConversionError

OWN_TEXT = "pydoc_data.topics"  # what a record calls the help topics, where there was no file
DOCUMENT_SEPARATOR = "<|endoftext|>"
CALIBRATION_TOKENS = 16_384
VERIFICATION_TOKENS = 4_096
WINDOW = 256  # tokens; shorter where the model's context is
BATCH = 16  # windows; 4,096 tokens are one routing pool
VERIFICATION_BATCH = 4  # windows whose logits of two models are held at once


@dataclass(frozen=True)
class Texts:
    """What the models are run on: token ids [W, L] of text to calibrate on and of other text to verify on."""

    tokenizer: Any
    calibration: Tensor
    verification: Tensor


def read_documents(path: Path | None) -> list[str]:
    """Documents of a UTF-8 text file, split at <|endoftext|>; without a file, Python's own help topics.

    Raises:
        ConversionError: when the file is missing, empty or no text.
    """
    if path is None:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"text={path} cannot be read as UTF-8 text ({error})") from error
    documents = [part.strip() for part in text.split(DOCUMENT_SEPARATOR)]
    documents = [document for document in documents if document]
    if not documents:
        raise ConversionError(f"text={path} is empty; give text the model is meant for, or leave it out")
    return documents


def check_same_tokenizer(first: Source, other: Source) -> None:
    """Checkpoints that are mixed must mean the same by every token id.

    Raises:
        ConversionError: when their vocabularies differ.
    """
    ours, theirs = (source.tokenizer().get_vocab() for source in (first, other))
    if ours != theirs:
        token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise ConversionError(
            f"init=mix needs checkpoints of one tokenizer: token {token!r} is {ours.get(token)} in {first.source} and "
            f"{theirs.get(token)} in {other.source}"
        )


def sample_windows(tokenizer: Any, documents: list[str], length: int, num_windows: int, seed: int) -> Tensor:
    """[num_windows or fewer, length] token ids: the documents in a seeded order, end to end, cut into windows.

    Raises:
        ConversionError: when the tokenizer refuses a document, and when there is not even one window for calibration
            and one for verification.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    ids: list[int] = []
    for number in order:
        try:
            ids.extend(tokenizer(documents[number], verbose=False)["input_ids"])
        except Exception as error:  # tokenizers raises bare ones, of a word that a vocabulary without [UNK] lacks
            raise ConversionError(
                f"the tokenizer refuses text={documents[number][:40]!r}... ({error}); give text that it knows"
            ) from error
        if len(ids) >= num_windows * length:
            break
    complete = min(len(ids) // length, num_windows)
    if complete < 2:
        raise ConversionError(f"text holds {len(ids)} tokens; calibration and verification need at least {2 * length}")
    return torch.tensor(ids[: complete * length]).view(complete, length)


def read_texts(source: Source, config: Any, text: str | None, seed: int) -> Texts:
    """The source's tokenizer, and windows of the user's text or of Python's own.

    Raises:
        ConversionError: when there is no tokenizer, or too little text, or the two do not fit the model.
    """
    tokenizer = source.tokenizer()
    length = min(WINDOW, config.max_position_embeddings)
    if length < 2:
        raise ConversionError(f"max_position_embeddings={length} in config.json is too short to run the model on text")
    wanted = (CALIBRATION_TOKENS + VERIFICATION_TOKENS) // length
    documents = read_documents(Path(text).expanduser() if text else None)
    windows = sample_windows(tokenizer, documents, length, wanted, seed)
    if int(windows.max()) >= config.vocab_size:
        raise ConversionError(
            f"the tokenizer of source={source.source} makes token {int(windows.max())}, beyond "
            f"vocab_size={config.vocab_size}; they do not belong together"
        )
    held_out = max(1, len(windows) * VERIFICATION_TOKENS // (CALIBRATION_TOKENS + VERIFICATION_TOKENS))
    return Texts(tokenizer, windows[:-held_out], windows[-held_out:])
