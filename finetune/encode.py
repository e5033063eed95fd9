"""Rows to tokens: packed documents, or one conversation or instruction per sequence with its prompt left unlearned.

IGNORE marks a label that is not learned. The first token of a document is one: nothing before it predicts it.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from .errors import RecipeError
from .losses import IGNORE
from .recipe import Recipe

_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


class Encoder:
    """Turns batches of rows of one kind into batches of sequences; a picklable function for `datasets`.

    It holds what it depends on and nothing else of the recipe, so that `datasets` finds its cached sequences again.

    vocab_size: of the model's embedding, which every token must have a row in.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, kind: str, vocab_size: int) -> None:
        self.tokenizer, self.kind, self.vocab_size = tokenizer, kind, vocab_size
        self.sequence_length, self.too_long = recipe.sequence_length, recipe.too_long
        self.append_eos = recipe.append_eos and tokenizer.eos_token_id is not None
        self.is_packed = kind == "text" and recipe.packing
        self.has_template = getattr(tokenizer, "chat_template", None) is not None
        if kind == "messages" and not self.has_template:
            raise RecipeError(
                "the tokenizer has no chat template and the dataset holds conversations; name a Jinja file in "
                "chat_template"
            )

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The sequences of a batch of rows: input_ids and labels, and position_ids where they are packed."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        if self.is_packed:
            return pack((self._text(row) for row in rows), self.sequence_length)
        kept = [fitted for row in rows if (fitted := self._fit(*self._encode(row))) is not None]
        return {"input_ids": [ids for ids, _ in kept], "labels": [labels for _, labels in kept]}

    def mark(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """One sequence for each row, empty where it is left out, and whether it was too long.

        It is in the columns, so that `datasets` keeps it with the sequences and it can be counted the next time.
        """
        marked: dict[str, list[Any]] = {"input_ids": [], "labels": [], "is_kept": [], "is_too_long": []}
        for values in zip(*batch.values(), strict=True):
            sequence = self._encode(dict(zip(batch, values, strict=True)))
            fitted = self._fit(*sequence)
            ids, labels = fitted or ([], [])
            row = (ids, labels, fitted is not None, len(sequence[0]) > self.sequence_length)
            for name, value in zip(marked, row, strict=True):
                marked[name].append(value)
        return marked

    def _encode(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        return {"text": self._text, "messages": self._messages, "prompt": self._prompt}[self.kind](row)

    def _text(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        ids = self._ended(self._ids(row["text"]))
        return ids, [IGNORE, *ids[1:]]

    def _ended(self, ids: list[int]) -> list[int]:
        """With the end of the sequence, once: some tokenizers add it by themselves."""
        end = self.tokenizer.eos_token_id
        return [*ids, end] if self.append_eos and ids[-1:] != [end] else ids

    def _prompt(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Prompt and completion; as one user and one assistant message where there is a template."""
        if self.has_template:
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
            return self._messages({"messages": messages})
        # The tokens of the text as a whole: those of its parts may be others (a space of its own, two ends).
        ids, prompt = self._ids(row["prompt"] + row["completion"]), self._ids(row["prompt"])
        ids = self._ended(ids)
        shared = next((i for i, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other), len(prompt))
        return ids, [IGNORE] * shared + ids[shared:]

    def _messages(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        """A conversation through the chat template; only what the assistant says is learned.

        The template's own {% generation %} marks are used where it has them; without, what an assistant's turn adds
        to the text before it.
        """
        messages = [_as_written(message) for message in row["messages"]]
        tools = row.get("tools") or None
        tools = _from_json(tools) if isinstance(tools, str) else _without_none(tools)
        template = self.tokenizer.chat_template
        if _GENERATION.search(template if isinstance(template, str) else ""):
            ids, mask = self._marked(messages, tools)
        else:
            ids, mask = self._apply(messages, tools=tools), []
            for turn, message in enumerate(messages):
                if message.get("role") != "assistant":
                    continue
                before = self._apply(messages[:turn], tools=tools, add_generation_prompt=True)
                after = self._apply(messages[: turn + 1], tools=tools)
                if ids[: len(before)] != before or ids[: len(after)] != after:
                    raise RecipeError(
                        "the chat template does not render a conversation turn by turn, so the assistant's tokens "
                        "cannot be told apart; mark them in it with {% generation %}"
                    )
                mask += [0] * (len(before) - len(mask)) + [1] * (len(after) - len(before))
            mask += [0] * (len(ids) - len(mask))
        if not any(mask):
            _refuse_other_keys(messages)
            raise RecipeError(
                f"a conversation has no token of the assistant to learn from: {str(messages)[:120]}; leave such rows "
                "out, or check the roles and the chat template"
            )
        self._check(ids)
        return ids, [token if learned else IGNORE for token, learned in zip(ids, mask, strict=True)]

    def _marked(self, messages: list[Any], tools: Any) -> tuple[list[int], list[int]]:
        """Tokens, and which lie in the template's {% generation %} marks.

        By where each token lies in the text: Transformers looks for the token of a mark's last character, and finds
        none where a normaliser has put two characters into one, so that all that follows is learned.
        """
        text = self._apply(messages, tools=tools, tokenize=False)
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        (spans,) = rendered[1]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = encoded["offset_mapping"]
        return list(encoded["input_ids"]), [int(any(a < end and b > begin for begin, end in spans)) for a, b in places]

    def _apply(self, messages: list[dict[str, str]], **options: Any) -> Any:
        options = {"tokenize": True, "return_dict": False} | options
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # Jinja's own errors, and those that a template raises
            _refuse_other_keys(messages)
            raise RecipeError(
                f"the chat template refuses {str(messages)[:120]}: {' '.join(str(error).split())}"
            ) from error

    def _ids(self, text: str, **options: Any) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False, **options)["input_ids"]
        self._check(ids)
        return ids

    def _check(self, ids: list[int]) -> None:
        if ids and max(ids) >= self.vocab_size:
            raise RecipeError(
                f"the tokenizer makes token {max(ids)} and the model's vocabulary has {self.vocab_size}; they do not "
                "belong together"
            )

    def _fit(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]] | None:
        """A sequence that is not packed, within sequence_length; None when it is dropped or holds nothing to learn."""
        length = self.sequence_length
        if len(ids) > length:
            if self.too_long == "refuse":
                raise RecipeError(
                    f"a row has {len(ids)} tokens, more than sequence_length={length}; raise it, or say "
                    "too_long=truncate or too_long=drop"
                )
            if self.too_long == "drop":
                return None
            ids, labels = ids[:length], labels[:length]
        return (ids, labels) if any(label != IGNORE for label in labels) else None


def _as_written(message: Any) -> Any:
    """A message without what a table has added: rows of a column of structs have every key that any of them has."""
    if not isinstance(message, dict):
        return message
    kept = {key: value for key, value in message.items() if value is not None or key in ("role", "content")}
    return {key: value if key == "content" else _without_none(value) for key, value in kept.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _from_json(tools: str) -> Any:
    try:
        return json.loads(tools)
    except ValueError:
        raise RecipeError(f"a row's tools are {tools[:60]!r}, which is not JSON: rename or drop that column") from None


def stop_token(tokenizer: Any) -> tuple[int | None, str]:
    """The token that ends an answer in the tokenizer's chat template, and how it is written; None where it is no token
    of its own, so that `generate` cannot stop at it."""
    answer = "An answer."
    talk = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        _, found, end = tokenizer.apply_chat_template(talk, tokenize=False).rpartition(answer)
    except Exception:  # Jinja's own errors; the rows will say it
        return None, ""
    if not found or not end:  # content as a list of parts, or a template that rewrites it: what ends it is not known
        return None, ""
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    known = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        known.discard(tokenizer.bos_token_id)  # it begins the next text
    # blank ones, as runs of spaces or line ends, stand inside answers too
    return next((token for token in ids if token in known and tokenizer.decode([token]).strip()), None), end


def _refuse_other_keys(messages: list[Any]) -> None:
    """Says so where messages lack the key that templates ask for, as those of ShareGPT do."""
    for message in messages:
        if isinstance(message, dict) and message.get("role") is None:
            has = ", ".join(key for key, value in message.items() if value is not None)
            raise RecipeError(
                f"a message of a conversation has the keys {has}; it needs role (system, user or assistant) and "
                "content: rename them in the dataset"
            )


def pack(documents: Iterable[tuple[list[int], list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Documents end to end, cut into sequences; what does not fill the last one is left out.

    position_ids begin at 0 with each document, and again where a sequence cuts one; Transformers' attention masks
    read documents off them, so that none sees another.
    """
    packed: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for document, its_labels in documents:
        start = 0
        while start < len(document):
            end = min(len(document), start + length - len(ids))
            ids += document[start:end]
            labels += [IGNORE, *its_labels[start + 1 : end]]
            positions += range(end - start)
            start = end
            if len(ids) == length:
                for name, values in (("input_ids", ids), ("labels", labels), ("position_ids", positions)):
                    packed[name].append(values)
                ids, labels, positions = [], [], []
    return packed
