"""What the runs show, over seeds: tables in Markdown. Differences are of the same seed, so of the same tokens."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .grid import ARMS, MAIN, TOKEN_CHOICE

Result = dict[str, Any]
# part, label and arm of a group -> seed -> result
Groups = dict[tuple[str, str, str, str], dict[int, Result]]


def grouped(results: Iterable[Result]) -> Groups:
    """By part, data, arm and label, and in there by seed."""
    groups: Groups = {}
    for result in results:
        recipe = result["recipe"]
        key = (recipe["part"], recipe["data"], recipe["arm"], recipe["label"])
        groups.setdefault(key, {})[recipe["seed"]] = result
    return groups


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean, and half the range over the seeds where there are several."""
    mean = statistics.fmean(values)
    return f"{mean:.4f}" if len(values) < 2 else f"{mean:.4f} ± {(max(values) - min(values)) / 2:.4f}"


def differences(ours: Mapping[int, Result], theirs: Mapping[int, Result]) -> list[float]:
    """Loss of ours minus theirs, for each seed that both have."""
    return [ours[seed]["final"]["loss"] - theirs[seed]["final"]["loss"] for seed in sorted(ours.keys() & theirs.keys())]


def signed(values: Sequence[float]) -> str:
    """Mean difference and the least and largest of the seeds."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:+.4f}"
    return f"{statistics.fmean(values):+.4f} ({min(values):+.4f} to {max(values):+.4f})"


def curve_loss(point: Mapping[str, Any]) -> float:
    """The mean over domains at one checkpoint."""
    return statistics.fmean(point["losses"].values())


def reach(curve: Sequence[Mapping[str, Any]], target: float, axis: str = "tokens") -> float | None:
    """Where the curve first comes down to the target, linearly between checkpoints; None if it never does.

    axis: "tokens" or "seconds".
    """
    for before, after in itertools.pairwise(curve):
        high, low = curve_loss(before), curve_loss(after)
        if low <= target:
            part = 0.0 if high <= target else (high - target) / (high - low)
            return float(before[axis] + part * (after[axis] - before[axis]))
    return None


def _speed_up(ours: Mapping[int, Result], theirs: Mapping[int, Result], axis: str) -> str:
    """How many times fewer tokens or seconds until the other's final loss, mean over seeds; "never" where one fails."""
    ratios = []
    for seed in sorted(ours.keys() & theirs.keys()):
        end = theirs[seed]["curve"][-1]
        at = reach(ours[seed]["curve"], curve_loss(end), axis)
        if at is None:
            return "never"
        ratios.append(end[axis] / at)
    return f"{statistics.fmean(ratios):.2f}" if ratios else ""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main_table(groups: Groups, data: str = "mixture", part: str = "main") -> str:
    """The main comparison: final loss, and differences to dense and to token choice with as many FFNs per token."""
    found = {arm: groups[part, data, arm, ""] for arm in MAIN if (part, data, arm, "") in groups}
    order = sorted(found, key=lambda arm: (ARMS[arm].ffns, _loss(found[arm])))
    head = ["arm", "FFNs per token", "active parameters", "seeds", "causal loss", "against dense"]
    head += ["against token choice", "tokens fewer", "seconds fewer"]
    rows = []
    for arm in order:
        ours, ffns = found[arm], ARMS[arm].ffns
        dense, peer = found.get("dense", {}), found.get(TOKEN_CHOICE[ffns], {})
        is_peer = arm == TOKEN_CHOICE[ffns]
        rows.append(
            (
                ARMS[arm].title,
                str(ffns),
                f"{_any(ours)['parameters']['active']:,}",
                str(len(ours)),
                mean_and_spread([result["final"]["loss"] for result in ours.values()]),
                "" if arm == "dense" else signed(differences(ours, dense)),
                "" if is_peer else signed(differences(ours, peer)),
                *("" if is_peer else _speed_up(ours, peer, axis) for axis in ("tokens", "seconds")),
            )
        )
    return markdown(head, rows)


def routes_table(groups: Groups, data: str = "mixture", part: str = "main") -> str:
    """Gap, load, coverage, specialisation and BLiMP of the same runs, means over seeds."""
    head = ("arm", "gap", "averaged thresholds", "load", "no expert", "mutual information", "BLiMP", "ms per step")
    rows = []
    for arm in (arm for arm in MAIN if (part, data, arm, "") in groups):
        ours = groups[part, data, arm, ""]
        load = [_mean(ours, "routes", side) for side in ("load_min", "load_max")]
        averaged = _mean(ours, "loss_averaged_thresholds")
        rows.append(
            (
                f"{ARMS[arm].title} ({ARMS[arm].ffns})",
                _signed_or_nothing(_mean(ours, "gap")),
                "" if averaged is None else f"{averaged - _loss(ours):+.4f}",
                "" if load[0] is None else f"{load[0]:.2f} to {load[1]:.2f}",
                _or_nothing(_mean(ours, "routes", "uncovered"), ".1%"),
                _or_nothing(_mean(ours, "routes", "mutual_information"), ".3f"),
                _or_nothing(_mean(ours, "pairs_after", "accuracy"), ".3f"),
                f"{1000 * statistics.fmean(result['step_seconds'] for result in ours.values()):.0f}",
            )
        )
    return markdown(head, rows)


