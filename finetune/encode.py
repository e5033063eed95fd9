"""Rows of tokens as training takes them: encoded, cut to length, packed."""

from itertools import accumulate
from typing import Any

from ecmoe.encoding import IGNORE, EncodingError, Sequence
from ecmoe.encoding import Encoder as RowEncoder

from .errors import RecipeError


class Encoder(RowEncoder):
    """As `ecmoe.encoding.Encoder`, whose refusals are a recipe's.

    It holds what it depends on and nothing else of the recipe, so that `datasets` finds its cached sequences again.
    """

    remedy = "name a Jinja file in chat_template_path"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except EncodingError as error:
            raise RecipeError(str(error)) from error

    def __call__(self, row: Any) -> Sequence:
        """input_ids and labels, IGNORE where nothing is learned."""
        try:
            return super().__call__(row)
        except EncodingError as error:
            raise RecipeError(str(error)) from error


def stop_token(tokenizer: Any) -> tuple[int | None, str]:
    """The token that ends an answer in the tokenizer's chat template, and how it is written; None where it is no token
    of its own, so that `generate` cannot stop at it."""
    answer = "An answer."
    for content in (answer, [{"type": "text", "text": answer}]):  # some templates take parts alone
        talk = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": content}]
        try:
            _, found, end = tokenizer.apply_chat_template(talk, tokenize=False).rpartition(answer)
        except Exception:  # Jinja's own errors; the rows will say it
            continue
        if found and end:
            break
    else:  # a template that rewrites it, or writes nothing after it
        return None, ""
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    known = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        known.discard(tokenizer.bos_token_id)  # it begins the next text
    # blank ones, as runs of spaces or line ends, stand inside answers too
    return next((token for token in ids if token in known and tokenizer.decode([token]).strip()), None), end


def fit(batch: dict[str, list[list[int]]], length: int, too_long: str, keeps_end: bool) -> dict[str, list[list[int]]]:
    """The rows of a batch within `length` tokens, cut or left out, and those left out of which nothing is learned.

    Raises:
        RecipeError: of a row that is longer, where too_long is "refuse".
    """
    kept: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    part = slice(-length, None) if keeps_end else slice(length)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        if len(ids) > length and too_long == "refuse":
            raise RecipeError(
                f"a row has {len(ids)} tokens, more than max_length={length}; raise it, or say too_long=truncate or "
                "too_long=drop"
            )
        is_kept = len(ids) <= length or too_long == "truncate"
        if is_kept and any(label != IGNORE for label in labels[part][1:]):
            kept["input_ids"].append(ids[part])
            kept["labels"].append(labels[part])
    return kept


def wrap(documents: dict[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """A batch of documents end to end, cut into rows of `length` tokens; what does not fill the last one is left out,
    and so are rows of which nothing is learned.

    TRL's "wrapped" packing with the lengths of the documents of each row, so that none sees another, and without a
    short last row: every row, and so the experts' pool, has one size.
    """
    packed: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    row: dict[str, list[int]] = {name: [] for name in packed}
    for ids, labels in zip(documents["input_ids"], documents["labels"], strict=True):
        start = 0
        while start < len(ids):
            end = min(len(ids), start + length - len(row["input_ids"]))
            row["input_ids"] += ids[start:end]
            row["labels"] += labels[start:end]
            row["seq_lengths"].append(end - start)
            start = end
            if len(row["input_ids"]) == length:
                for name, values in row.items() if is_learned_from(row) else ():
                    packed[name].append(values)
                row = {name: [] for name in packed}
    return packed


def is_learned_from(row: dict[str, list[int]]) -> bool:
    """Whether a packed row holds a token that is learned; the first of a document is not, for nothing predicts it."""
    starts = {0, *accumulate(row["seq_lengths"])}
    return any(label != IGNORE and place not in starts for place, label in enumerate(row["labels"]))
