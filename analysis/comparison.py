"""Ways of routing side by side: the same checkpoint, experts, text and steps, with other config fields."""

import gc
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ecmoe.progress import announce, progress_bar
from modeling_ecmoe import calibrate_thresholds, sparse_blocks

from .amounts import Amounts, calibrated_tokens, choose, described, in_words, named
from .counting import held_out_figures, inputs_of, routes_of_inference, routes_of_training
from .errors import AnalysisError
from .limits import COMPARED_TOKENS, COMPARISON_SECONDS, QUICK_SECONDS
from .loading import load_expert_choice
from .planning import MEASURED_TOKENS, seconds_per_token
from .step_times import step_times
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


def compare(
    checkpoint: str,
    data: str,
    steps: int = 0,
    text_column: str | None = None,
    max_tokens: int | None = None,
    device: str | None = None,
    routings: list[str] | None = None,
    timing: bool = True,
    minutes: float | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Measures token choice, expert choice and threshold routing on one checkpoint and one text.

    Every variant is the checkpoint with other routing fields, for one and for two experts per token, or for as many as
    a checkpoint of more has (`variants_of`). Each sees the same batches: POOL tokens in full rows, documents packed so
    that none sees another. Every tenth document is held out; of the others come the training batches, gone through
    again where there are too few, and the first CALIBRATION_BATCHES of them set the thresholds: after training, and
    before it as well for threshold routing, which trains by them. Training is AdamW at LEARNING_RATE after a short
    warm-up, in float32; without steps everything runs in the checkpoint's dtype, and what variants have in common is
    computed once. The text is read as far as it is needed, and one model is in memory at a time.

    What does not fit into the time, by a rate measured on one small pass, is left out by `amounts.choose`: other
    numbers of experts per token, some ways of routing, tokens, rounds.

    Args:
        checkpoint: expert-choice checkpoint folder or Hub id.
        data: text file or folder of text files; see `text.read_documents`.
        steps: optimiser steps of each variant before it is measured.
        text_column: of .jsonl and .parquet files; None is text.
        max_tokens: held-out tokens at most, in whole batches; None is COMPARED_TOKENS, or fewer where time is short.
        device: the first accelerator, or the CPU, when None.
        routings: keys of the variants to compare, such as expert-choice, or at-least-1:2 for two experts per token
            alone; ["all"] are all of them, None those for which there is time.
        timing: whether training steps are timed.
        minutes: for all of it; None is COMPARISON_SECONDS.
        quick: a single minute.

    Returns:
        The settings, with `amount`: what was done and `left_out`, in words, for want of time; `variants`, one entry
        each with
        training, the routes that training takes on held-out text: dropped, the share of its choices that an expert had
            no room for; no_expert, the share of tokens left without one; experts_per_token; load_max and load_cv, the
            largest load over the mean and the coefficient of variation over experts of the rows they compute, mean
            over layers and batches; loss with these routes, which see the future under expert choice;
        inference, causal: loss in nats per token, and the same figures of its routes;
        gap, the causal loss minus the loss with training's routes;
        loss_against_dropless, difference and standard_error (paired over rows of text) of the causal loss to
            dropless token choice with as many experts per token; loss_against_lowest, to the variant with the lowest;
        step, of forward and backward pass on one batch: seconds, ratio to that reference (medians), and the ratio of
            each round; None where nothing was timed;
        auxiliary_losses, what training adds to the loss;
        and `verdict`, sentences that say what these figures show.

    Raises:
        AnalysisError: for anything the user can put right.
    """
    if not isinstance(checkpoint, str | os.PathLike):
        raise AnalysisError("checkpoint must be a folder or Hub id: it is loaded anew for each routing; save the model")
    checkpoint = os.fspath(checkpoint)
    _refuse_numbers(steps, max_tokens, minutes, quick)
    model, tokenizer = load_expert_choice(checkpoint, device)
    config = model.config.get_text_config()
    everything, fixed = _everything(config, routings, max_tokens, timing, steps)
    text = _read(tokenizer, data, text_column or "text", _row_length(config), steps, everything.held_out)
    found = sum(batch["input_ids"].numel() for batch in text.held_out)
    everything = replace(everything, held_out=found, calibration=min(CALIBRATION_BATCHES, len(text.training)))
    rates = _rates(model, everything.variants, text.held_out[0])
    seconds = QUICK_SECONDS if quick else 60 * minutes if minutes else COMPARISON_SECONDS
    amounts = choose(everything, rates, steps, seconds, round(model.config.get_text_config().capacity_factor), fixed)
    text = text.first(amounts, steps)
    result: dict[str, Any] = {"checkpoint": checkpoint, "steps": steps} | _settings(model, text, steps)
    result["amount"] = described(amounts, everything, rates, steps)
    announce(f"Comparing {checkpoint}: {in_words(result['amount'])}")
    # The step time comes first: it is one model's, in the checkpoint's dtype, whatever is trained afterwards.
    variants = list(amounts.variants)
    times = step_times(model, variants, _part(text.training[0], amounts.step_tokens), amounts.rounds, SEED)
    if steps:
        del model
        loaded = _load_anew(checkpoint, device)
    else:
        loaded = _restore(model)
    measured = _measure_all(loaded, variants, text, steps, amounts)
    result["variants"] = _entries(variants, measured, times)
    result["verdict"] = verdict(result)
    return result


def _refuse_numbers(steps: int, max_tokens: int | None, minutes: float | None, quick: bool) -> None:
    if steps < 0:
        raise AnalysisError(f"steps={steps} must not be negative; 0 compares without training")
    if max_tokens is not None and max_tokens < 2:
        raise AnalysisError(f"max_tokens={max_tokens} must be at least 2; it is what is measured on")
    if minutes is not None and not 0 < minutes < math.inf:
        raise AnalysisError(f"minutes={minutes} must be a number above 0")
    if minutes is not None and quick:
        raise AnalysisError(f"minutes={minutes} and quick, which is one minute, exclude each other; give one of them")


def _row_length(config: Any) -> int:
    return min(WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)


def _everything(
    config: Any, routings: list[str] | None, max_tokens: int | None, timing: bool, steps: int
) -> tuple[Amounts, set[str]]:
    """What is compared where time is no matter, and what of it was asked for; a bias that no step nudges is none."""
    bias_update_rate, groups = config.token_choice_bias_update_rate, config.num_expert_groups
    possible = variants_of(config.num_experts, config.capacity_factor, bias_update_rate, groups)
    found = named(possible, routings)
    if routings is None and not steps:
        found = [variant for variant in found if variant.key != "nudged-bias"]
    held_out = COMPARED_TOKENS if max_tokens is None else max_tokens
    pool = min(POOL, held_out)
    amounts = Amounts(tuple(found), held_out, CALIBRATION_BATCHES, ROUNDS if timing else 0, pool, pool)
    asked = {"variants": routings is not None, "held_out": max_tokens is not None, "rounds": not timing}
    return amounts, {name for name, is_asked in asked.items() if is_asked}


def _rates(model: Any, variants: Sequence[Variant], batch: Batch) -> dict[int, float]:
    """Seconds per token of a forward pass, for each number of experts per token, without thresholds."""
    rows = max(1, MEASURED_TOKENS // batch["input_ids"].shape[1])
    inputs, labels = inputs_of(_part(batch, rows * batch["input_ids"].shape[1])), batch["labels"][:rows, 1:]
    rates = {}
    for variant in (v for v in variants if v.name == DROPLESS):
        configure(model, variant)
        rates[variant.num_choices] = seconds_per_token(model, inputs, labels != -100)
    return rates


def _part(batch: Batch, tokens: int) -> Batch:
    """Rows of so many tokens; of a row where it has more."""
    length = min(tokens, batch["input_ids"].shape[1])
    return {name: tensor[: tokens // length, :length] for name, tensor in batch.items()}


def _settings(model: Any, text: "_Text", steps: int) -> dict[str, Any]:
    return {
        "model_type": model.config.model_type,
        "num_experts": model.config.get_text_config().num_experts,
        "normalize_combine_weights": model.config.get_text_config().normalize_combine_weights,
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

    def first(self, amounts: Amounts, steps: int) -> "_Text":
        """As many of them as a comparison of these amounts takes."""
        held_out = max(1, amounts.held_out // self.held_out[0]["input_ids"].numel())
        return _Text(self.training[: max(steps, amounts.calibration)], self.held_out[:held_out])


def _read(tokenizer: Any, data: str, text_column: str, length: int, steps: int, max_tokens: int) -> _Text:
    """The batches that are needed and no more, from documents that are apart; held out are max_tokens at most."""
    length = min(length, max_tokens)
    rows = max(1, min(POOL, max_tokens) // length)
    wanted = {True: max_tokens // (rows * length), False: max(steps, CALIBRATION_BATCHES)}

    def read(held_out: bool) -> list[Batch]:
        numbered = enumerate(read_documents(data, text_column))
        documents = (document for number, document in numbered if (number % HELD_OUT_EVERY == 0) == held_out)
        batches = fixed_batches(packed(windows(tokenizer, documents, length), length), rows)
        found = list(itertools.islice(batches, wanted[held_out]))
        if not found:
            share = f"every {HELD_OUT_EVERY}th document" if held_out else "the others"
            raise AnalysisError(
                f"data={data} holds too little text: {share} must fill a batch of {rows * length} tokens to "
                f"{'measure' if held_out else 'train and calibrate'} on; give more documents, or a smaller "
                "--tokens (max_tokens)"
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


def _load_anew(checkpoint: str, device: str | None) -> Callable[[], Any]:
    """A model for each variant to train, in float32; one is in memory at a time."""

    def load() -> Any:
        gc.collect()
        return load_expert_choice(checkpoint, device, "float32")[0]

    return load


def _restore(model: Any) -> Callable[[], Any]:
    """One model for all, with the buffers that it had: where nothing is trained, these are all that changes."""
    model.zero_grad()  # of the timed steps
    before = _buffers(model)

    def restore() -> Any:
        _set_buffers(model, before)
        return model

    return restore


def _buffers(model: Any) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _set_buffers(model: Any, values: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(values[name])


def _measure_all(
    loaded: Callable[[], Any], variants: list[Variant], text: _Text, steps: int, amounts: Amounts
) -> list[_Measured]:
    """One variant after the other, each with a line that says what was found."""
    tokens = sum(batch["input_ids"].numel() for batch in text.held_out)
    calibrated = [calibrated_tokens(amounts, variant) for variant in variants]
    passes = len(variants) * (2 * tokens + steps * text.training[0]["input_ids"].numel()) + sum(calibrated)
    measured: list[_Measured] = []
    known: dict[Any, _Known] = {}
    with progress_bar(total=passes, desc="Comparing", unit="token", unit_scale=True) as bar:
        for number, (variant, beside) in enumerate(zip(variants, calibrated, strict=True), start=1):
            bar.set_description(f"{variant.name}, {variant.num_choices} per token", refresh=False)
            if steps:
                known = {}
            found = _measure(loaded(), variant, text, steps, amounts.calibration, known, bar.update)
            bar.update(beside)
            measured.append(found)
            _say(
                f"{number} of {len(variants)}: {variant.num_choices} per token, {variant.name}: causal loss "
                f"{found.inference['loss']:.4f}; in training {found.training['loss']:.4f}, no expert "
                f"{found.training['no_expert']:.1%}, largest load {found.training['load_max']:.2f}"
            )
    return measured


def _say(line: str) -> None:
    """A line above a bar, or among the lines of a log."""
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)
    else:
        announce(line)


@dataclass
class _Known:
    """What inference finds, and the buffers that a model has then, thresholds among them."""

    found: tuple[dict[str, float], Tensor, Tensor]
    buffers: dict[str, Tensor]


def _measure(
    model: Any,
    variant: Variant,
    text: _Text,
    steps: int,
    batches: int,
    known: dict[Any, _Known],
    on_pass: Callable[[int], Any],
) -> _Measured:
    """batches: of the training text, to calibrate on. known: what was found, by `Variant.inference_key`; it is used
    and added to."""
    configure(model, variant)
    if variant.starts_without_bias:
        for block in sparse_blocks(model).values():
            block.gate.threshold.zero_()
    calibration = [inputs_of(batch) for batch in text.training[:batches]]
    torch.manual_seed(SEED)  # of the router's jitter and of dropout, where the checkpoint has any
    if steps:
        if variant.trains_by_threshold:
            calibrate_thresholds(model, calibration)
        train(model, text.training, steps, on_pass)
    before = known.get(variant.inference_key)
    if before is not None:
        _set_buffers(model, before.buffers)
    elif variant.has_thresholds:
        calibrate_thresholds(model, calibration)
    training, _, _ = held_out_figures(model.train(), text.held_out, routes_of_training, on_pass)
    if before is None:
        found = held_out_figures(model.eval(), text.held_out, routes_of_inference, on_pass)
        before = known[variant.inference_key] = _Known(found, _buffers(model))
    inference, nll, predicted = before.found
    if not math.isfinite(training["loss"] + inference["loss"]):
        raise AnalysisError(
            f"steps={steps}: {variant.name}, k={variant.num_choices}, has diverged, its loss is no number; compare "
            "with fewer steps, or without"
        )
    return _Measured(training, inference, nll, predicted)


def train(model: Any, batches: list[Batch], steps: int, on_pass: Callable[[int], Any] = lambda tokens: None) -> None:
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
        on_pass(batch["input_ids"].numel())


def _entries(variants: list[Variant], measured: list[_Measured], times: list[list[float]]) -> list[dict[str, Any]]:
    """The figures of each variant, and against dropless token choice with as many experts per token and the best."""
    reference = {v.num_choices: number for number, v in enumerate(variants) if v.name == DROPLESS}
    by_loss = sorted(range(len(variants)), key=lambda number: -measured[number].inference["loss"])
    lowest = {variants[number].num_choices: number for number in by_loss}
    entries = []
    for number, (variant, own) in enumerate(zip(variants, measured, strict=True)):
        other = reference[variant.num_choices]
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
                "loss_against_dropless": _difference(own, measured[other]),
                "loss_against_lowest": _difference(own, measured[lowest[variant.num_choices]]),
                "step": {
                    "seconds": statistics.median(times[number]),
                    "ratio": statistics.median(ratios),
                    "ratios": ratios,
                }
                if ratios
                else None,
                "auxiliary_losses": variant.auxiliary_losses,
            }
        )
    return entries


def _difference(own: _Measured, other: _Measured) -> dict[str, float]:
    difference, error = paired_difference(own.nll, other.nll, own.predicted)
    return {"difference": difference, "standard_error": error}