def domain_table(groups: Groups, data: str = "mixture", part: str = "main") -> str:
    """Final loss of each domain, also of those that were not trained on; means over seeds."""
    rows, domains = [], []
    for arm in (arm for arm in MAIN if (part, data, arm, "") in groups):
        finals = [result["final"] for result in groups[part, data, arm, ""].values()]
        domains = [*finals[0]["losses"], *finals[0]["losses_elsewhere"]]
        losses = [
            statistics.fmean((final["losses"] | final["losses_elsewhere"])[domain] for final in finals)
            for domain in domains
        ]
        rows.append((f"{ARMS[arm].title} ({ARMS[arm].ffns})", *(f"{loss:.4f}" for loss in losses)))
    return markdown(("arm", *domains), rows)


def ablation_table(groups: Groups, part: str) -> str:
    """Each change against the same arm of the main comparison (same seeds, and recipe but for the change)."""
    rows = []
    for (own_part, data, arm, label), ours in groups.items():
        if own_part != part:
            continue
        base, peer = groups.get(("main", data, arm, ""), {}), _peer(groups, own_part, data, arm, label)
        comparable = bool(base) and _any(base)["steps"] == _any(ours)["steps"]
        comparable = comparable and _any(base)["recipe"]["rows"] == _any(ours)["recipe"]["rows"]
        unchanged = groups.get(("main", data, TOKEN_CHOICE[ARMS[arm].ffns], ""), {})
        final = {name: _mean(ours, *keys) for name, keys in _SHOWN.items()}
        rows.append(
            (
                f"{ARMS[arm].title} ({ARMS[arm].ffns})",
                label,
                mean_and_spread([result["final"]["loss"] for result in ours.values()]),
                signed(differences(ours, base)) if comparable else "",
                signed(differences(ours, peer)),
                "" if arm.startswith("tc") or not comparable else signed(differences(ours, unchanged)),
                _signed_or_nothing(final["gap"]),
                _or_nothing(final["no expert"], ".1%"),
            )
        )
    head = ("arm", "change", "causal loss", "against unchanged", "against token choice, same change")
    return markdown((*head, "against token choice, unchanged", "gap", "no expert"), rows)


def shorter_table(groups: Groups) -> str:
    """Runs of fewer steps, each with a whole schedule, against token choice's main runs: equal loss in fewer tokens?"""
    rows = []
    for (part, data, arm, label), ours in groups.items():
        peer = groups.get(("main", data, TOKEN_CHOICE[ARMS[arm].ffns], ""), {})
        if part == "shorter" and peer:
            loss = mean_and_spread([result["final"]["loss"] for result in ours.values()])
            fewer = _any(peer)["steps"] / _any(ours)["steps"]
            rows.append(
                (f"{ARMS[arm].title} ({ARMS[arm].ffns})", label, f"{fewer:.2f}", loss, signed(differences(ours, peer)))
            )
    return markdown(("arm", "run", "tokens fewer", "causal loss", "against token choice"), rows)


_SHOWN = {"gap": ("gap",), "no expert": ("routes", "uncovered")}


def _peer(groups: Groups, part: str, data: str, arm: str, label: str) -> dict[int, Result]:
    peer = TOKEN_CHOICE[ARMS[arm].ffns]
    return {} if peer == arm else groups.get((part, data, peer, label), {})


def _any(results: Mapping[int, Result]) -> Result:
    return next(iter(results.values()))


def _loss(results: Mapping[int, Result]) -> float:
    return statistics.fmean(result["final"]["loss"] for result in results.values())


def _mean(results: Mapping[int, Result], *keys: str) -> float | None:
    """The mean over seeds of a figure below `final`; None where it was not measured."""
    values = []
    for result in results.values():
        value: Any = result["final"]
        for key in keys:
            value = None if value is None else value.get(key)
        if value is None:
            return None
        values.append(value)
    return statistics.fmean(values)


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


_signed_or_nothing: Callable[[float | None], str] = lambda value: _or_nothing(value, "+.4f")  # noqa: E731
