"""Text for calibration and verification: the user's, or a sample of several kinds."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling_ecmoe.batches_ecmoe import is_conversation, plain_conversation, token_ids

from .checkpoints.source import Source
from .errors import ConversionError
from .sample import SHARES, sample_documents

OWN_TEXT = "the package's sample of several kinds of text"  # what a record says where there was no file
GIVEN = "text"  # the kind of all text of a file
DOCUMENT_SEPARATOR = "<|endoftext|>"
CALIBRATION_TOKENS = 16_384
VERIFICATION_TOKENS = 4_096
WINDOW = 256  # tokens; shorter where the model's context is
BATCH = 16  # windows; 4,096 tokens are one routing pool
VERIFICATION_BATCH = 4  # windows whose logits of two models are held at once


@dataclass(frozen=True)
class Texts:
    """What the models are run on.

    calibration: token ids [W, L], all kinds of text mixed.
    verification: token ids [W, L] of each kind, of other documents.
    tokens: of the calibration, by kind.
    """

    tokenizer: Any
    calibration: Tensor
    verification: dict[str, Tensor]
    tokens: dict[str, int]

    @property
    def num_verification_tokens(self) -> int:
        return sum(windows.numel() for windows in self.verification.values())


def shown(text: str) -> str:
    """How a card names a text: a file without its folder, which says nothing elsewhere."""
    return text if text == OWN_TEXT else f"`{Path(text).name}`"


def text_name(text: str, texts: Texts) -> str:
    """What a config says of the text its thresholds come from: no path of this machine, which says nothing elsewhere.

    text: the file, or OWN_TEXT.
    """
    name = f"{text} ({', '.join(texts.tokens)})" if text == OWN_TEXT else Path(text).name
    return f"{texts.calibration.numel():,} tokens of {name}"


def read_documents(path: Path) -> list[Any]:
    """Documents of a UTF-8 text file, split at <|endoftext|>; of a .jsonl file the text or messages of each row.

    Raises:
        ConversionError: when the file is missing, empty or no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"text={path} cannot be read as UTF-8 text ({error})") from error
    if path.suffix == ".jsonl":
        lines = text.split("\n")  # alone: other line separators may stand inside a row's text
        documents = [_document_of(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        documents = [part.strip() for part in text.split(DOCUMENT_SEPARATOR)]
    documents = [document for document in documents if document]
    if not documents:
        raise ConversionError(f"text={path} is empty; give text the model is meant for, or leave it out")
    return documents


def _document_of(path: Path, number: int, line: str) -> Any:
    """What a row holds: text, or the messages of a conversation."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConversionError(f"text={path}, line {number} is no JSON ({error}); give one object a line") from error
    row = row if isinstance(row, dict) else {}
    if is_conversation(row.get("messages")):
        return row["messages"]
    if isinstance(row.get("text"), str):
        return row["text"].strip()
    if "text" in row and row["text"] is None:  # a row without text
        return ""
    raise ConversionError(
        f"text={path}, line {number} has neither text nor messages with role and content; rename its columns to those"
    )


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


def read_texts(
    source: Source, config: Any, text: str | None, seed: int, calibration_tokens: int | None = None
) -> Texts:
    """The source's tokenizer, and windows of the user's text or of the sample of several kinds.

    calibration_tokens: about so many, whole windows; None is CALIBRATION_TOKENS.

    Raises:
        ConversionError: when there is no tokenizer, or too little text, or the two do not fit the model.
    """
    tokenizer = source.tokenizer()
    length = min(WINDOW, config.max_position_embeddings)
    if length < 2:
        raise ConversionError(f"max_position_embeddings={length} in config.json is too short to run the model on text")
    sizes = VERIFICATION_TOKENS // length, max(1, (calibration_tokens or CALIBRATION_TOKENS) // length)
    if text is None:
        held_out, rest = sample_of_kinds(tokenizer, length, sizes, seed)
    else:
        documents = read_documents(Path(text).expanduser())
        windows = sample_windows(tokenizer, documents, length, sum(sizes), seed)
        last = max(1, len(windows) * sizes[0] // sum(sizes))
        held_out, rest = {GIVEN: windows[-last:]}, {GIVEN: windows[:-last]}
    calibration = torch.cat(list(rest.values()))
    if len(rest) > 1:  # every routing pool has something of each kind
        calibration = calibration[torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed))]
    largest = max(int(windows.max()) for windows in (calibration, *held_out.values()))
    if largest >= config.vocab_size:
        raise ConversionError(
            f"the tokenizer of source={source.source} makes token {largest}, beyond vocab_size={config.vocab_size}; "
            "they do not belong together"
        )
    return Texts(tokenizer, calibration, held_out, {kind: windows.numel() for kind, windows in rest.items()})


def sample_windows(tokenizer: Any, documents: list[Any], length: int, num_windows: int, seed: int) -> Tensor:
    """[num_windows or fewer, length] token ids: the documents in a seeded order, end to end, cut into windows.

    Raises:
        ConversionError: when the tokenizer refuses a document, and when there is not even one window for calibration
            and one for verification.
    """
    ids: list[int] = []
    for document in _shuffled(documents, seed):
        try:
            ids.extend(token_ids(tokenizer, document))
        except Exception as error:  # tokenizers raises bare ones, of a word that a vocabulary without [UNK] lacks
            shown = document if isinstance(document, str) else plain_conversation(document)
            raise ConversionError(
                f"the tokenizer refuses text={shown[:40]!r}... ({error}); give text that it knows"
            ) from error
        if len(ids) >= num_windows * length:
            break
    complete = min(len(ids) // length, num_windows)
    if complete < 2:
        raise ConversionError(f"text holds {len(ids)} tokens; calibration and verification need at least {2 * length}")
    return torch.tensor(ids[: complete * length]).view(complete, length)


def sample_of_kinds(
    tokenizer: Any, length: int, sizes: tuple[int, int], seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Windows [W, length] of each kind of the sample, to verify on and to calibrate on; no document is in both.

    sizes: windows of all kinds together, of each of the two. What one kind lacks the others make up.

    Raises:
        ConversionError: when the tokenizer knows too little of the sample.
    """
    ids = {kind: _known(tokenizer, _shuffled(found, seed)) for kind, found in sample_documents().items()}
    parts: list[dict[str, Tensor]] = []
    for size in sizes:
        taken = {kind: _take(ids[kind], wanted, length) for kind, wanted in _shares(size).items()}
        for kind in sorted(ids, key=lambda kind: -sum(map(len, ids[kind]))):  # where most is left
            missing = size - sum(map(len, taken.values()))
            taken[kind] = torch.cat([taken[kind], _take(ids[kind], missing, length)])
        parts.append({kind: windows for kind, windows in taken.items() if len(windows)})
    if not all(parts):
        raise ConversionError(
            "the tokenizer refuses the package's sample of text; give text that it knows (--text FILE)"
        )
    return parts[0], parts[1]


def _shares(size: int) -> dict[str, int]:
    """So many windows divided among the kinds by their shares; the largest remainders are rounded up."""
    exact = {kind: size * share / sum(SHARES.values()) for kind, share in SHARES.items()}
    found = {kind: int(value) for kind, value in exact.items()}
    for kind in sorted(exact, key=lambda kind: found[kind] - exact[kind])[: size - sum(found.values())]:
        found[kind] += 1
    return found


def _take(documents: list[list[int]], wanted: int, length: int) -> Tensor:
    """As many windows as wanted, or fewer, of the first documents, which are taken out of the list."""
    ids: list[int] = []
    while documents and len(ids) < wanted * length:
        ids += documents.pop(0)
    complete = min(len(ids) // length, wanted)
    return torch.tensor(ids[: complete * length], dtype=torch.int64).view(complete, length)


def _known(tokenizer: Any, documents: list[Any]) -> list[list[int]]:
    """The tokens of the documents that the tokenizer takes; of a conversation that its template refuses, as text."""
    found = []
    for document in documents:
        for form in [document] if isinstance(document, str) else [document, plain_conversation(document)]:
            try:
                found.append(token_ids(tokenizer, form))
                break
            except Exception:  # a word that a vocabulary without [UNK] lacks, or a role
                continue
    return found


def _shuffled(documents: list[Any], seed: int) -> list[Any]:
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    return [documents[number] for number in order]
