"""Tables and plots of the runs that are there."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..machine import RESULTS
from .data import LENGTH, MIXTURE
from .grid import ARMS, BALANCE_COEFFICIENT, BIAS_UPDATE_RATE, DECAY, MAIN, TOKEN_CHOICE
from .parents import PARENTS
from .plots import draw, draw_domains, draw_equal_flops
from .tables import (
    Groups,
    ablation_table,
    differences,
    domain_table,
    grouped,
    main_table,
    one_table,
    routes_table,
    shorter_table,
)

ROOT = Path(__file__).parents[2]
PARTS = {
    "balance": "Coefficient of token choice's balance loss",
    "rates": "Learning rates of experts, router and all",
    "scores": "Scores and router",
    "capacity": "Capacity factor",
    "bounds": "Bounds on the experts of a token",
    "experts": "Number of experts",
    "layers": "Sparse layers",
    "pool": "Pool, in steps of 64k tokens",
    "shorter": "Fewer steps, each run with a whole schedule, against token choice's 200 steps",
    "longer": "Four times the steps",
    "longer-gentle": "Four times the steps, at a tenth of the learning rate",
}
NOTES = {
    "experts": "E1 is a dense model of twice the FFN's width: every token takes its one expert.",
    "scores": "`gentle` is at 0.001, against the same rate.",
}
ONE_NOTE = (
    "Arms of this one comparison have the active FLOPs of the dense model, and a router's. A token's only expert has a "
    "normalised weight of 1 (`copy` and `split` with one expert for each token), so its router learns nothing from the "
    "task. `straight-through` has the same weights with the gradient of a score over a constant; `raw score` weighs by "
    "the score times one number that makes the mean weight 1 at step 0. Halves and quarters are of `granular`: 2 of 16 "
    "halves hold as many parameters as 1 of 8 copies. `From 0`: an expert may be chosen by no token's bound, and a "
    "token by no expert, which then loses its FFN at step 0."
)


def write(
    results: list[dict[str, Any]], missing: Sequence[str], seconds: dict[str, float], parent: str, quick: bool
) -> list[Path]:
    """The card with all tables, and the plots; a quick version's stay beside its runs.

    missing: the names of the runs that are not there. seconds: of a training step of each arm. parent: of PARENTS.
    """
    groups = grouped(results)
    command = "python -m benchmarks quality"
    if quick:
        card, plot = RESULTS / "quality-quick" / "README.md", RESULTS / "quality-quick" / "quality.png"
        command, picture = f"{command} --quick", plot.name
    else:
        name = "" if parent == "stories260K" else f"_{parent}"
        card, plot = ROOT / "model_cards" / PARENTS[parent].card, ROOT / "docs" / f"quality{name}.png"
        command, picture = f"{command} --parent {parent}" if name else command, f"../docs/{plot.name}"
    card.parent.mkdir(parents=True, exist_ok=True)
    card.write_text(render(groups, picture, command, seconds, missing, parent), encoding="utf-8")
    pictures = [*draw(groups, plot, seconds), *draw_domains(groups, plot.with_stem(f"{plot.stem}_domains"))]
    return [card, *pictures, *draw_equal_flops(groups, plot.with_stem(f"{plot.stem}_equal_flops"))]


def render(
    groups: Groups,
    picture: str,
    command: str,
    seconds: dict[str, float],
    missing: Sequence[str],
    parent: str = "stories260K",
) -> str:
    """The card's Markdown; `command` made the runs, `missing` are those it has not made."""
    tables = {
        ("main", "mixture"): "The mixture of four domains",
        ("gentle", "mixture"): "At a tenth of the learning rate",
    }
    about = f"The parent: {PARENTS[parent].about}.\n"
    parts = [f"# {parent}: what expert choice buys, measured causally\n", about, _introduction(groups, command)]
    for part, data in dict.fromkeys(key[:2] for key in groups if key[0] == "domain"):
        tables[part, data] = f"{data.capitalize()} alone"
    for (part, data), title in tables.items():
        if not any(key[:2] == (part, data) for key in groups):
            continue
        parts += [f"## {title}\n", main_table(groups, data, part, seconds) + "\n"]
        parts += [routes_table(groups, data, part) + "\n", domain_table(groups, data, part) + "\n"]
        if part == "main":
            domains = f"{picture.removesuffix('.png')}_domains.png"
            parts += [f"![Loss against tokens and seconds]({picture})\n", _words(groups)]
            parts += [f"![The domains of each expert's tokens]({domains})\n"]
    if any(key[0] in ("one", "one-gentle") for key in groups):
        parts += ["## One FFN per token\n", ONE_NOTE + "\n", one_table(groups) + "\n"]
    for part, title in PARTS.items():
        if any(key[0] == part for key in groups):
            table = shorter_table(groups) if part == "shorter" else ablation_table(groups, part)
            parts += [f"## {title}\n", *([NOTES[part] + "\n"] if part in NOTES else []), table + "\n"]
    if missing:
        parts += [f"## Not measured\n\n{_names_of(missing)}\n"]
    return "\n".join(parts)


