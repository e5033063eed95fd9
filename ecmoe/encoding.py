"""Rows to tokens and labels: what is learned of a text, an instruction or a conversation.

Fine-tuning learns by it and evaluation measures by it, so that both mean the same tokens. TRL would do this too; where
its result is another one, docs/finetuning.md says so and shows the rows. Its training templates are used, which mark
the assistant's words in the chat templates of the large families.
"""

import json
from typing import Any, NoReturn

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length, maybe_convert_to_chatml

IGNORE = -100  # the label of a token that is not learned
Sequence = dict[str, list[int]]
NO_TEMPLATE = "the tokenizer has no chat template and the dataset holds conversations"


class EncodingError(ValueError):
    """A row, or a template, that nothing can be learned of; the message says what to change."""


class Encoder:
    """Turns a row of one kind into input_ids and labels; a picklable function for `datasets`.

    It holds what it depends on and nothing else of the recipe, so that `datasets` finds its cached sequences again.

    Args:
        kind: "text", "messages" or "prompt", as of `load_rows`.
        vocab_size: of the model's embedding, which every token must have a row in; None where that is not known.
        append_eos: whether text and instructions without a template end with the end-of-sequence token.
        learned: "all", what "the assistant" says, or of that "the completion" alone.
        remedy: what to do about a chat template, where messages name one.

    Raises:
        EncodingError: when it is made and when it is called.
    """

    remedy = "put one that takes them into the checkpoint's folder as chat_template.jinja"

    def __init__(
        self,
        tokenizer: Any,
        kind: str,
        vocab_size: int | None = None,
        append_eos: bool = True,
        learned: str = "the completion",
        remedy: str | None = None,
    ) -> None:
        self.remedy = remedy or self.remedy
        self.tokenizer, self.kind, self.vocab_size, self.learned = tokenizer, kind, vocab_size, learned
        self.append_eos = append_eos
        self.has_template = getattr(tokenizer, "chat_template", None) is not None
        self.training_template = _training_template(tokenizer) if self.has_template else None
        if kind == "messages" and not self.has_template:
            raise EncodingError(f"{NO_TEMPLATE}; {self.remedy}")

    def __call__(self, row: Any) -> Sequence:
        """input_ids and labels, IGNORE where nothing is learned."""
        row = maybe_convert_to_chatml(dict(row))
        if self.kind == "prompt" and row["prompt"] is None:
            row["prompt"] = type(row["completion"])()
        if self.kind == "text":
            ids = self._ids(row["text"])
            ids, labels = self._ended(ids, ids)
        elif self.kind == "prompt" and isinstance(row["prompt"], str) and not self.has_template:
            # The tokens of the joined text: those of its parts may be others (a space of its own, two ends).
            joined = row["prompt"] + row["completion"]
            ids, labels = self._learned(joined, [(len(row["prompt"]), len(joined))])
            ids, labels = self._ended(ids, labels)
        else:
            if self.kind == "prompt" and isinstance(row["prompt"], str) != isinstance(row["completion"], str):
                raise EncodingError(
                    f"a row has text as one of prompt and completion, messages as the other: {str(row)[:120]}; give "
                    "both alike"
                )
            ids, labels = self._conversation(row)
        if self.vocab_size is not None and max(ids, default=0) >= self.vocab_size:
            raise EncodingError(
                f"the tokenizer makes token {max(ids)} and the model's vocabulary has {self.vocab_size}; they do not "
                "belong together"
            )
        return {"input_ids": ids, "labels": ids if self.learned == "all" else labels}

    def _ids(self, text: str, **options: Any) -> list[int]:
        return list(self.tokenizer(text, verbose=False, **options)["input_ids"])

    def _ended(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """With the end of the sequence, learned, once: some tokenizers add it by themselves."""
        end = self.tokenizer.eos_token_id
        if ids[-1:] == [end]:
            return ids, [*labels[:-1], end]
        return ([*ids, end], [*labels, end]) if self.append_eos and end is not None else (ids, labels)

    def _learned(self, text: str, spans: list[tuple[int, int]], **options: Any) -> tuple[list[int], list[int]]:
        """Tokens of a text, and their labels: those are learned that lie in the spans of characters, or reach into one.

        Llama 2's template, for one, writes a blank before an answer, which is of the same token as its first word.
        By where tokens lie in the text: Transformers looks for the token of a span's last character, and finds none
        where a normaliser has put two characters into one, so that all that follows would be learned.
        """
        if getattr(self.tokenizer, "is_fast", False):
            encoded = self.tokenizer(text, return_offsets_mapping=True, verbose=False, **options)
            ids = list(encoded["input_ids"])
            learned = [any(a < end and b > begin for begin, end in spans) for a, b in encoded["offset_mapping"]]
        else:  # no places: what the text up to a border has in common with the whole
            ids = self._ids(text, **options)
            borders = [[common_prefix_length(ids, self._ids(text[:end], **options)) for end in span] for span in spans]
            learned = [any(first <= n < last for first, last in borders) for n in range(len(ids))]
        return ids, [token if is_learned else IGNORE for token, is_learned in zip(ids, learned, strict=True)]

    def _conversation(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Through the chat template; what the assistant says is learned, of a prompt with a completion the latter."""
        prompt: Any = []
        if self.kind == "messages":
            messages = row["messages"]
        elif isinstance(row["prompt"], str):
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        else:
            prompt = row["prompt"]
            messages = prompt + row["completion"]
        if not self.has_template:
            raise EncodingError(f"{NO_TEMPLATE}; {self.remedy}")
        messages = [_as_written(message) for message in messages]
        tools = row.get("tools") or None
        tools = _from_json(tools) if isinstance(tools, str) else _without_none(tools)
        options = {"tools": tools} | (_without_none(row.get("chat_template_kwargs")) or {})
        text, spans = self._spans(messages, options)
        if any(isinstance(message.get("content"), list) and str(message["content"]) in text for message in messages):
            messages = [_in_words(message) for message in messages]  # the template takes text alone
            text, spans = self._spans(messages, options)
        if tools and self._render(messages, options | {"tools": None})[0] == text:
            _refuse_left_out("a row's tools", tools, self.remedy)
        for message in messages:
            if message.get("role") == "assistant":
                _look_for(message, text, "".join(text[begin:end] for begin, end in spans), self.remedy)
        if prompt and self.learned == "the completion":
            start = len(self._render(messages[: len(prompt)], options)[0])
            spans = [(begin, end) for begin, end in spans if begin >= start]
        ids, labels = self._learned(text, spans, add_special_tokens=False)
        if self.learned != "all" and all(label == IGNORE for label in labels):
            _refuse_other_keys(messages)
            roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in messages))
            raise EncodingError(
                f"a conversation has no token of the assistant to learn from among the roles {roles}: "
                f"{str(messages)[:120]}; leave such rows out, or check the roles and the chat template"
            )
        return ids, labels

    def _spans(self, messages: list[Any], options: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and where the assistant speaks in it, by characters.

        By the template's {% generation %} marks where it has them; without, what an assistant's turn adds to the text
        before it.
        """
        text, marked = self._render(messages, options)
        if marked is not None:
            return text, marked
        spans = []
        for turn, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before, _ = self._render(messages[:turn], options, add_generation_prompt=True)
            after, _ = self._render(messages[: turn + 1], options)
            if not (text.startswith(after) and after.startswith(before)):
                raise EncodingError(
                    "the chat template does not render a conversation turn by turn, so the assistant's words cannot "
                    "be told apart; mark them in it with {% generation %}"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _render(
        self, messages: list[Any], options: dict[str, Any], **more: Any
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """The text of a conversation, and the spans that the template marks; None where it marks nothing at all."""
        template = self.training_template or self.tokenizer.get_chat_template(None, options["tools"])
        is_marked = has_generation_markers(template)
        names = self.tokenizer.special_tokens_map | options | more
        try:
            rendered: Any = render_jinja_template(
                conversations=[messages], chat_template=template, return_assistant_tokens_mask=is_marked, **names
            )
        except Exception as error:  # Jinja's own errors, and those that a template raises
            _refuse_other_keys(messages)
            raise EncodingError(
                f"the chat template refuses {str(messages)[:120]}: {' '.join(str(error).split())}"
            ) from error
        return rendered[0][0], rendered[1][0] if is_marked else None


def _training_template(tokenizer: Any) -> str | None:
    """TRL's, where it has one for the tokenizer's own; of several templates each is taken as it comes."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except (ValueError, TypeError, KeyError, TemplateError):  # it has none, or cannot say
        return None
    return template


def _as_written(message: Any) -> Any:
    """A message without what a table has added: rows of a column of structs have every key that any of them has."""
    if not isinstance(message, dict):
        return message
    kept = {key: _without_none(value) for key, value in message.items() if value is not None}
    return {"content": ""} | kept if "content" in message else kept  # null would be written as None


def _in_words(message: dict[str, Any]) -> dict[str, Any]:
    """With the parts of its content as one text.

    Raises:
        EncodingError: of a part that is no text.
    """
    content = message["content"]
    if isinstance(content, list) and any(set(part) - {"type"} != {"text"} for part in content):
        raise EncodingError(f"the chat template takes text alone, and a message has other parts: {str(content)[:120]}")
    return message | {"content": "".join(part["text"] for part in content) if isinstance(content, list) else content}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _from_json(tools: str) -> Any:
    try:
        return json.loads(tools)
    except ValueError:
        raise EncodingError(
            f"a row's tools are {tools[:60]!r}, which is not JSON: rename or drop that column"
        ) from None


def _refuse_other_keys(messages: list[Any]) -> None:
    """Says so where messages lack the key that templates ask for."""
    for message in messages:
        if isinstance(message, dict) and message.get("role") is None:
            has = ", ".join(key for key, value in message.items() if value is not None)
            raise EncodingError(
                f"a message of a conversation has the keys {has}; it needs role (system, user or assistant) and "
                "content: rename them in the dataset"
            )


def _look_for(message: dict[str, Any], text: str, learned: str, remedy: str) -> None:
    """Refuses a template that passes over what an assistant says, where it wants parts for one, or the tools it calls.

    The last word is looked for: some templates leave out what was thought before.
    """
    content = message.get("content") or ""
    for said in [part.get("text") or "" for part in content] if isinstance(content, list) else [content]:
        if said.strip() and said.split()[-1].lower() not in text.lower():
            _refuse_left_out("the assistant's answer", said, remedy)
    for call in message.get("tool_calls") or ():
        if str((call.get("function") or call).get("name")) not in learned:
            _refuse_left_out("the assistant's tool_calls", call, remedy)


def _refuse_left_out(what: str, item: Any, remedy: str) -> NoReturn:
    raise EncodingError(
        f"the chat template leaves out {what}, {str(item)[:80]}; {remedy}, or leave out such rows or the column"
    )
