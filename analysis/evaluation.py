"""Losses, speed and routes of a checkpoint on text, and its choices between minimal pairs."""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecmoe.progress import progress_bar
from modeling_ecmoe import RoutingRecord, record_routing, use_inference_routing

from .errors import AnalysisError
from .limits import EVALUATED_TOKENS
from .loading import is_of_family, name_of, opened, padding_id
from .text import HALF_A_PAIR, batches, is_unicode, pad, read_documents, windows

WINDOW = 512  # tokens; shorter where the model's context is
POOL = 4_096  # tokens of a batch, among which experts choose for the top-k loss


def evaluate(
    checkpoint: Any,
    data: str | None = None,
    pairs: list[str] | None = None,
    text_column: str = "text",
    max_tokens: int | None = EVALUATED_TOKENS,
    device: str | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Evaluates a causal language model: an expert-choice one, or one to hold it against, such as its dense parent.

    Args:
        checkpoint: folder or Hub id, or a model in memory, with its tokenizer.
        data: text file or folder of text files; see `text.read_documents`.
        pairs: files of minimal pairs, rows of JSON with sentence_good and sentence_bad (as BLiMP,
            arXiv 1912.00582), or folders of such files.
        text_column: of .jsonl and .parquet files.
        max_tokens: read at most about so many tokens of text; None reads all.
        device: the first accelerator, or the CPU, when None; a model in memory is run where it is.
        tokenizer: of a model in memory.

    Returns:
        thresholds_from: the text they were measured on, where that is known. Of text: loss (causal, nats per token),
        perplexity, loss_top_k (experts choose among the batch, which looks at the future), loss_gap, tokens,
        tokens_per_second, and the routes: summary and layers as `modeling_ecmoe.routing_report`; a model that is not of
        this family has no loss_top_k, loss_gap and routes. Of pairs: the share of pairs whose good sentence is more
        likely, for each file and over all.

    Raises:
        AnalysisError: for anything the user can put right.
    """
    if data is None and not pairs:
        raise AnalysisError("there is nothing to evaluate on; give data, pairs, or both")
    if max_tokens is not None and max_tokens < 0:
        raise AnalysisError(f"max_tokens={max_tokens} must not be negative; leave it out, or give 0 to read everything")
    with opened(checkpoint, tokenizer, device) as (model, tokenizer):
        result: dict[str, Any] = {"checkpoint": name_of(checkpoint), "model_type": model.config.model_type}
        if getattr(model.config, "thresholds_from", None):
            result["thresholds_from"] = model.config.thresholds_from
        if data is not None:
            sequences = windows(tokenizer, read_documents(data, text_column), min(WINDOW, _context(model)))
            result |= _losses(model, batches(sequences, POOL, max_tokens, padding_id(tokenizer)), data)
        if pairs:
            result["pairs"] = _pairs(model, tokenizer, pairs)
    return result


def _context(model: Any) -> int:
    return getattr(model.config, "max_position_embeddings", None) or WINDOW


@torch.no_grad()
def _losses(model: Any, stream: Iterator[dict[str, Tensor]], data: str) -> dict[str, Any]:
    """Loss, and for expert choice both losses and the routes, batch by batch: the text is gone through once."""
    has_routes = is_of_family(model)
    causal = top_k = seconds = 0.0
    predicted = tokens = 0
    routes: RoutingRecord | None = None
    for batch in progress_bar(stream, desc="Evaluating", unit="batch"):
        begin = time.perf_counter()
        with record_routing(model) if has_routes else contextlib.nullcontext() as record:
            causal += -log_likelihoods(model, batch).sum().item()  # .item() waits for the device
        seconds += time.perf_counter() - begin
        if record is not None:
            with use_inference_routing(model, "expert_choice"):
                top_k += -log_likelihoods(model, batch).sum().item()
            if routes is not None:
                record.merge(routes)
            routes = record
        real = int(batch["attention_mask"].sum())
        tokens += real
        predicted += real - len(batch["input_ids"])
    if not predicted:
        raise AnalysisError(f"data={data} holds no text; every document is empty or a single token")
    loss = causal / predicted
    figures = {
        "tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "tokens_per_second": tokens / seconds,
    }
    if routes is None:
        return figures
    loss_top_k = top_k / predicted
    return figures | {"loss_top_k": loss_top_k, "loss_gap": loss - loss_top_k, "routes": routes.report()}


def log_likelihoods(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[B] float64: the log-likelihood of each row's tokens after its first, in nats; padding counts nothing."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    targets, is_real = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return -(losses.double() * is_real).sum(1).cpu()


@torch.no_grad()
def _pairs(model: Any, tokenizer: Any, names: list[str]) -> dict[str, Any]:
    """For each file the share of pairs whose good sentence has the higher likelihood."""
    accuracy: dict[str, float] = {}
    right = total = 0
    for path in progress_bar(_pair_files(names), desc="Minimal pairs", unit="file"):
        correct = []
        for chunk in _chunks(_read_pairs(path), 32):
            rows = [tokenizer(text, verbose=False)["input_ids"] for pair in chunk for text in pair]
            longest = max(map(len, rows))
            if longest > _context(model):
                raise AnalysisError(
                    f"pairs={path}: a sentence has {longest} tokens, the model's context {_context(model)}"
                )
            scores = log_likelihoods(model, pad(rows, padding_id(tokenizer))).view(-1, 2)
            correct += (scores[:, 0] > scores[:, 1]).tolist()
        if not correct:
            raise AnalysisError(f"pairs={path} is empty")
        accuracy[path.stem] = sum(correct) / len(correct)
        right, total = right + sum(correct), total + len(correct)
    return {"accuracy": right / total, "pairs": total, "files": accuracy}


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
