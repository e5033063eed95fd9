"""Batches to look at a model with: made of texts, and run through it.

Shapes: B rows, S tokens of a row.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

Progress = Callable[[list[Mapping[str, Tensor]]], Iterable[Mapping[str, Tensor]]]


def run_batches(
    model: nn.Module, batches: list[Mapping[str, Tensor]], title: str, progress: Progress | None = None
) -> None:
    """Forward passes in eval mode; the model is left in the mode it was in.

    progress: hands out the batches and shows how far they are; None is Transformers' bar.
    """
    was_training = model.training
    model.eval()
    # Offloaded parameters are on the meta device between passes; their hooks move the inputs.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    # The routes are what is wanted: of the logits, the largest tensor of a pass, as few as can be.
    base: Any = getattr(model, "get_base_model", lambda: model)()
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    try:
        shown = progress(batches) if progress else logging.tqdm(batches, desc=title, unit="batch", leave=False)
        for batch in shown:
            model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False, **options)
    finally:
        model.train(was_training)


def token_ids(tokenizer: Any, document: Any) -> list[int]:
    """The tokens of a text; of a conversation those of the tokenizer's chat template, or of plain text without one.

    Args:
        document: a text, or the messages of a conversation, each with `role` and `content`.

    Raises:
        ValueError: when the template refuses the conversation.
    """
    if isinstance(document, str):
        return list(tokenizer(document, verbose=False)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        return token_ids(tokenizer, plain_conversation(document))
    failed: Exception | None = None
    for messages in (document, _without_system(document)):
        try:
            return list(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
        except Exception as error:  # what a template raises is its own affair
            failed = failed or error
    raise ValueError(f"the chat template refuses a conversation: {' '.join(str(failed).split())[:200]}")


def plain_conversation(messages: list[Mapping[str, Any]]) -> str:
    """A conversation as text, for a tokenizer without a chat template."""
    return "\n\n".join(f"{str(message['role']).capitalize()}: {message['content']}" for message in messages)


def _without_system(messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The system's words before the first user's, for templates that know no such role."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def is_conversation(item: Any) -> bool:
    """Whether it is a list of messages, each with role and content."""
    return (
        isinstance(item, (list, tuple))
        and len(item) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in item)
    )


WINDOW = 512  # tokens of a row made of a text; shorter where the model's context is
POOL = 4_096  # tokens of a batch of such rows, among which experts choose


def as_batches(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | Iterable[str], tokenizer: Any = None
) -> list[Mapping[str, Tensor]]:
    """Batches as they are; texts as batches of rows of `WINDOW` tokens at most, padded on the right.

    Args:
        model: whose context bounds the rows.
        batches: keyword arguments of its forward; or texts and conversations, a conversation being a list of messages
            with `role` and `content`, or a mapping with such a list as `messages`.
        tokenizer: of the texts; its chat template makes tokens of a conversation.

    Raises:
        ValueError: for texts without a tokenizer, batches with one, and what is neither.
    """
    held: list[Any] = [batches] if isinstance(batches, (str, Mapping)) or is_conversation(batches) else list(batches)
    held = [item["messages"] if _has_messages(item) else item for item in held]
    texts = [item for item in held if isinstance(item, str) or is_conversation(item)]
    if held and not texts and all(isinstance(item, Mapping) and "input_ids" in item for item in held):
        if tokenizer is not None:
            raise ValueError("tokenizer is for texts, and batches of tokens are given; leave it out")
        return [{name: torch.as_tensor(value) for name, value in item.items()} for item in held]
    if not held:
        raise ValueError("there is no batch and no text; give at least one")
    if len(texts) < len(held):
        names = ", ".join(held[0]) if isinstance(held[0], Mapping) else type(held[0]).__name__
        raise ValueError(
            f"batches must all be texts, or all mappings with input_ids [B, S], and one is {names}; "
            'of a dataset give its column of text, such as dataset["text"]'
        )
    if not callable(tokenizer):
        raise ValueError(f"tokenizer={tokenizer!r}: texts are given; give their tokenizer too, or batches of input_ids")
    config: Any = getattr(model, "config", None)
    config = None if config is None else config.get_text_config()
    length = min(WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)
    ids = [token_ids(tokenizer, text) for text in texts]
    rows = [torch.tensor(row[begin : begin + length]) for row in ids for begin in range(0, len(row), length)]
    if not rows:
        raise ValueError("the texts are empty: there is not a single token in them")
    found: list[Mapping[str, Tensor]] = []
    batch: list[Tensor] = []
    for row in rows:
        if batch and (len(batch) + 1) * max(map(len, [*batch, row])) > POOL:  # padding counts: it is memory too
            found.append(_padded(batch))
            batch = []
        batch.append(row)
    return [*found, _padded(batch)]


def _has_messages(item: Any) -> bool:
    return isinstance(item, Mapping) and "input_ids" not in item and is_conversation(item.get("messages"))


def _padded(rows: list[Tensor]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    ones = [torch.ones_like(row) for row in rows]
    return {"input_ids": pad(rows, batch_first=True), "attention_mask": pad(ones, batch_first=True)}
