"""What the runs show, over seeds: tables in Markdown. Differences are of the same seed, so of the same tokens."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .grid import ARMS, MAIN, ONE, TOKEN_CHOICE

Result = dict[str, Any]
# part, data, arm and label of a group -> seed -> result
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


def reach(curve: Sequence[Mapping[str, Any]], target: float) -> float | None:
    """After how many tokens the curve first comes down to the target, linearly between checkpoints; None if never."""
    for before, after in itertools.pairwise(curve):
        high, low = curve_loss(before), curve_loss(after)
        if low <= target:
            part = 0.0 if high <= target else (high - target) / (high - low)
            return float(before["tokens"] + part * (after["tokens"] - before["tokens"]))
    return None


def times_fewer(ours: Mapping[int, Result], theirs: Mapping[int, Result]) -> float | None:
    """How many times fewer tokens until the other's final loss, mean over seeds: 0 where one never comes there, None
    without a common seed."""
    ratios = []
    for seed in sorted(ours.keys() & theirs.keys()):
        end = theirs[seed]["curve"][-1]
        at = reach(ours[seed]["curve"], curve_loss(end))
        if at is None:
            return 0.0
        ratios.append(end["tokens"] / at)
    return statistics.fmean(ratios) if ratios else None


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value else "never"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main_table(groups: Groups, data: str, part: str, seconds: Mapping[str, float]) -> str:
    """The main comparison: final loss, and differences to dense and to token choice with as many FFNs per token.

    seconds: of a training step of each arm, where they were measured.
    """
    found = {arm: groups[part, data, arm, ""] for arm in MAIN if (part, data, arm, "") in groups}
    order = sorted(found, key=lambda arm: (ARMS[arm].ffns, _loss(found[arm])))
    head = ["arm", "FFNs per token", "active parameters", "seeds", "causal loss", "against dense"]
    head += ["against token choice", "tokens fewer", "ms per step", "time fewer"]
    rows = []
    for arm in order:
        ours, ffns = found[arm], ARMS[arm].ffns
        dense, peer = found.get("dense", {}), found.get(TOKEN_CHOICE[ffns], {})
        is_peer = arm == TOKEN_CHOICE[ffns]
        fewer = None if is_peer else times_fewer(ours, peer)
        step = seconds.get("dense" if ARMS[arm].matched else arm)
        quicker = seconds.get(TOKEN_CHOICE[ffns], 0) / step if step else 0
        rows.append(
            (
                ARMS[arm].title,
                str(ffns),
                f"{_any(ours)['parameters']['active']:,}",
                str(len(ours)),
                mean_and_spread([result["final"]["loss"] for result in ours.values()]),
                "" if arm == "dense" else signed(differences(ours, dense)),
                "" if is_peer else signed(differences(ours, peer)),
                _times(fewer),
                f"{1000 * step:.0f}" if step else "",
                _times(fewer * quicker) if quicker and fewer is not None else "",
            )
        )
    return markdown(head, rows)


def routes_table(groups: Groups, data: str, part: str) -> str:
    """Gap, load, coverage, specialisation and BLiMP of the same runs, means over seeds."""
    head = ["arm", "gap", "averaged thresholds", "experts per token", "load", "no expert"]
    head += ["mutual information", "untrained", "BLiMP"]
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
                _or_nothing(_mean(ours, "routes", "experts_per_token"), ".2f"),
                "" if load[0] is None else f"{load[0]:.2f} to {load[1]:.2f}",
                _or_nothing(_mean(ours, "routes", "uncovered"), ".1%"),
                _or_nothing(_mean(ours, "routes", "mutual_information"), ".3f"),
                _or_nothing(_mean(ours, "mutual_information", at="start"), ".3f"),
                _or_nothing(_mean(ours, "pairs_after", "accuracy"), ".3f"),
            )
        )
    return markdown(head, rows)


def domain_table(groups: Groups, data: str, part: str) -> str:
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
    """Each change against the same arm of the main comparison, and against token choice with and without the change;
    only where tokens, their order and active parameters are the same."""
    rows = []
    for (own_part, data, arm, label), ours in groups.items():
        if own_part != part:
            continue
        peer = TOKEN_CHOICE[ARMS[arm].ffns]
        plain = "gentle" if _rate(groups.get(("gentle", data, arm, ""), {})) == _rate(ours) else "main"
        others = [(plain, data, arm, ""), (part, data, peer, label), (plain, data, peer, "")]
        if peer == arm:
            others[1:] = [_NONE, _NONE]
        rows.append(
            (
                ARMS[arm].title,
                label,
                f"{_any(ours)['parameters']['active']:,}",
                mean_and_spread([result["final"]["loss"] for result in ours.values()]),
                *(signed(differences(ours, other)) for other in (_comparable(groups, ours, key) for key in others)),
                _signed_or_nothing(_mean(ours, "gap")),
                _or_nothing(_mean(ours, "routes", "uncovered"), ".1%"),
            )
        )
    head = ["arm", "change", "active parameters", "causal loss", "against unchanged"]
    head += ["against token choice, same change", "against token choice, unchanged", "gap", "no expert"]
    return markdown(head, rows)


def one_table(groups: Groups, data: str = "mixture") -> str:
    """Everything that was run at one FFN per token, at both learning rates: where it begins and ends, against dense."""
    parts = {"main": ("main", "one"), "gentle": ("gentle", "one-gentle")}
    found = {
        arm: {rate: _first(groups, [(part, data, arm, "") for part in names]) for rate, names in parts.items()}
        for arm in (*MAIN, *ONE)
        if ARMS[arm].ffns == 1
    }
    found = {arm: by_rate for arm, by_rate in found.items() if any(by_rate.values())}
    rows = []
    for arm in sorted(found, key=lambda arm: _loss(found[arm]["gentle"]) if found[arm]["gentle"] else math.inf):
        some = found[arm]["main"] or found[arm]["gentle"]
        row = [ARMS[arm].title, f"{_any(some)['parameters']['total']:,}", _signed_or_nothing(_begins(found, arm))]
        for rate in parts:
            ours = found[arm][rate]
            row.append(mean_and_spread([result["final"]["loss"] for result in ours.values()]) if ours else "")
            row.append("" if arm == "dense" else signed(differences(ours, found.get("dense", {}).get(rate, {}))))
        rows.append([*row, _or_nothing(_mean(some, "routes", "uncovered"), ".1%")])
    head = ["arm", "parameters", "step 0, against dense"]
    for rate in parts:
        used = sorted({used for by_rate in found.values() if (used := _rate(by_rate[rate])) is not None})
        head += [f"at {' and '.join(f'{each:g}' for each in used)}", "against dense"]
    return markdown([*head, "no expert"], rows)


def _first(groups: Groups, keys: Iterable[tuple[str, str, str, str]]) -> dict[int, Result]:
    return next((groups[key] for key in keys if key in groups), {})


def _begins(found: Mapping[str, Mapping[str, dict[int, Result]]], arm: str) -> float | None:
    """The loss before training minus the parent's; the mean over seeds of the first rate that dense has too."""
    for rate, ours in found[arm].items():
        dense = found.get("dense", {}).get(rate, {})
        if seeds := ours.keys() & dense.keys():
            return statistics.fmean(curve_loss(ours[s]["curve"][0]) - curve_loss(dense[s]["curve"][0]) for s in seeds)
    return None


