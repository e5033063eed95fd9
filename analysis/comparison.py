"""Ways of routing side by side: the same checkpoint, experts, text and steps, with other config fields."""

import contextlib
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from ecmoe.progress import progress_bar
from modeling_ecmoe import calibrate_thresholds, sparse_blocks, training_routes

from .errors import AnalysisError
from .limits import COMPARED_TOKENS
from .loading import load_expert_choice
from .text import Batch, fixed_batches, packed, read_documents, windows
from .uncertainty import paired_difference
from .variants import BALANCE_COEFFICIENT, DROPLESS, Variant, configure, variants_of
from .verdict import verdict

WINDOW = 512  # tokens of a row; shorter where the model's context is
POOL = 4_096  # tokens of a batch, among which experts choose
CALIBRATION_BATCHES = 8
HELD_OUT_EVERY = 10  # documents
LEARNING_RATE = 3e-4
ROUNDS = 5
SEED = 0

Routes = Callable[..., tuple[Tensor, int]]


def compare(
    checkpoint: str,
    data: str,
    steps: int = 0,
    text_column: str = "text",
    max_tokens: int = COMPARED_TOKENS,
    device: str | None = None,
) -> dict[str, Any]:
    """Measures token choice, expert choice and threshold routing on one checkpoint and one text.

    Every variant is the checkpoint with other routing fields, for one and for two experts per token (`variants_of`).
    Each sees the same batches: POOL tokens in full rows, documents packed so that none sees another. Every tenth
    document is held out; of the others come the training batches, gone through again where there are too few, and the
    first CALIBRATION_BATCHES of them set the thresholds: after training, and before it as well for threshold routing,
    which trains by them. Training is AdamW at LEARNING_RATE after a short warm-up, in float32; without steps
    everything runs in the checkpoint's dtype. The text is read as far as it is needed, and one variant is in memory at
    a time.

    Args:
        checkpoint: expert-choice checkpoint folder or Hub id.
        data: text file or folder of text files; see `text.read_documents`.
        steps: optimiser steps of each variant before it is measured.
        text_column: of .jsonl and .parquet files.
        max_tokens: held-out tokens, rounded down to whole batches.
        device: the first accelerator, or the CPU, when None.

    Returns:
        The settings; `variants`, one entry each with
        training, the routes that training takes on held-out text: dropped, the share of its choices that an expert had
            no room for; no_expert, the share of tokens left without one; experts_per_token; load_max and load_cv, the
            largest load over the mean and the coefficient of variation over experts of the rows they compute, mean
            over layers and batches; loss with these routes, which see the future under expert choice;
        inference, causal: loss in nats per token, and the same figures of its routes;
        gap, the causal loss minus the loss with training's routes;
        loss_against_dropless, difference and standard_error (paired over rows of text) of the causal loss to
            dropless token choice with as many experts per token;
        step, of forward and backward pass on one batch: seconds, ratio to that reference (medians), and the ratio of
            each round;
        auxiliary_losses, what training adds to the loss;
        and `verdict`, sentences that say what these figures show.

    Raises:
        AnalysisError: for anything the user can put right.
    """
    if not isinstance(checkpoint, str | os.PathLike):
        raise AnalysisError("checkpoint must be a folder or Hub id: it is loaded anew for each routing; save the model")
    checkpoint = os.fspath(checkpoint)
    if steps < 0:
        raise AnalysisError(f"steps={steps} must not be negative; 0 compares without training")
    if max_tokens < 1:
        raise AnalysisError(f"max_tokens={max_tokens} must be at least 1; it is what is measured on")
    model, tokenizer = load_expert_choice(checkpoint, device)
    config = model.config
    variants = variants_of(config.num_experts)
    length = min(WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)
    text = _read(tokenizer, data, text_column, length, steps, max_tokens)
    # The step time comes first: it is one model's, in the checkpoint's dtype, whatever is trained afterwards.
    times = _step_times(model, variants, text.training[0])
    result = {"checkpoint": checkpoint, "steps": steps} | _settings(model, text, steps)
    del model, config
    dtype = "float32" if steps else "auto"
    passes = steps + 2 * len(text.held_out)
    measured = []
    with progress_bar(total=passes * len(variants), desc="Comparing", unit="pass") as bar:
        for variant in variants:
            bar.set_description(f"{variant.name}, {variant.num_choices} per token")
            gc.collect()
            model, _ = load_expert_choice(checkpoint, device, dtype)
            measured.append(_measure(model, variant, text, steps, bar.update))
            del model
    result["variants"] = _entries(variants, measured, times)
    result["verdict"] = verdict(result)
    return result