def _introduction(groups: Groups, command: str) -> str:
    """Machine, versions and recipe of the main runs, and what is compared."""
    main = next((by_seed for key, by_seed in groups.items() if key[0] == "main"), next(iter(groups.values())))
    some = next(iter(main.values()))
    versions, recipe, threads = some["machine"]["versions"], some["recipe"], some["threads"]
    machine = f"{some['machine']['processor']}, {threads} thread{'s' if threads > 1 else ''}, torch {versions['torch']}"
    return (
        f"`{command}`; every run is a file in benchmarks/results. {machine}, transformers {versions['transformers']}, "
        f"commits {', '.join(_commits(groups))}.\n\n"
        "Losses are nats per token of held-out documents, routed as inference routes: causal. All arms see the same "
        f"{recipe['rows'] * LENGTH:,} tokens in each step ({recipe['steps']} steps at {recipe['learning_rate']:g} "
        "unless said), seed by seed; ± is half the range over seeds, in brackets stand the least and the largest. Arms "
        "with as many FFNs per token have the same active FLOPs, and are compared with token choice from copies (top-1 "
        "or top-2, dropless) whose experts are balanced by quantiles: each token takes the experts furthest above a "
        "threshold that gives each expert its share. Beside it stand its older ways: a balance loss of "
        f"{BALANCE_COEFFICIENT:g} of the layers' mean, and a bias nudged by {BIAS_UPDATE_RATE:g} a step (arXiv "
        f"2408.15664). `From 0` leaves the bound of one expert at least away.{_matched(groups)} Learning rate, "
        "initialisation and bounds were chosen on the same held-out documents.\n"
    )


def _matched(groups: Groups) -> str:
    """What the dense arm of more steps is, if it was run."""
    for (part, _, arm, _), by_seed in groups.items():
        if part == "main" and ARMS[arm].matched:
            some = next(iter(by_seed.values()))
            times = some["steps"] / some["recipe"]["steps"]
            return (
                f" Dense with more steps has {times:.2f} times as many, and so the FLOPs of two FFNs per token in its "
                "matrices; attention's scores, which it computes more often too, are left out."
            )
    return ""


def _commits(groups: Groups) -> list[str]:
    return sorted({result["commit"] for by_seed in groups.values() for result in by_seed.values()})


def _names_of(runs: Sequence[str]) -> str:
    """Runs with their seeds, which are the last part of a name."""
    seeds: dict[str, list[str]] = {}
    for name in runs:
        group, _, seed = name.rpartition(".seed")
        seeds.setdefault(group, []).append(seed)
    return "; ".join(f"{group} (seed {', '.join(numbers)})" for group, numbers in seeds.items())


def _words(groups: Groups) -> str:
    """What the columns mean, and which arms lose, from the figures alone."""
    before = [
        result["final"].get("pairs_before") for result in groups.get(("main", "mixture", "dense", ""), {}).values()
    ]
    pairs = ""
    if any(before):
        share, count = before[0]["accuracy"], before[0]["pairs"]
        pairs = (
            f" BLiMP of the parent: {share:.3f} of {count} pairs; half is chance, and the standard error is "
            f"{math.sqrt(share * (1 - share) / count):.3f}."
        )
    columns = (
        'Milliseconds: steps of all arms side by side, medians. "Tokens fewer": token choice\'s over ours until its '
        "final loss is reached, on a part of the held-out windows, between checkpoints; there our learning rate has "
        "not come down yet and its has, which speaks against us: below are runs with schedules of their own. Gap: "
        'causal minus top-k loss, the same pool as in training. "Averaged thresholds": what the loss rises by with the '
        f"thresholds of training, averaged with a decay of {DECAY}, in place of calibrated ones; threshold training is "
        "measured with its own, and begins above the parent with `copy`, because it has no bounds. Load: of each "
        "expert over its share, least and most. "
        f"Mutual information: of expert and domain, nats, at most {math.log(len(MIXTURE)):.3f}, and that of the "
        f"untrained router.{pairs}\n"
    )
    lost = []
    for arm in MAIN:
        peer = TOKEN_CHOICE[ARMS[arm].ffns]
        ours, theirs = (groups.get(("main", "mixture", name, ""), {}) for name in (arm, peer))
        found = differences(ours, theirs)
        if arm.startswith(("ec", "th")) and found and statistics.fmean(found) > 0:
            lost.append(f"{ARMS[arm].title} ({ARMS[arm].ffns} FFNs) by {statistics.fmean(found):.4f}")
    if not lost:
        return columns
    return f"{columns}\nWhere it loses to token choice of the same active FLOPs, on the mean: {'; '.join(lost)}.\n"
