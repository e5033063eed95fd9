"""Losses, speed and routes of checkpoints on text and conversations, and their choices between minimal pairs."""

import contextlib
import copy
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecmoe.progress import announce, duration, progress_bar
from modeling_ecmoe import RoutingRecord, record_routing, use_inference_routing

from .errors import AnalysisError
from .limits import EVALUATED_TOKENS, EVALUATION_SECONDS, QUICK_SECONDS, SILENT_SECONDS
from .loading import is_of_family, lent_template, name_of, opened, padding_id, template_remedy
from .losses import log_likelihoods, row_sums, token_losses
from .planning import MEASURED_TOKENS, halved_until, seconds_per_token
from .rows import Batch, Columns, as_batch, at_most, batches, first_tokens, read_rows, tokens_of
from .text import HALF_A_PAIR, is_unicode, pad
from .uncertainty import mean_and_error, paired_difference, per_document

WINDOW = 512  # tokens of a document; shorter where the model's context is
CONVERSATION = 2_048  # tokens of a conversation; shorter where the model's context is
POOL = 4_096  # tokens of a batch, among which experts choose for the top-k loss
TOP_K_EVERY = 8  # batches: the top-k loss costs a second pass, and the gap, a paired difference, needs few tokens
FEWEST_TOKENS = 2 * POOL  # that are chosen for a slow model
_LOOK_AHEAD = 256  # batches made before the first is run, so that it can be said how many there are


@dataclass
class _Losses:
    """Of one model: figures as in the result, and of each row its causal loss, predicted tokens and document."""

    figures: dict[str, Any]
    nll: Tensor
    predicted: Tensor
    documents: list[int]
    tokens: list[int]  # a hash of each row's


