"""What a model is evaluated on: documents, conversations, or prompts with completions, as rows of tokens.

Rows of a file are of the kind that its columns say, by the names that fine-tuning looks for, and what is predicted of
them is what fine-tuning learns: all of a document, what the assistant says, the completion.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow.parquet
import torch
from torch import Tensor

from .errors import AnalysisError
from .text import HALF_A_PAIR, documents_of, is_unicode, pad, readable, text_files, windows

# What columns of instructions and answers are called elsewhere.
_PROMPTS = ("prompt", "question", "instruction", "query", "input", "problem")
_ANSWERS = ("completion", "answer", "response", "output", "solution", "chosen")
_BESIDE = ("tools", "chat_template_kwargs")  # what a row may hold for its template

Document: TypeAlias = str | dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Columns of .jsonl and .parquet files; those that are named must be there, others are looked for in this order:
    messages (or conversations), prompt with completion, text."""

    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None

    def find(self, present: Iterable[str], where: str) -> dict[str, str]:
        """The columns to read, as {what it is: its name}: text; messages; or prompt and completion.

        Raises:
            AnalysisError: when there are none, saying what is there.
        """
        names = list(present)
        other = "conversations" if "conversations" in names and "messages" not in names else "messages"
        kinds = {
            "messages": {"messages": self.messages or other},
            "prompt": {"prompt": self.prompt or "prompt", "completion": self.completion or "completion"},
            "text": {"text": self.text or "text"},
        }
        named = [kind for kind, parts in kinds.items() if any(getattr(self, part) for part in parts)]
        for kind in named or kinds:
            if all(name in names for name in kinds[kind].values()):
                return kinds[kind]
        missing = kinds[named[0] if named else "text"]
        fields = " ".join(f"{part}_column={name}" for part, name in missing.items() if name not in names)
        hint = "conversations are read from messages, instructions from prompt with completion"
        pair = [next((name for name in words if name in names), None) for words in (_PROMPTS, _ANSWERS)]
        if not named and all(pair):
            hint = f"set prompt_column={pair[0]} completion_column={pair[1]}"
        raise AnalysisError(f"{where}: no text in the field {fields}; it has {', '.join(names) or 'none'}; {hint}")


def read_rows(data: str, columns: Columns) -> Iterator[Document]:
    """Documents as text, conversations and prompts as {"messages"} or {"prompt", "completion"}, file by file.

    Raises:
        AnalysisError: while iterating: nothing there, an empty file, no such column, rows that are no conversations.
    """
    for path in text_files(data):
        found = _columns_of(path, columns) if path.suffix in (".jsonl", ".parquet") else {"text": ""}
        yield from documents_of(path, found["text"]) if "text" in found else _chats(path, found)


def _columns_of(path: Path, columns: Columns) -> dict[str, str]:
    """By the schema, or the first row."""
    with readable(path):
        if path.suffix == ".parquet":
            return columns.find(pyarrow.parquet.read_schema(path).names, f"data={path}")
        for number, row in _json_rows(path):
            return columns.find(row, f"data={path}, line {number}")
    return {"text": columns.text or "text"}


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise AnalysisError(f"data={path}, line {number}: a row must be an object with named columns")
                yield number, row


