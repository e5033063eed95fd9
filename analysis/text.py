"""Text of any size as a stream of documents, and documents as batches of tokens; memory stays flat."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from .errors import AnalysisError

Batch = dict[str, Tensor]

DOCUMENT_SEPARATOR = "<|endoftext|>"
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_PIECE = 1 << 20  # characters read at once; a longer document is handed out in pieces of this size


HALF_A_PAIR = "half a surrogate pair (\\ud800 to \\udfff) is no text; mend the row, or leave it out"


def is_unicode(text: str) -> bool:
    """False with half of a surrogate pair, which JSON and a shell's arguments can hold and no tokenizer reads."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def read_documents(data: str, text_column: str = "text") -> Iterator[str]:
    """The documents of a file, or of every text file below a folder, in the order of their names.

    .txt and .md hold documents separated by <|endoftext|>, .jsonl and .parquet one in each row's text_column.

    Raises:
        AnalysisError: while iterating: nothing there, an empty file, no UTF-8 text, no such column.
    """
    for file in text_files(data):
        yield from documents_of(file, text_column)


def text_files(data: str) -> list[Path]:
    """The file itself, or every text file below a folder, in the order of their names.

    Raises:
        AnalysisError: when there is none.
    """
    path = Path(data).expanduser()
    if not path.exists():
        raise AnalysisError(f"data={data} does not exist; name a text file, or a folder of them")
    if path.is_file() and path.suffix not in SUFFIXES:
        raise AnalysisError(f"data={data} must be a folder or end in one of {', '.join(SUFFIXES)}")
    found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]
    if not found:
        raise AnalysisError(f"data={data} holds no file that ends in one of {', '.join(SUFFIXES)}")
    return found


def documents_of(path: Path, text_column: str) -> Iterator[str]:
    """The documents of one file; see `read_documents`."""
    with readable(path):
        if path.suffix == ".parquet":
            yield from _parquet(path, text_column)
        elif path.suffix == ".jsonl":
            yield from _jsonl(path, text_column)
        else:
            yield from _plain(path)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Says in one line what is wrong with a file that is read in the context.

    Raises:
        AnalysisError: of an empty file, and of one that is not what its name says.
    """
    if path.stat().st_size == 0:
        raise AnalysisError(f"data={path} is empty; leave it out, or give text")
    try:
        yield
    except (UnicodeDecodeError, pyarrow.ArrowException, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise AnalysisError(
            f"data={path} cannot be read as a {path.suffix} file ({reason}); leave it out, or give UTF-8 text"
        ) from error


def _plain(path: Path) -> Iterator[str]:
    rest = ""
    with path.open(encoding="utf-8-sig") as file:
        while piece := file.read(_PIECE):
            if "\0" in piece:
                raise AnalysisError(f"data={path} holds NUL bytes: it is no text; leave it out")
            *whole, rest = (rest + piece).split(DOCUMENT_SEPARATOR)
            yield from filter(None, map(str.strip, whole))
            if len(rest) >= _PIECE:
                # Cut at white space, and never inside what might be the separator.
                cut = max(rest.rfind(" "), rest.rfind("\n"), 0) or len(rest)
                yield rest[:cut]
                rest = rest[cut:]
    if rest.strip():
        yield rest.strip()


def _jsonl(path: Path, text_column: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            if isinstance(row, dict) and row.get(text_column, "") is None:
                continue  # as in .parquet: a row without text
            if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
                raise AnalysisError(f"data={path}, line {number}: no text in the field text_column={text_column}")
            if not is_unicode(row[text_column]):
                raise AnalysisError(f"data={path}, line {number}: {HALF_A_PAIR}")
            if row[text_column].strip():
                yield row[text_column]


def _parquet(path: Path, text_column: str) -> Iterator[str]:
    file = pyarrow.parquet.ParquetFile(path)
    if text_column not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise AnalysisError(f"data={path} has no column text_column={text_column}; it has {names}")
    cells = (batch.column(0).to_pylist() for batch in file.iter_batches(columns=[text_column], batch_size=64))
    for number, text in enumerate(itertools.chain.from_iterable(cells), start=1):
        if text is not None and not isinstance(text, str):
            raise AnalysisError(
                f"data={path}, row {number}: text_column={text_column} holds {type(text).__name__}, not text; name the "
                "column that does"
            )
        if text and text.strip():
            yield text


def windows(tokenizer: Any, documents: Iterator[str], length: int) -> Iterator[list[int]]:
    """The tokens of each document by itself, cut into windows of at most `length`; a lone token is left out."""
    for document in documents:
        ids = tokenizer(document, verbose=False)["input_ids"]
        for start in range(0, len(ids), length):
            window = ids[start : start + length]
            if len(window) > 1:
                yield window


def pad(rows: list[list[int]], padding: int) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, S], 0 where a row is over."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [padding] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }


def packed(sequences: Iterator[list[int]], length: int) -> Iterator[dict[str, list[int]]]:
    """Full rows of exactly `length` tokens, one sequence after the other; what does not fill a row at the end is left.

    position_ids begin at 0 with each sequence, and again where a row cuts one; Transformers' attention masks take a
    step back in position as a border, so that no sequence sees another. The first token there has the label -100.
    """
    row: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "labels": []}
    for sequence in sequences:
        rest = sequence
        while rest:
            part, rest = rest[: length - len(row["input_ids"])], rest[length - len(row["input_ids"]) :]
            row["input_ids"] += part
            row["position_ids"] += range(len(part))
            row["labels"] += [-100, *part[1:]]
            if len(row["input_ids"]) == length:
                yield row
                row = {name: [] for name in row}


def fixed_batches(rows: Iterator[dict[str, list[int]]], size: int) -> Iterator[Batch]:
    """Batches of exactly `size` rows [size, S]; rows that fill none at the end are left."""
    while len(chunk := list(itertools.islice(rows, size))) == size:
        yield {name: torch.tensor([row[name] for row in chunk]) for name in chunk[0]}
