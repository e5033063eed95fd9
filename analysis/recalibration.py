"""ecmoe-inspect calibrate: new thresholds for a checkpoint, measured on the text that it is meant for.

The one command of this room that writes to a checkpoint, and it writes thresholds alone: it looks at routes as the
others do, and what it finds out is of use only in the folder that was looked at.
"""

import datetime
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecmoe.progress import announce, progress_bar
from modeling_ecmoe import calibrate_thresholds, record_routing, sparse_blocks
from modeling_ecmoe.batches_ecmoe import is_conversation, token_ids
from modeling_ecmoe.report_ecmoe import is_near_share

from .errors import AnalysisError
from .limits import CALIBRATION_TOKENS
from .loading import load_expert_choice, padding_id, template_remedy
from .rows import Columns, read_rows
from .shards import Calibrated, threshold_shards
from .text import pad

Batch = dict[str, Tensor]

WINDOW = 512  # tokens; shorter where the model's context is
POOL = 4_096  # tokens of a batch, among which experts choose meanwhile
LOGITS = 1_024  # tokens of a batch whose logits are held at once
HELD_OUT = 5  # one document in so many is looked at and not calibrated on


def calibrate(
    checkpoint: str | os.PathLike,
    text: str | os.PathLike,
    tokens: int = CALIBRATION_TOKENS,
    text_column: str = "text",
    device: str | None = None,
) -> dict[str, Any]:
    """Replaces the thresholds of a checkpoint, in place, by those at which every expert has its share of a text.

    One document in five is held out, and of one document its last fifth; loss and load on that part are measured with
    the old thresholds and with the new ones. The old ones stay in ecmoe_calibration.json in the folder. Nothing else
    of the weights is touched; a run that is killed leaves the checkpoint as it was. For a model in memory there is
    `modeling_ecmoe.calibrate_thresholds`.

    Args:
        checkpoint: folder of an expert-choice checkpoint in safetensors.
        text: file or folder of files with text, conversations, or prompts with completions, see `rows.read_rows`; the
            model's chat template makes text of the latter two.
        tokens: to calibrate on, at most; a quarter as many are held out.
        text_column: of .jsonl and .parquet files.
        device: the first accelerator, or the CPU, when None.

    Returns:
        checkpoint, text, date, tokens, held_out_tokens, thresholds_from (of config.json, as it is afterwards), before
        and after: loss (causal, nats per token), load_min, load_max, uncovered, experts_per_token.

    Raises:
        AnalysisError: for anything the user can put right.
    """
    folder, text = Path(checkpoint).expanduser(), os.fspath(text)
    if not folder.is_dir():
        raise AnalysisError(
            f"checkpoint={checkpoint} is no local folder, and thresholds are replaced in place; download it first: "
            f"hf download {checkpoint} --local-dir FOLDER"
        )
    if tokens < 1:
        raise AnalysisError(f"tokens={tokens} must be at least 1")
    documents = _documents(text, text_column)
    first = next(documents, None)  # what is wrong with the text is said before a model is loaded
    if first is None:
        raise AnalysisError(f"text={text} holds no text")
    with threshold_shards(folder) as shards:
        model, tokenizer = load_expert_choice(os.fspath(folder), device)
        _refuse_token_choice(model, checkpoint)
        length = min(WINDOW, getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW)
        documents = _as_read(itertools.chain([first], documents), tokenizer, checkpoint)
        held_out, rest = _rows(tokenizer, documents, text, length, tokens)
        padding = padding_id(tokenizer)
        looked_at, calibrated_on = list(_batches(held_out, LOGITS, padding)), list(_batches(rest, POOL, padding))
        found: dict[str, Any] = {
            "checkpoint": os.fspath(checkpoint),
            "text": text,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "tokens": sum(map(len, rest)),
            "held_out_tokens": sum(map(len, held_out)),
        }
        announce(
            f"Calibrating {folder} on {found['tokens']:,} tokens of {text}; {found['held_out_tokens']:,} others are "
            "looked at before and after."
        )
        replaced = _thresholds(model), model.config.get_text_config().thresholds_from
        found["before"] = _look(model, looked_at, "Before")
        found["thresholds_from"] = f"{found['tokens']:,} tokens of {Path(text).name}"
        _calibrate(model, calibrated_on, found["thresholds_from"])
        found["after"] = _look(model, looked_at, "After")
        shards.write(Calibrated(_thresholds(model), found, *replaced))
    return found


def load_warning(found: dict[str, Any]) -> str | None:
    """What to say where the experts are far from their share of the held-out text with the new thresholds too."""
    least, largest = found["after"]["load_min"], found["after"]["load_max"]
    if is_near_share(found["after"]):
        return None
    return (
        f"experts take {least:.2f} to {largest:.2f} of their share of held-out text: {found['tokens']:,} tokens are "
        "too few, or the text is of several kinds that come one after the other; give more of it (--tokens), mixed"
    )


def _refuse_token_choice(model: Any, checkpoint: Any) -> None:
    if model.config.get_text_config().inference_routing == "token_choice":
        raise AnalysisError(
            f"checkpoint={checkpoint} has inference_routing=token_choice: its tokens choose, and there are no "
            "thresholds to calibrate"
        )