def _parquet_rows(path: Path, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    file = pyarrow.parquet.ParquetFile(path)
    names = [name for name in names if name in file.schema_arrow.names]
    parts = file.iter_batches(columns=names, batch_size=64)
    yield from enumerate((row for part in parts for row in part.to_pylist()), start=1)


def _chats(path: Path, found: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Rows of the columns by the names of their kind; those without an answer are left out."""
    learned = "messages" if "messages" in found else "completion"
    with readable(path):
        rows = _json_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path, [*found.values(), *_BESIDE])
        for number, row in rows:
            chat = {part: row.get(name) for part, name in found.items()}
            if not chat[learned]:
                continue
            # As text and not as the file has it: a half of a surrogate pair is written \\ud800 there.
            if not is_unicode(json.dumps(chat, ensure_ascii=False, default=str)):
                raise AnalysisError(f"data={path}, line {number}: {HALF_A_PAIR}")
            for part, value in chat.items():
                if not (isinstance(value, list) or (part != "messages" and isinstance(value, str | None))):
                    raise AnalysisError(
                        f"data={path}, line {number}: {found[part]} holds {type(value).__name__}, not messages"
                        f"{'' if part == 'messages' else ' or text'}; name the columns that do"
                    )
            yield chat | {name: row[name] for name in _BESIDE if row.get(name)}


@dataclass(frozen=True)
class Row:
    """Tokens that a model sees together. is_learned: of each, whether its prediction counts; the first is never
    predicted. document: the number of the document or conversation that it is of. is_cut: it was longer than rows may
    be."""

    ids: list[int]
    is_learned: list[bool]
    document: int
    is_cut: bool = False

    def cut(self, length: int) -> "Row":
        """Its first tokens."""
        return (
            self
            if len(self.ids) <= length
            else replace(self, ids=self.ids[:length], is_learned=self.is_learned[:length])
        )

    @property
    def predicts(self) -> bool:
        return any(self.is_learned[1:])


def tokens_of(
    tokenizer: Any, documents: Iterator[Document], window: int, longest: int, remedy: str | None = None
) -> Iterator[Row]:
    """Documents in windows, conversations whole.

    Args:
        window: tokens of a window.
        longest: tokens of a conversation; a longer one is cut.
        remedy: what to do about the chat template, `loading.template_remedy`.
    """
    encoders: dict[str, Any] = {}
    for number, document in enumerate(documents):
        if isinstance(document, str):
            for ids in windows(tokenizer, iter([document]), window):
                yield Row(ids, [True] * len(ids), number)
            continue
        row = _encoded(document, tokenizer, encoders, number, remedy)
        row = replace(row.cut(longest), is_cut=len(row.ids) > longest)
        if row.predicts:
            yield row


def _encoded(
    document: dict[str, Any], tokenizer: Any, encoders: dict[str, Any], number: int, remedy: str | None
) -> Row:
    """A conversation, or a prompt with its completion, by the rule of fine-tuning; encoders: by kind, made once."""
    from ecmoe.encoding import IGNORE, Encoder, EncodingError  # it takes TRL's templates, seconds to import

    kind = "messages" if "messages" in document else "prompt"
    try:
        if kind not in encoders:
            encoders[kind] = Encoder(tokenizer, kind, remedy=remedy)
        found = encoders[kind](document)
    except EncodingError as error:
        raise AnalysisError(str(error)) from error
    return Row(found["input_ids"], [label != IGNORE for label in found["labels"]], number)


def at_most(rows: Iterator[Row], max_tokens: int | None) -> Iterator[Row]:
    """The rows up to that many tokens, the last one cut."""
    rest = max_tokens
    for row in rows:
        row = row if rest is None else row.cut(rest)
        if row.predicts:
            yield row
        if rest is not None:
            rest -= len(row.ids)
            if rest < 2:
                return


@dataclass(frozen=True)
class Batch:
    """inputs: input_ids and attention_mask [B, S]. is_predicted [B, S - 1] bool, of the tokens after the first.
    documents: of each row. num_cut: rows that were longer."""

    inputs: dict[str, Tensor]
    is_predicted: Tensor
    documents: list[int]
    num_cut: int

    @property
    def tokens(self) -> int:
        return int(self.inputs["attention_mask"].sum())


def batches(rows: Iterator[Row], pool: int, padding: int) -> Iterator[Batch]:
    """Batches of some `pool` tokens, padded on the right."""
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if sum(len(row.ids) for row in held) >= pool:
            yield as_batch(held, padding)
            held = []
    if held:
        yield as_batch(held, padding)


def as_batch(rows: list[Row], padding: int) -> Batch:
    """The rows side by side."""
    inputs = pad([row.ids for row in rows], padding)
    longest = inputs["input_ids"].shape[1]
    learned = [row.is_learned + [False] * (longest - len(row.ids)) for row in rows]
    num_cut = sum(row.is_cut for row in rows)
    return Batch(inputs, torch.tensor(learned)[:, 1:], [row.document for row in rows], num_cut)


def first_tokens(rows: Iterator[Row], tokens: int) -> tuple[list[Row], Iterator[Row]]:
    """The first rows with that many tokens, or all, and the rows with these again at their beginning."""
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if sum(len(row.ids) for row in held) >= tokens:
            break
    return held, itertools.chain(held, rows)