def evaluate(
    checkpoint: Any,
    data: str | None = None,
    pairs: list[str] | None = None,
    text_column: str | None = None,
    max_tokens: int | None = None,
    device: str | None = None,
    tokenizer: Any = None,
    against: list[Any] | None = None,
    messages_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Evaluates a causal language model: an expert-choice one, or one to hold it against, such as its dense parent.

    Args:
        checkpoint: folder or Hub id, or a model in memory, with its tokenizer.
        data: file or folder of files with text, conversations, or prompts with completions; see `rows.read_rows`.
            Of a document every token is predicted, elsewhere what fine-tuning learns: the assistant's words, the
            completion.
        pairs: files of minimal pairs, rows of JSON with sentence_good and sentence_bad (as BLiMP,
            arXiv 1912.00582), or folders of such files.
        text_column, messages_column, prompt_column, completion_column: of .jsonl and .parquet files; without a name
            messages, prompt with completion, and text are looked for.
        max_tokens: read at most so many tokens of data; 0 reads all. None is EVALUATED_TOKENS, halved until a measured
            rate allows it in EVALUATION_SECONDS.
        device: the first accelerator, or the CPU, when None; a model in memory is run where it is.
        tokenizer: of a model in memory.
        against: checkpoints, or models in memory with the same tokenizer, to evaluate on the same rows.
        quick: the rate allows QUICK_SECONDS.

    Returns:
        thresholds_from: the text they were measured on, where that is known. chat_template_from: the model whose chat
        template was used for one of the same vocabulary that has none. Of data: loss (causal, nats per
        token), standard_error of it over `units` ("documents", or "rows" where there is one document;
        `num_units` of them), perplexity, loss_gap, the causal loss minus the one where experts choose among the
        batch, which looks at the future, on top_k_tokens of every TOP_K_EVERY-th batch; loss_top_k, loss minus
        loss_gap; tokens, predicted_tokens, num_cut (conversations longer than CONVERSATION, of which the rest
        was left out), amount (why so many tokens), tokens_per_second, and the routes: summary and layers as
        `modeling_ecmoe.routing_report`. A model that is not of this family has no loss_top_k, loss_gap,
        top_k_tokens and routes. Of pairs: the share of pairs whose good sentence is more likely, for each file
        and over all.
        `against` has the same of each other model, and difference, this model's loss minus the other's, with its
        standard_error, paired over units.

    Raises:
        AnalysisError: for anything the user can put right.
    """
    if data is None and not pairs:
        raise AnalysisError("there is nothing to evaluate on; give data, pairs, or both")
    if max_tokens is not None and (max_tokens < 0 or max_tokens == 1):
        raise AnalysisError(
            f"max_tokens={max_tokens} must be at least 2, for the first token is predicted by nothing; give 0 to read "
            "everything"
        )
    if max_tokens is not None and quick:
        raise AnalysisError(f"max_tokens={max_tokens} and quick both say how much to read; give one of them")
    columns = Columns(text_column, messages_column, prompt_column, completion_column)
    seconds = (QUICK_SECONDS if quick else EVALUATION_SECONDS) / (1 + len(against or ()))
    result: dict[str, Any] = {}
    first: _Losses | None = None
    models = [checkpoint, *(against or ())]
    lent = _lent(models, tokenizer, data, columns) if data is not None and against else None
    on_disk = [isinstance(other, str | os.PathLike) for other in models]
    for other, is_on_disk in zip(models, on_disk, strict=True):
        own = None if is_on_disk and not all(on_disk) else tokenizer
        with opened(other, own, device) as (model, its_tokenizer):
            entry: dict[str, Any] = {"checkpoint": name_of(other), "model_type": model.config.model_type}
            if measured_on := getattr(model.config.get_text_config(), "thresholds_from", None):
                entry["thresholds_from"] = measured_on
            if lent and not its_tokenizer.chat_template:
                its_tokenizer = copy.copy(its_tokenizer)
                its_tokenizer.chat_template, entry["chat_template_from"] = lent
            if data is not None:
                found, max_tokens = _on_data(model, its_tokenizer, data, columns, max_tokens, seconds, other)
                entry |= found.figures
                if first is not None:
                    entry |= _difference(first, found, name_of(other))
                first = first or found
            if pairs:
                entry["pairs"] = _pairs(model, its_tokenizer, pairs)
        del model  # before the next one is loaded
        if result:
            result.setdefault("against", []).append(entry)
        else:
            result = entry
    return result


def _context(model: Any) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW


def _lent(models: list[Any], tokenizer: Any, data: str, columns: Columns) -> tuple[Any, str] | None:
    """As `lent_template`, said aloud; None for plain text, which needs no template."""
    if not isinstance(next(read_rows(data, columns), ""), dict):
        return None
    lent = lent_template(models, tokenizer)
    if lent is not None:
        announce(f"The chat template of {lent[1]} is used for all: with the same vocabulary others have none.")
    return lent


def _on_data(
    model: Any, tokenizer: Any, data: str, columns: Columns, max_tokens: int | None, seconds: float, checkpoint: Any
) -> tuple[_Losses, int]:
    """The figures, and how many tokens were allowed, 0 for all: the next model reads as many."""
    name = name_of(checkpoint)
    window, longest = min(WINDOW, _context(model)), min(CONVERSATION, _context(model))
    padding = padding_id(tokenizer)
    every = tokens_of(tokenizer, read_rows(data, columns), window, longest, template_remedy(checkpoint))
    head, rows = first_tokens(every, MEASURED_TOKENS)
    if not head:
        raise AnalysisError(f"data={data} holds no text; every document is empty or a single token")
    sample = as_batch([row.cut(MEASURED_TOKENS) for row in head], padding)
    rate = seconds_per_token(model, sample.inputs, sample.is_predicted)
    # Of the family a pass in eight is done twice, and counting routes takes its time.
    rate *= 1 + 1.5 / TOP_K_EVERY if is_of_family(model) else 1
    chosen = max_tokens is None
    if max_tokens is None:
        max_tokens = halved_until(seconds / rate, EVALUATED_TOKENS, FEWEST_TOKENS)
    stream = batches(at_most(rows, max_tokens or None), POOL, padding)
    ahead = list(itertools.islice(stream, _LOOK_AHEAD))
    total = sum(batch.tokens for batch in ahead)
    more = len(ahead) == _LOOK_AHEAD
    reason = None
    if chosen and max_tokens < EVALUATED_TOKENS and max_tokens - total < POOL:
        reason = (
            f"{max_tokens:,} tokens at most, chosen for {1 / rate:,.0f} tokens/s here; --tokens {EVALUATED_TOKENS} "
            f"takes about {duration(EVALUATED_TOKENS * rate)}, --tokens 0 reads everything"
        )
    if total * rate > SILENT_SECONDS:
        number = f"{total:,} tokens or more" if more else f"{total:,} tokens"
        announce(
            f"Evaluating {name} on {number}: about {duration(total * rate)}{' or more' if more else ''}."
            f"{f' Of the text: {reason}.' if reason else ''}"
        )
    found = _losses(model, itertools.chain(ahead, stream), None if more else total)
    found.figures["amount"] = reason
    return found, max_tokens


def _losses(model: Any, stream: Iterator[Batch], total: int | None) -> _Losses:
    """Loss, and for expert choice both losses and the routes, batch by batch: the text is gone through once."""
    has_routes = is_of_family(model)
    nll: list[Tensor] = []
    found = _Losses({}, torch.empty(0), torch.empty(0), [], [])
    counts: list[Tensor] = []
    seconds = gap = 0.0
    tokens = top_k_tokens = top_k_predicted = num_cut = 0
    routes: RoutingRecord | None = None
    with progress_bar(total=total, desc="Evaluating", unit="token", unit_scale=True) as bar:
        for number, batch in enumerate(stream):
            begin = time.perf_counter()
            with record_routing(model) if has_routes else contextlib.nullcontext() as record:
                losses = token_losses(model, batch.inputs, batch.is_predicted)
            seconds += time.perf_counter() - begin
            if record is not None:
                if routes is not None:
                    record.merge(routes)
                routes = record
            if has_routes and number % TOP_K_EVERY == 0:
                with use_inference_routing(model, "expert_choice"):
                    gap += float((losses - token_losses(model, batch.inputs, batch.is_predicted)).sum())
                top_k_tokens += batch.tokens
                top_k_predicted += len(losses)
            nll.append(row_sums(losses, batch.is_predicted))
            counts.append(batch.is_predicted.double().sum(1))
            found.documents += batch.documents
            found.tokens += [hash(tuple(row)) for row in batch.inputs["input_ids"].tolist()]
            tokens += batch.tokens
            num_cut += batch.num_cut
            bar.update(batch.tokens)
    found.nll, found.predicted = torch.cat(nll), torch.cat(counts)
    units_nll, units = (per_document(values, found.documents) for values in (found.nll, found.predicted))
    loss, error = mean_and_error(units_nll, units)
    found.figures = {
        "tokens": tokens,
        "predicted_tokens": int(found.predicted.sum()),
        "num_cut": num_cut,
        "loss": loss,
        "standard_error": error if math.isfinite(error) else None,
        "units": "documents" if len(set(found.documents)) > 1 else "rows",
        "num_units": len(units),
        "perplexity": math.exp(min(loss, 700)),
        "tokens_per_second": tokens / seconds,
    }
    if routes is not None:
        loss_gap = gap / top_k_predicted
        top_k = {"loss_top_k": loss - loss_gap, "loss_gap": loss_gap, "top_k_tokens": top_k_tokens}
        found.figures |= top_k | {"routes": routes.report()}
    return found


def _difference(first: _Losses, other: _Losses, name: str) -> dict[str, Any]:
    """The first model's loss minus the other's on the same rows, and its standard error, paired."""
    if first.tokens != other.tokens:
        raise AnalysisError(
            f"against={name} reads the text as other tokens (its tokenizer, chat template or context differs), so "
            "losses per token cannot be held against each other; evaluate it by itself"
        )
    nll, reference, predicted = (
        per_document(values, first.documents) for values in (first.nll, other.nll, first.predicted)
    )
    difference, error = paired_difference(nll, reference, predicted)
    return {"difference": {"loss": difference, "standard_error": error if math.isfinite(error) else None}}


def _pairs(model: Any, tokenizer: Any, names: list[str]) -> dict[str, Any]:
    """For each file the share of pairs whose good sentence has the higher likelihood."""
    accuracy: dict[str, float] = {}
    right = total = 0
    files = _pair_files(names)
    _announce_pairs(model, tokenizer, files)
    for path in progress_bar(files, desc="Minimal pairs", unit="file"):
        correct = [
            is_right for chunk in _chunks(_read_pairs(path), 32) for is_right in _prefers(model, tokenizer, chunk, path)
        ]
        if not correct:
            raise AnalysisError(f"pairs={path} is empty")
        accuracy[path.stem] = sum(correct) / len(correct)
        right, total = right + sum(correct), total + len(correct)
    return {"accuracy": right / total, "pairs": total, "files": accuracy}


def _prefers(model: Any, tokenizer: Any, chunk: list[tuple[str, str]], path: Path) -> list[bool]:
    """Of each pair, whether the good sentence is the likelier one."""
    rows = [tokenizer(text, verbose=False)["input_ids"] for pair in chunk for text in pair]
    longest = max(map(len, rows))
    if longest > _context(model):
        raise AnalysisError(f"pairs={path}: a sentence has {longest} tokens, the model's context {_context(model)}")
    scores = log_likelihoods(model, pad(rows, padding_id(tokenizer))).view(-1, 2)
    return (scores[:, 0] > scores[:, 1]).tolist()


def _announce_pairs(model: Any, tokenizer: Any, files: list[Path]) -> None:
    """By the time of the first few and the number of all; what is wrong with a file is said when it is read."""
    try:
        chunk = next(_chunks(_read_pairs(files[0]), 8), None)
        number = 0
        for path in files:
            with path.open("rb") as file:
                number += sum(1 for _ in file)
    except OSError:
        return
    if chunk is None:
        return
    begin = time.perf_counter()
    _prefers(model, tokenizer, chunk, files[0])
    seconds = (time.perf_counter() - begin) / len(chunk) * number
    if seconds > SILENT_SECONDS:
        announce(f"Evaluating {number:,} minimal pairs in {len(files):,} files: about {duration(seconds)}.")


def _pair_files(names: list[str]) -> list[Path]:
    files = []
    for name in names:
        path = Path(name).expanduser()
        found = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise AnalysisError(f"pairs={name} is no .jsonl file and no folder of them")
        files += found
    return files


def _read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                row = json.loads(line)
                pair: Any = (row.get("sentence_good"), row.get("sentence_bad")) if isinstance(row, dict) else (None,)
                if not all(isinstance(sentence, str) and sentence for sentence in pair):
                    raise AnalysisError(f"pairs={path}, line {number}: sentence_good and sentence_bad must be text")
                if not all(map(is_unicode, pair)):
                    raise AnalysisError(f"pairs={path}, line {number}: {HALF_A_PAIR}")
                yield pair
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AnalysisError(f"pairs={path} cannot be read ({error})") from error


def _chunks(pairs: Iterator[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    while chunk := list(itertools.islice(pairs, size)):
        yield chunk
