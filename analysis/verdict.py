"""What a comparison shows: its tables, and the sentences that follow from the figures and from nothing else."""

from collections.abc import Callable
from typing import Any

from rich import box
from rich.table import Table

from ecmoe.progress import number_of

from .variants import DROPLESS

# Standard errors that a difference of losses must exceed, two-sided 5 % for a single comparison.
STANDARD_ERRORS = 2.0
# A load or share is no worse than another within this much: less is rounding, not routing.
_TOLERANCE = 0.005
# Losses that differ by less look the same in the tables, and do where all variants compute the same function.
_UNSEEN = 0.00005
_NOT_SHOWN = "no difference that this text can show"
_WAYS = {
    DROPLESS: "balance loss",
    "token choice, nudged bias": "nudged bias",
    "token choice, by quantiles": "quantiles",
    "expert choice": "expert choice",
    "threshold": "thresholds",
}

Entry = dict[str, Any]


def verdict(result: dict[str, Any]) -> list[str]:
    """The sentences, for each number of experts per token; `result` as `comparison.compare` makes it."""
    lines = []
    for k in sorted({entry["num_choices"] for entry in result["variants"]}):
        entries = [entry for entry in result["variants"] if entry["num_choices"] == k]
        reference = next(entry for entry in entries if entry["name"] == DROPLESS)
        others = [entry for entry in entries if not entry["is_token_choice"]]
        lines.append(f"{k} expert{'s' if k > 1 else ''} per token: {_winner(entries)}")
        lines += _ways(entries)
        lines += _routers_that_do_not_learn(result, k)
        lines.append(_dropped(entries))
        parts = (_loss, _time, _no_expert, _load) if reference["step"] else (_loss, _no_expert, _load)
        lines += [line(reference, others) for line in (parts if others else ())]
    return lines


def _winner(entries: list[Entry]) -> str:
    """Who has the lowest loss, and by how much, where the text can tell."""
    ordered = sorted(entries, key=lambda entry: entry["inference"]["loss"])
    loss = ordered[0]["inference"]["loss"]
    tied = [entry for entry in ordered if entry["inference"]["loss"] - loss < _UNSEEN]
    names, rest = "; ".join(entry["name"] for entry in tied), ordered[len(tied) :]
    held_out = f"causal loss {loss:.4f} on held-out text"
    if not rest:
        return f"a tie of all, {held_out}."
    above = rest[0]["loss_against_lowest"]
    following = f"the next, {rest[0]['name']}, {_in_figures(above)}"
    if not _exceeds_error(above):
        return f"{names} has the lowest {held_out}; {following}: {_NOT_SHOWN}."
    return f"a tie, {held_out}: {names}; {following}." if len(tied) > 1 else f"{names} wins, {held_out}; {following}."


def _ways(entries: list[Entry]) -> list[str]:
    """What the field balances by, in the order of their losses."""
    found = [(entry["inference"]["loss"], _WAYS[entry["name"]]) for entry in entries if entry["name"] in _WAYS]
    if len(found) < 3:
        return []
    return [f"  Ways by their causal loss: {', '.join(f'{name} {loss:.4f}' for loss, name in sorted(found))}."]


def _in_figures(against: dict[str, float]) -> str:
    return f"{against['difference']:+.4f} ± {against['standard_error']:.4f}"


def _difference(entry: Entry) -> str:
    return _in_figures(entry["loss_against_dropless"])


def _exceeds_error(against: dict[str, float]) -> bool:
    return abs(against["difference"]) > max(STANDARD_ERRORS * against["standard_error"], _UNSEEN)


def _is_clear(entry: Entry) -> bool:
    return _exceeds_error(entry["loss_against_dropless"])


def _routers_that_do_not_learn(result: dict[str, Any], k: int) -> list[str]:
    if k > 1 or not result["normalize_combine_weights"]:
        return []
    return [
        "  Weights are normalised, so a token's only expert has weight 1: where every token has exactly one (token "
        "choice, at least 1), the router learns from the balance loss alone, or not at all."
    ]


def _dropped(entries: list[Entry]) -> str:
    """Choices that an expert had no room for; expert choice makes none that could be dropped."""
    shares = {entry["name"]: f"{entry['training']['dropped']:.1%}" for entry in entries}
    parts = [f"{name} ({share})" for name, share in shares.items() if share != "0.0%"]
    if not parts:
        return "  No choices were dropped for capacity in training."
    return f"  Choices dropped for capacity in training: {', '.join(parts)}; expert choice none, by construction."


def _sentence(
    measure: str, others: list[Entry], judge: Callable[[Entry], int], text: Callable[[Entry], str], tie: str
) -> str:
    """judge: 1 where the variant is better than the reference, -1 where it is worse, 0 where neither can be said."""
    groups = (("Expert choice wins", 1), (tie, 0), ("Expert choice does not win", -1))
    parts = []
    for title, side in groups:
        found = [f"{_short(entry)} {text(entry)}" for entry in others if judge(entry) == side]
        parts += [f"{title}: {', '.join(found)}."] if found else []
    return f"  {measure}. {' '.join(parts)}"


def _short(entry: Entry) -> str:
    """`expert choice` is what the sentence is about; what follows tells the variants apart."""
    name = entry["name"].removeprefix("expert choice").removeprefix(", ")
    return {"": "plain", "threshold": "trained by threshold"}.get(name, name)


def _loss(reference: Entry, others: list[Entry]) -> str:
    def judge(entry: Entry) -> int:
        if not _is_clear(entry):
            return 0
        return 1 if entry["loss_against_dropless"]["difference"] < 0 else -1

    measure = "Causal loss against dropless token choice, ± standard error"
    return _sentence(measure, others, judge, _difference, tie=_NOT_SHOWN.capitalize())