_NONE = ("", "", "", "")  # the key of no group


def _comparable(groups: Groups, ours: Mapping[int, Result], key: tuple[str, str, str, str]) -> dict[int, Result]:
    """The other group, unless it saw other tokens, or differs by more than a router in its active parameters."""
    theirs = groups.get(key, {})
    if not theirs or not ours:
        return {}
    a, b = _any(ours), _any(theirs)
    same = all(a["recipe"][field] == b["recipe"][field] for field in ("steps", "rows"))
    sizes = [result["parameters"]["active"] for result in (a, b)]
    return theirs if same and max(sizes) <= 1.05 * min(sizes) else {}


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


def _rate(results: Mapping[int, Result]) -> float | None:
    return _any(results)["recipe"]["learning_rate"] if results else None


def _any(results: Mapping[int, Result]) -> Result:
    return next(iter(results.values()))


def _loss(results: Mapping[int, Result]) -> float:
    return statistics.fmean(result["final"]["loss"] for result in results.values())


def _mean(results: Mapping[int, Result], *keys: str, at: str = "final") -> float | None:
    """The mean over seeds of a figure below `at`; None where it was not measured."""
    values = []
    for result in results.values():
        value: Any = result.get(at)
        for key in keys:
            value = None if value is None else value.get(key)
        if value is None:
            return None
        values.append(value)
    return statistics.fmean(values)


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _signed_or_nothing(value: float | None) -> str:
    return _or_nothing(value, "+.4f")
