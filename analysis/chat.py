"""Conversations, and prompts with completions, as tokens, and which of these fine-tuning learns.

The rule is fine-tuning's, so that a loss here is the loss that a run of `ecmoe-finetune` reports on the same rows:
through the chat template, the assistant's words count; of a prompt with a completion the completion. Tokens count that
lie in the learned characters or reach into them.
"""

import json
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length, maybe_convert_to_chatml

from .errors import AnalysisError

Spans = list[tuple[int, int]]
_NO_TEMPLATE = (
    "the tokenizer has no chat template and the data holds conversations; give a model with one, or the conversations "
    "as text in a column of its own"
)


class Encoder:
    """Turns {"messages"} or {"prompt", "completion"} into token ids, and of each whether it is learned."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_template = getattr(tokenizer, "chat_template", None) is not None
        self.training_template: str | None = None
        if self.has_template and isinstance(tokenizer.chat_template, str):
            try:
                self.training_template = get_training_chat_template(tokenizer)
            except (ValueError, TypeError, KeyError, TemplateError):  # TRL has none for this template
                self.training_template = None

    def __call__(self, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
        """Raises AnalysisError: of a row that is no conversation, or in which nothing is learned."""
        row = maybe_convert_to_chatml(dict(row))
        if "messages" not in row and row["prompt"] is None:
            row["prompt"] = type(row["completion"])()
        if "messages" not in row and isinstance(row["prompt"], str) != isinstance(row["completion"], str):
            raise AnalysisError(
                f"a row has text as one of prompt and completion, messages as the other: {str(row)[:120]}; give both "
                "alike"
            )
        if "messages" not in row and isinstance(row["prompt"], str) and not self.has_template:
            joined = row["prompt"] + row["completion"]
            ids, is_learned = self._tokens(joined, [(len(row["prompt"]), len(joined))])
            end = self.tokenizer.eos_token_id
            if end is None or ids[-1:] == [end]:
                return ids, is_learned if end is None else [*is_learned[:-1], True]
            return [*ids, end], [*is_learned, True]
        return self._conversation(row)

    def _tokens(self, text: str, spans: Spans, **options: Any) -> tuple[list[int], list[bool]]:
        if getattr(self.tokenizer, "is_fast", False):
            encoded = self.tokenizer(text, return_offsets_mapping=True, verbose=False, **options)
            places = encoded["offset_mapping"]
            return list(encoded["input_ids"]), [any(a < end and b > begin for begin, end in spans) for a, b in places]
        ids = list(self.tokenizer(text, verbose=False, **options)["input_ids"])
        parts = [[self.tokenizer(text[:end], verbose=False, **options)["input_ids"] for end in span] for span in spans]
        borders = [[common_prefix_length(ids, list(part)) for part in pair] for pair in parts]
        return ids, [any(first <= n < last for first, last in borders) for n in range(len(ids))]

    def _conversation(self, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
        prompt: Any = []
        if "messages" in row:
            messages = row["messages"]
        elif isinstance(row["prompt"], str):
            words = {"user": row["prompt"], "assistant": row["completion"]}
            messages = [{"role": role, "content": content} for role, content in words.items()]
        else:
            prompt = row["prompt"]
            messages = prompt + row["completion"]
        if not self.has_template:
            raise AnalysisError(_NO_TEMPLATE)
        messages = [_as_written(message) for message in messages]
        tools = row.get("tools") or None
        options = {"tools": json.loads(tools) if isinstance(tools, str) else _without_none(tools)}
        options |= _without_none(row.get("chat_template_kwargs")) or {}
        text, spans = self._spans(messages, options)
        if any(isinstance(message.get("content"), list) and str(message["content"]) in text for message in messages):
            messages = [_in_words(message) for message in messages]  # the template takes text alone
            text, spans = self._spans(messages, options)
        if prompt:
            start = len(self._render(messages[: len(prompt)], options)[0])
            spans = [(begin, end) for begin, end in spans if begin >= start]
        ids, is_learned = self._tokens(text, spans, add_special_tokens=False)
        if not any(is_learned):
            roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in messages))
            raise AnalysisError(
                f"a conversation has no token of the assistant to predict among the roles {roles}: "
                f"{str(messages)[:120]}; leave such rows out, or check the roles and the chat template"
            )
        return ids, is_learned

    def _spans(self, messages: list[Any], options: dict[str, Any]) -> tuple[str, Spans]:
        """The rendered text, and where the assistant speaks in it: by the template's {% generation %} marks, or by what
        an assistant's turn adds to the text before it."""
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
                raise AnalysisError(
                    "the chat template does not render a conversation turn by turn, so the assistant's words cannot "
                    "be told apart; mark them in it with {% generation %}"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _render(self, messages: list[Any], options: dict[str, Any], **more: Any) -> tuple[str, Spans | None]:
        template = self.training_template or self.tokenizer.get_chat_template(None, options["tools"])
        is_marked = has_generation_markers(template)
        names = self.tokenizer.special_tokens_map | options | more
        try:
            rendered: Any = render_jinja_template(
                conversations=[messages], chat_template=template, return_assistant_tokens_mask=is_marked, **names
            )
        except Exception as error:  # Jinja's own errors, and those that a template raises
            raise AnalysisError(
                f"the chat template refuses {str(messages)[:120]}: {' '.join(str(error).split())}; messages need role "
                "(system, user or assistant) and content"
            ) from error
        return rendered[0][0], rendered[1][0] if is_marked else None


def _as_written(message: Any) -> dict[str, Any]:
    """A message without what a table has added: rows of a column of structs have every key that any of them has."""
    if not isinstance(message, dict):
        raise AnalysisError(f"a conversation holds {str(message)[:60]!r}, which is no message with role and content")
    kept = {key: _without_none(value) for key, value in message.items() if value is not None}
    return {"content": ""} | kept if "content" in message else kept  # null would be written as None


def _in_words(message: dict[str, Any]) -> dict[str, Any]:
    """With the parts of its content as one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    if any(set(part) - {"type"} != {"text"} for part in content):
        raise AnalysisError(f"the chat template takes text alone, and a message has other parts: {str(content)[:120]}")
    return message | {"content": "".join(part["text"] for part in content)}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
