"""How much a comparison does: everything where that fits into its time, and less of it, level by level, elsewhere.

Seconds are estimated from passes: a training step is taken for as long as PASSES_OF_A_STEP forward passes, and a
calibration goes through its text once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ecmoe.progress import duration

from .errors import AnalysisError
from .variants import DROPLESS, Variant

PASSES_OF_A_STEP = 3.5


@dataclass(frozen=True)
class Amounts:
    """held_out: tokens to measure on. calibration: batches of `pool` tokens. rounds: of timed steps, after one that
    warms up; 0 times nothing. step_tokens: of a timed step."""

    variants: tuple[Variant, ...]
    held_out: int
    calibration: int
    rounds: int
    step_tokens: int
    pool: int


# What of everything is done: routings, and shares of held-out tokens, calibration, rounds, and tokens of a timed step.
_LEVELS: tuple[tuple[str, float, float, float, float], ...] = (
    ("all", 1, 1, 1, 1),
    ("all", 1 / 2, 1 / 2, 3 / 5, 1 / 2),
    ("own", 1 / 2, 1 / 2, 3 / 5, 1 / 4),
    ("few", 1 / 4, 1 / 4, 2 / 5, 1 / 4),
    ("few", 1 / 8, 1 / 8, 2 / 5, 1 / 8),
    ("two", 1 / 8, 1 / 8, 0, 1 / 8),
)
_FEW = ("dropless", "nudged-bias", "quantiles", "expert-choice", "threshold")
_TWO = ("dropless", "expert-choice")


def choose(
    everything: Amounts, rates: Mapping[int, float], steps: int, seconds: float, own: int, fixed: set[str]
) -> Amounts:
    """The first level that fits into the time, or the last one.

    Args:
        everything: what is done where there is time.
        rates: seconds per token of a forward pass, for each number of experts per token.
        own: the checkpoint's experts per token, kept where others are left out.
        fixed: "variants", "held_out", "rounds": what was asked for, and stays as it is.
    """
    found = everything
    for routings, held_out, calibration, rounds, step in _LEVELS:
        found = replace(
            everything,
            variants=everything.variants if "variants" in fixed else _some(everything.variants, routings, own),
            held_out=everything.held_out if "held_out" in fixed else round(everything.held_out * held_out),
            calibration=max(1, round(everything.calibration * calibration)),
            rounds=everything.rounds if "rounds" in fixed else round(everything.rounds * rounds),
            step_tokens=max(1, round(everything.step_tokens * step)),
        )
        if estimate(found, rates, steps) <= seconds:
            break
    return found


def _some(variants: tuple[Variant, ...], routings: str, own: int) -> tuple[Variant, ...]:
    numbers = {variant.num_choices for variant in variants}
    own = min(numbers, key=lambda number: abs(number - own))
    keys = {"few": _FEW, "two": _TWO}.get(routings)
    return tuple(
        variant
        for variant in variants
        if routings == "all" or (variant.num_choices == own and (keys is None or variant.key in keys))
    )


def estimate(amounts: Amounts, rates: Mapping[int, float], steps: int) -> float:
    """Seconds that a comparison takes."""
    total = 0.0
    seen: set[Any] = set()
    for variant in amounts.variants:
        tokens: float = amounts.held_out
        is_new = steps > 0 or variant.inference_key not in seen
        seen.add(variant.inference_key)
        if is_new:
            tokens += amounts.held_out
            tokens += calibrated_tokens(amounts, variant) * (2 if steps and variant.trains_by_threshold else 1)
        tokens += PASSES_OF_A_STEP * steps * amounts.pool
        if amounts.rounds:
            tokens += PASSES_OF_A_STEP * (1 + amounts.rounds) * amounts.step_tokens
        total += tokens * rates[variant.num_choices]
    return total


def calibrated_tokens(amounts: Amounts, variant: Variant) -> int:
    """That go through the model in one calibration: once, as long as its scores are kept (calibration_ecmoe.py)."""
    return amounts.calibration * amounts.pool if variant.has_thresholds else 0


def named(variants: list[Variant], names: list[str] | None) -> list[Variant]:
    """The variants of these names, each for every number of experts per token or, as in dropless:1, for one; and the
    reference that they are held against.

    Raises:
        AnalysisError: for an unknown name.
    """
    if names is None or names == ["all"]:
        return variants
    known = list(dict.fromkeys(variant.key for variant in variants))
    wanted: set[tuple[str, int]] = set()
    for name in names:
        found = {(v.key, v.num_choices) for v in variants if name in (v.key, f"{v.key}:{v.num_choices}")}
        if not found:
            numbers = sorted({variant.num_choices for variant in variants})
            raise AnalysisError(
                f"routings={name} is unknown; choose all or some of {', '.join(known)}, with "
                f"{' or '.join(f':{number}' for number in numbers)} for so many experts per token alone"
            )
        wanted |= found
    numbers_wanted = {number for _, number in wanted}
    return [
        variant
        for variant in variants
        if (variant.key, variant.num_choices) in wanted
        or (variant.name == DROPLESS and variant.num_choices in numbers_wanted)
    ]


def _left_out(chosen: Amounts, everything: Amounts) -> list[str]:
    """What a comparison does less than everything, in words."""
    parts = []
    if len(chosen.variants) < len(everything.variants):
        missing = [v for v in everything.variants if v not in chosen.variants]
        numbers = {v.num_choices for v in chosen.variants}
        whole = sorted({v.num_choices for v in missing} - numbers)
        if whole:
            parts.append(f"{' and '.join(map(str, whole))} expert{'s' if whole != [1] else ''} per token")
        keys = [v.key for v in missing if v.num_choices in numbers]
        parts += [f"{', '.join(dict.fromkeys(keys))} with {min(numbers)} per token"] if keys else []
    for now, full, what in (
        (chosen.held_out, everything.held_out, "held-out tokens"),
        (chosen.calibration, everything.calibration, "batches to calibrate on"),
        (chosen.rounds, everything.rounds, "timed rounds"),
        (chosen.step_tokens, everything.step_tokens, "tokens in a timed step"),
    ):
        if now < full and (what != "tokens in a timed step" or chosen.rounds):
            parts.append(f"{full:,} {what} ({now:,} here)" if now else "the time of a training step")
    return parts


def described(amounts: Amounts, everything: Amounts, rates: Mapping[int, float], steps: int) -> dict[str, Any]:
    """As a comparison's result has it; `in_words` makes sentences of it."""
    return {
        "routings": len(amounts.variants),
        "held_out_tokens": amounts.held_out,
        "calibration_batches": amounts.calibration,
        "timed_rounds": amounts.rounds,
        "timed_tokens": amounts.step_tokens if amounts.rounds else 0,
        "training_steps": steps,
        "tokens_per_batch": amounts.pool,
        "tokens_per_second": 1 / max(rates.values()),
        "seconds": estimate(amounts, rates, steps),
        "left_out": _left_out(amounts, everything),
        "seconds_of_everything": estimate(everything, rates, steps),
    }


def in_words(amount: dict[str, Any]) -> str:
    """What a comparison does and how long it takes, and what is left out for want of time."""
    rounds, steps = amount["timed_rounds"], amount["training_steps"]
    batches = f"{amount['calibration_batches']} batch{'es' if amount['calibration_batches'] > 1 else ''}"
    timed = f"{rounds} timed rounds of {amount['timed_tokens']:,} tokens" if rounds else "nothing timed"
    text = (
        f"{amount['routings']} ways of routing, {f'{steps} training steps each, ' if steps else ''}"
        f"{amount['held_out_tokens']:,} tokens held out, {batches} of "
        f"{amount['tokens_per_batch']:,} to calibrate, {timed}; about {duration(amount['seconds'])} at "
        f"{amount['tokens_per_second']:,.0f} tokens/s."
    )
    if not amount["left_out"]:
        return text
    whole = amount["seconds_of_everything"]
    minutes = math.ceil(1.2 * whole / 60)  # a rate measured again is another one
    return (
        f"{text} Left out for want of time: {'; '.join(amount['left_out'])}. Everything takes about {duration(whole)}: "
        f"--minutes {minutes}"
    )