def _documents(text: str, text_column: str) -> Iterator[Any]:
    """Texts, and rows with messages, or a prompt and its completion."""
    columns = Columns(text=None if text_column == "text" else text_column)
    try:
        yield from read_rows(text, columns)
    except AnalysisError as error:
        raise AnalysisError(str(error).replace("data=", "text=", 1)) from error


def _as_read(documents: Iterator[Any], tokenizer: Any, checkpoint: Any) -> Iterator[Any]:
    """Texts and conversations, as `evaluate` reads them; without a chat template a prompt and its completion are one
    text, and conversations are refused."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    for document in documents:
        if isinstance(document, str):
            yield document
        elif has_template:
            yield _conversation(document)
        elif isinstance(document.get("completion"), str) and isinstance(document["prompt"], str | None):
            yield (document["prompt"] or "") + document["completion"]
        else:
            from ecmoe.encoding import NO_TEMPLATE  # which takes seconds to import

            raise AnalysisError(f"{NO_TEMPLATE}; {template_remedy(checkpoint)}")


def _conversation(row: dict[str, Any]) -> Any:
    """Messages; what cannot be read as such is refused when it is made tokens of."""
    if "messages" in row:
        return row["messages"]
    if isinstance(row["completion"], str) and isinstance(row["prompt"], str | None):
        turns = (("user", row["prompt"]), ("assistant", row["completion"]))
        return [{"role": role, "content": content} for role, content in turns if content]
    return [*(row["prompt"] or []), *row["completion"]]


def _rows(
    tokenizer: Any, documents: Iterator[Any], text: str, length: int, tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of at most `length` tokens, each of one document: those that are held out, and those to calibrate on."""
    parts: tuple[list[list[int]], list[list[int]]] = ([], [])
    wanted = (-(-tokens // 4), tokens)
    for number, document in enumerate(documents):
        part = 0 if number % HELD_OUT == HELD_OUT - 1 else 1
        missing = wanted[part] - sum(map(len, parts[part]))
        if missing > 0:
            if not isinstance(document, str) and not is_conversation(document):
                raise AnalysisError(
                    f"text={text}, document {number + 1}: messages must be a list with role and content"
                )
            try:
                ids = token_ids(tokenizer, document)[:missing]
            except Exception as error:  # tokenizers raises bare ones
                raise AnalysisError(f"text={text}: the tokenizer refuses document {number + 1}: {error}") from error
            parts[part].extend(_cut(ids, length))
        elif all(sum(map(len, rows)) >= size for rows, size in zip(parts, wanted, strict=True)):
            break
    held_out, rest = parts
    if not held_out and rest:  # fewer documents than one in five: the last fifth of what there is
        ids = list(itertools.chain(*rest))
        border = len(ids) - max(2, len(ids) // HELD_OUT)
        held_out, rest = _cut(ids[border:], length), _cut(ids[:border], length)
    if not held_out or not rest:
        raise AnalysisError(f"text={text} holds too few tokens to calibrate on some and look at others; give more")
    return held_out, rest


def _cut(ids: list[int], length: int) -> list[list[int]]:
    """Rows of at most `length` tokens; a lone token, of which no other can be predicted, is left out."""
    return [ids[start : start + length] for start in range(0, len(ids), length) if len(ids) - start > 1]


def _batches(rows: list[list[int]], size: int, padding: int) -> Iterable[Batch]:
    """Batches of at most `size` tokens, padded on the right."""
    batch: list[list[int]] = []
    for row in rows:
        if batch and (len(batch) + 1) * max(map(len, [*batch, row])) > size:  # padding counts: it is memory too
            yield pad(batch, padding)
            batch = []
        batch.append(row)
    yield pad(batch, padding)


@torch.no_grad()
def _look(model: Any, batches: list[Batch], title: str) -> dict[str, float]:
    """Causal loss in nats per token, and how the experts fare."""
    total, predicted = 0.0, 0
    with record_routing(model) as record:
        for batch in progress_bar(batches, desc=title, unit="batch"):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
            for logits_SV, targets_S in zip(model(**batch, use_cache=False).logits, targets, strict=True):
                losses = nn.functional.cross_entropy(logits_SV[:-1].float(), targets_S, reduction="none")
                total += losses.double().sum().item()
            predicted += int((targets != -100).sum())
    return {"loss": total / predicted, **record.summary()}


@torch.no_grad()
def _calibrate(model: Any, batches: list[Batch], text_name: str) -> None:
    """Experts with one router row, as the shards of a dense FFN have at first, keep one threshold: what is measured of
    each differs by rounding, which would send a token to some of them alone."""
    try:
        calibrate_thresholds(
            model,
            batches,
            text_name=text_name,
            progress=lambda held: progress_bar(held, desc="Calibrating", unit="batch"),
        )
    except ValueError as error:
        raise AnalysisError(f"the thresholds cannot be measured: {error}") from error
    for block in sparse_blocks(model).values():
        rows_ED, threshold_E = block.gate.weight, block.gate.threshold
        first_E = (rows_ED[:, None] == rows_ED).all(-1).int().argmax(1)
        threshold_E.copy_(threshold_E[first_E])


def _thresholds(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that calibration sets, by the ends of their names: "layers.0.mlp.gate.threshold"."""
    found = {}
    for name, block in sparse_blocks(model).items():
        end = ".".join(name.split(".")[-3:])
        for buffer in ("threshold", "threshold_updates"):
            found[f"{end}.gate.{buffer}"] = getattr(block.gate, buffer).detach().cpu().clone()
    return found