def _settings(model: Any, text: "_Text", steps: int) -> dict[str, Any]:
    return {
        "model_type": model.config.model_type,
        "num_experts": model.config.num_experts,
        "normalize_combine_weights": model.config.normalize_combine_weights,
        "learning_rate": LEARNING_RATE,
        "balance_loss_coefficient": BALANCE_COEFFICIENT,
        "tokens_per_batch": text.held_out[0]["input_ids"].numel(),
        "row_length": text.held_out[0]["input_ids"].shape[1],
        "held_out_tokens": sum(batch["input_ids"].numel() for batch in text.held_out),
        "training_batches": min(steps, len(text.training)),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True)
class _Text:
    """Batches of one shape: input_ids, position_ids and labels [B, S]."""

    training: list[Batch]
    held_out: list[Batch]


def _read(tokenizer: Any, data: str, text_column: str, length: int, steps: int, max_tokens: int) -> _Text:
    """The batches that are needed and no more, from documents that are apart."""
    rows = max(1, POOL // length)
    wanted = {True: max(1, max_tokens // (rows * length)), False: max(steps, CALIBRATION_BATCHES)}

    def read(held_out: bool) -> list[Batch]:
        numbered = enumerate(read_documents(data, text_column))
        documents = (document for number, document in numbered if (number % HELD_OUT_EVERY == 0) == held_out)
        batches = fixed_batches(packed(windows(tokenizer, documents, length), length), rows)
        found = list(itertools.islice(batches, wanted[held_out]))
        if not found:
            share = f"every {HELD_OUT_EVERY}th document" if held_out else "the others"
            raise AnalysisError(
                f"data={data} holds too little text: {share} must fill a batch of {rows * length} tokens to "
                f"{'measure' if held_out else 'train and calibrate'} on; give more documents"
            )
        return found

    return _Text(held_out=read(True), training=read(False))


@dataclass
class _Measured:
    """One variant's figures; nll and predicted are [rows] of the held-out text, causal."""

    training: dict[str, float]
    inference: dict[str, float]
    nll: Tensor
    predicted: Tensor


def _measure(model: Any, variant: Variant, text: _Text, steps: int, on_pass: Callable[[], Any]) -> _Measured:
    configure(model, variant)
    calibration = [_inputs(batch) for batch in text.training[:CALIBRATION_BATCHES]]
    torch.manual_seed(SEED)  # of the router's jitter and of dropout, where the checkpoint has any
    if steps:
        if variant.trains_by_threshold:
            calibrate_thresholds(model, calibration)
        train(model, text.training, steps, on_pass)
    if variant.has_thresholds:
        calibrate_thresholds(model, calibration)
    training, _, _ = _held_out(model.train(), text.held_out, _training_routes, on_pass)
    inference, nll, predicted = _held_out(model.eval(), text.held_out, _inference_routes, on_pass)
    if not math.isfinite(training["loss"] + inference["loss"]):
        raise AnalysisError(
            f"steps={steps}: {variant.name}, k={variant.num_choices}, has diverged, its loss is no number; compare "
            "with fewer steps, or without"
        )
    return _Measured(training, inference, nll, predicted)


def train(model: Any, batches: list[Batch], steps: int, on_pass: Callable[[], Any] = lambda: None) -> None:
    """AdamW at a constant LEARNING_RATE after a tenth of the steps of warm-up, gradients clipped at 1."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))
    for step in range(steps):
        batch = {name: tensor.to(model.device) for name, tensor in batches[step % len(batches)].items()}
        model(**batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_pass()


def _inputs(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _training_routes(block: Any, scores_TE: Tensor, _threshold_E: Tensor) -> tuple[Tensor, int]:
    return training_routes(block, scores_TE)


def _inference_routes(block: Any, scores_TE: Tensor, threshold_E: Tensor) -> tuple[Tensor, int]:
    return block.routes(scores_TE, threshold_E), 0


@dataclass
class _Counts:
    """Of one pass after the other, layer by layer."""

    dropped: int = 0
    chosen: int = 0
    uncovered: int = 0
    tokens: int = 0
    load_max: list[float] = field(default_factory=list)
    load_cv: list[float] = field(default_factory=list)

    def add(self, routes_TE: Tensor, dropped: int) -> None:
        load_E = routes_TE.sum(0).double()
        self.dropped += dropped
        self.chosen += int(load_E.sum())
        self.uncovered += int((~routes_TE.any(1)).sum())
        self.tokens += len(routes_TE)
        mean = load_E.mean().clamp(min=1e-9)
        self.load_max.append(float(load_E.max() / mean))
        self.load_cv.append(float(load_E.std(correction=0) / mean))

    def figures(self) -> dict[str, float]:
        return {
            "dropped": self.dropped / max(self.chosen + self.dropped, 1),
            "no_expert": self.uncovered / self.tokens,
            "experts_per_token": self.chosen / self.tokens,
            "load_max": statistics.fmean(self.load_max),
            "load_cv": statistics.fmean(self.load_cv),
        }


@contextlib.contextmanager
def _count(model: nn.Module, routes_of: Routes) -> Iterator[_Counts]:
    """Counts the routes that `routes_of` finds for every block's scores while the context is open."""
    counts = _Counts()

    def hook_of(block: Any) -> Callable[..., None]:
        return lambda _module, _args, output: counts.add(*routes_of(block, output[1], output[2]))

    handles = [block.gate.register_forward_hook(hook_of(block)) for block in sparse_blocks(model).values()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _held_out(
    model: Any, batches: list[Batch], routes_of: Routes, on_pass: Callable[[], Any]
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Figures of the routes with the loss, and of each row its summed loss and its predicted tokens, float64."""
    losses, predicted = [], []
    with _count(model, routes_of) as counts:
        for batch in batches:
            labels = batch["labels"][:, 1:].to(model.device)
            inputs = {name: tensor.to(model.device) for name, tensor in _inputs(batch).items()}
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            # Positions without a label, the first of each document, count 0.
            per_token = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            losses.append(per_token.double().sum(1).cpu())
            predicted.append((labels != -100).double().sum(1).cpu())
            on_pass()
    nll, count = torch.cat(losses), torch.cat(predicted)
    return counts.figures() | {"loss": float(nll.sum() / count.sum())}, nll, count


def _step_times(model: Any, variants: list[Variant], batch: Batch) -> list[list[float]]:
    """Seconds of a training step's forward and backward pass, [variants][rounds].

    One model takes every variant's fields in turn, since blocks read them at each call; in every round all variants
    run once, in another order, so that whatever else the machine does meets all of them alike.
    """
    random = Random(SEED)
    seconds: list[list[float]] = [[] for _ in variants]
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    model.train()
    total = (1 + ROUNDS) * len(variants)
    with progress_bar(total=total, desc="Timing steps", unit="step") as bar:
        for is_warm in (False, *[True] * ROUNDS):
            order = list(range(len(variants)))
            random.shuffle(order)
            for number in order:
                configure(model, variants[number])
                model.zero_grad()
                _wait(model.device)
                begin = time.perf_counter()
                model(**batch, use_cache=False).loss.backward()
                _wait(model.device)
                if is_warm:
                    seconds[number].append(time.perf_counter() - begin)
                bar.update()
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _entries(variants: list[Variant], measured: list[_Measured], times: list[list[float]]) -> list[dict[str, Any]]:
    """The figures of each variant, and against dropless token choice with as many experts per token."""
    reference = {v.num_choices: number for number, v in enumerate(variants) if v.name == DROPLESS}
    entries = []
    for number, (variant, own) in enumerate(zip(variants, measured, strict=True)):
        other = reference[variant.num_choices]
        difference, error = paired_difference(own.nll, measured[other].nll, own.predicted)
        ratios = [mine / its for mine, its in zip(times[number], times[other], strict=True)]
        entries.append(
            {
                "name": variant.name,
                "num_choices": variant.num_choices,
                "is_token_choice": variant.is_token_choice,
                "fields": variant.fields,
                "training": own.training,
                "inference": {name: value for name, value in own.inference.items() if name != "dropped"},
                "gap": own.inference["loss"] - own.training["loss"],
                "loss_against_dropless": {"difference": difference, "standard_error": error},
                "step": {
                    "seconds": statistics.median(times[number]),
                    "ratio": statistics.median(ratios),
                    "ratios": ratios,
                },
                "auxiliary_losses": variant.auxiliary_losses,
            }
        )
    return entries