def _time(reference: Entry, others: list[Entry]) -> str:
    """Faster means faster in every round, so that a hiccup of the machine decides nothing."""

    def judge(entry: Entry) -> int:
        ratios = entry["step"]["ratios"]
        return 1 if max(ratios) < 1 else -1 if min(ratios) >= 1 else 0

    measure = "Time of a training step against dropless token choice"
    return _sentence(
        measure, others, judge, lambda entry: f"{entry['step']['ratio']:.2f}x", tie="Not the same in every round"
    )


def _no_expert(reference: Entry, others: list[Entry]) -> str:
    """Dropless token choice leaves no token without an expert, so the best there is to do is as well."""
    phases = ("training", "inference")
    served = [e for e in others if all(e[phase]["no_expert"] == 0 for phase in phases)]
    left = [
        f"{_short(e)} {e['training']['no_expert']:.1%} in training, {e['inference']['no_expert']:.1%} at inference"
        for e in others
        if e not in served
    ]
    parts = [f"None with {', '.join(map(_short, served))}."] if served else []
    parts += [f"Expert choice does not win: {'; '.join(left)}."] if left else []
    return f"  Tokens chosen by nobody (dropless token choice has none). {' '.join(parts)}"


def _load(reference: Entry, others: list[Entry]) -> str:
    """In training and at inference, where thresholds balance the text they were calibrated on."""
    sentences = []
    for phase, where in (("training", "in training"), ("inference", "at inference")):
        most = reference[phase]["load_max"]

        def judge(entry: Entry, phase: str = phase, most: float = most) -> int:
            difference = most - entry[phase]["load_max"]
            return 0 if abs(difference) <= _TOLERANCE else 1 if difference > 0 else -1

        def text(entry: Entry, phase: str = phase) -> str:
            return f"{entry[phase]['load_max']:.2f}"

        measure = f"Largest load over the mean {where} (dropless token choice {most:.2f})"
        sentences.append(_sentence(measure, others, judge, text, tie="No difference"))
    return "\n".join(sentences)


def tables(result: dict[str, Any]) -> tuple[Table, Table]:
    """What training does, and what inference does; at most 100 columns wide."""
    training = _table("In training, routes taken on held-out text")
    inference = _table("Causal inference on held-out text")
    for name in ("dropped for\ncapacity", "no\nexpert", "experts\nper token", "load\nmax/mean", "load\nCV"):
        training.add_column(name, justify="right")
    training.add_column("auxiliary\nloss", justify="right")
    if any(entry["step"] for entry in result["variants"]):
        training.add_column("step\nms", justify="right")
        training.add_column("against\ndropless", justify="right")
    for name in ("loss", "against\ndropless", "gap to train-\ning's routes", "no\nexpert", "experts\nper token"):
        inference.add_column(name, justify="right")
    inference.add_column("load\nmax/mean", justify="right")
    inference.add_column("load\nCV", justify="right")
    before = None
    for entry in result["variants"]:
        if before not in (None, entry["num_choices"]):
            training.add_section()
            inference.add_section()
        before = entry["num_choices"]
        training.add_row(*_training_row(entry))
        inference.add_row(*_inference_row(entry))
    return training, inference


def _table(title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0), title_justify="left", show_edge=False)
    table.add_column("k", justify="right")
    table.add_column("")
    return table


def _routes(figures: dict[str, float]) -> list[str]:
    return [
        f"{figures['no_expert']:.1%}",
        f"{figures['experts_per_token']:.2f}",
        f"{figures['load_max']:.2f}",
        f"{figures['load_cv']:.2f}",
    ]


def _training_row(entry: Entry) -> list[str]:
    figures, step = entry["training"], entry["step"]
    return [
        str(entry["num_choices"]),
        entry["name"],
        f"{figures['dropped']:.1%}",
        *_routes(figures),
        ", ".join(entry["auxiliary_losses"]) or "none",
        *([f"{1000 * step['seconds']:,.0f}", f"{step['ratio']:.2f}x"] if step else ()),
    ]


def _inference_row(entry: Entry) -> list[str]:
    figures = entry["inference"]
    return [
        str(entry["num_choices"]),
        entry["name"],
        f"{figures['loss']:.4f}",
        "" if entry["name"] == DROPLESS else _difference(entry),
        f"{entry['gap']:+.4f}",
        *_routes(figures),
    ]


def settings(result: dict[str, Any]) -> str:
    """One paragraph that says what was done to get these figures."""
    trained = "no training"
    if result["steps"]:
        trained = f"{number_of(result['steps'], 'step')} of AdamW at {result['learning_rate']:g} in float32, one seed"
    amount = result["amount"]
    rounds = amount["timed_rounds"]
    timed = f"{rounds} timed rounds of steps of {amount['timed_tokens']:,} tokens on" if rounds else "nothing timed;"
    left_out = f" Left out for want of time: {'; '.join(amount['left_out'])}." if amount["left_out"] else ""
    return (
        f"{result['checkpoint']}: {result['num_experts']} experts, {trained}; batches (pools) of "
        f"{result['tokens_per_batch']:,} tokens in rows of {result['row_length']}; "
        f"{result['held_out_tokens']:,} tokens held out; token choice with balance loss "
        f"{result['balance_loss_coefficient']:g}; {timed} {result['device']} in {result['dtype']}, "
        f"torch threads: {result['threads']}.{left_out}"
    )
