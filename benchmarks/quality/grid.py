"""What is run: arms, and the grid of named runs.

Equal tokens: all runs of a part see the same number, and with the same seed the same ones in the same order. Equal
active FLOPs: arms are compared with those that have as many FFNs per token. A shared expert (`blend`, `shared`) and
one routed expert make two; so do two routed experts of `copy`. A dense model has one; `dense-matched` is given the
matrix products of two by more steps.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ecmoe.analysis.variants import BALANCE_COEFFICIENT, BIAS_UPDATE_RATE

from .data import DOMAINS

DECAY = 0.99  # of the thresholds' average in all runs
WARM_UP = 1 / 5  # of the steps that threshold training begins with expert choice: 4k of 19k in arXiv 2603.11535


@dataclass(frozen=True)
class Arm:
    """One way to go on from the dense parent.

    init: of the converter; None stays dense. ffns: per token, shared expert included. routed: experts per token.
    routing: who chooses, a key of `ROUTINGS`; "expert choice" keeps the bounds of the initialisation. conversion: more
    options of the converter. weights: "normalised" as the initialisation has it, or how else the weight of a token's
    only expert comes from its score, so that its router has a gradient: "straight-through" or "raw" (execute.py).
    matched: more steps instead of a second FFN. groups: whether a token of a granular arm has as many of each shard.
    """

    title: str
    init: str | None
    ffns: int
    routed: int = 0
    routing: str = "expert choice"
    conversion: dict[str, Any] = field(default_factory=dict)
    weights: str = "normalised"
    matched: bool = False
    groups: bool = True

    def fields(self, steps: int) -> dict[str, Any]:
        """Config fields beside those that the initialisation sets."""
        if self.init is None:
            return {}
        fields = dict(ROUTINGS[self.routing])
        if self.routing == "quantiles":  # each token exactly its number, each expert its share
            fields |= {"min_experts_per_token": self.routed, "max_experts_per_token": self.routed}
        if self.routing == "threshold":  # which knows no bounds
            fields["threshold_after_steps"] = round(WARM_UP * steps)
        if not self.groups:
            fields["num_expert_groups"] = 1
        return fields


_TOKENS_CHOOSE = {"routing": "token_choice", "inference_routing": "token_choice", "min_experts_per_token": 0}
ROUTINGS: dict[str, dict[str, Any]] = {
    "expert choice": {"threshold_decay": DECAY},
    "unbounded": {"threshold_decay": DECAY, "min_experts_per_token": 0},
    "quantiles": {"threshold_decay": DECAY},
    "balance loss": _TOKENS_CHOOSE | {"router_aux_loss_coef": BALANCE_COEFFICIENT},
    "nudged bias": _TOKENS_CHOOSE | {"token_choice_bias_update_rate": BIAS_UPDATE_RATE},
    "threshold": {"routing": "threshold", "min_experts_per_token": 0, "threshold_decay": DECAY},
}


def _arms(short: str, title: str, routing: str, inits: tuple[str, ...] = ()) -> dict[str, Arm]:
    """Copies at one and at two FFNs per token, and what else is asked for of two."""
    arms = {f"{short}-copy{k}": Arm(f"{title}, copy", "copy", k, k, routing) for k in (1, 2)}
    return arms | {f"{short}-{init}": Arm(f"{title}, {init}", init, 2, 1, routing) for init in inits}


def _granular(granularity: int, experts: int, routing: str, groups: bool = True) -> Arm:
    """One FFN per token of `granularity` smaller experts, one of each shard unless without groups."""
    rule = {
        "quantiles": "token choice by quantiles",
        "unbounded": "expert choice from 0",
        "threshold": "expert choice, then thresholds",
    }[routing]
    parts = {2: "halves", 4: "quarters"}[granularity]
    options = {"granularity": granularity, "num_experts": experts}
    title = f"{rule}, {granularity} of {experts} {parts}" + ", of whatever kind" * (not groups)
    return Arm(title, "granular", 1, granularity, routing, options, groups=groups)


_BOTH = ("blend", "shared")
# At one FFN per token, bounds from 1 leave each token exactly one: that is token choice balanced by quantiles.
ARMS = {
    "dense": Arm("dense", None, 1),
    "dense-matched": Arm("dense, more steps", None, 2, matched=True),
    **_arms("tc", "token choice, balance loss", "balance loss", _BOTH),
    **_arms("tcb", "token choice, nudged bias", "nudged bias"),
    **_arms("tcq", "token choice by quantiles", "quantiles"),
    **_arms("ec", "expert choice", "expert choice", _BOTH),
    **_arms("ec0", "expert choice from 0", "unbounded"),
    **_arms("th", "expert choice, then thresholds", "threshold", _BOTH),
    "tcq-halves": _granular(2, 16, "quantiles"),
    "tcq-halves32": _granular(2, 32, "quantiles"),
    "tcq-halves64": _granular(2, 64, "quantiles"),
    "tcq-quarters32": _granular(4, 32, "quantiles"),
    "tcq-quarters64": _granular(4, 64, "quantiles"),
    "ec0-halves": _granular(2, 16, "unbounded"),
    "ec0-quarters32": _granular(4, 32, "unbounded"),
    "th-halves": _granular(2, 16, "threshold"),
    "tcq-halves-free": _granular(2, 16, "quantiles", groups=False),
    "tcq-halves64-free": _granular(2, 64, "quantiles", groups=False),
    "tcq-split": Arm("token choice by quantiles, split", "split", 1, 1, "quantiles"),
    "ec0-split": Arm("expert choice from 0, split", "split", 1, 1, "unbounded"),
    "tcq-copy1-through": Arm(
        "token choice by quantiles, copy, straight-through", "copy", 1, 1, "quantiles", weights="straight-through"
    ),
    "tcq-copy1-raw": Arm("token choice by quantiles, copy, raw score", "copy", 1, 1, "quantiles", weights="raw"),
    **{
        f"tcq-copy1-{experts}": Arm(
            f"token choice by quantiles, copy, {experts} experts", "copy", 1, 1, "quantiles", {"num_experts": experts}
        )
        for experts in (16, 32, 64)
    },
}
del ARMS["ec-copy1"]
TOKEN_CHOICE = {1: "tcq-copy1", 2: "tcq-copy2"}  # what the others are compared with, by FFNs per token
MAIN = (
    *("tcq-copy2", "ec-copy2", "dense", "ec-shared"),
    *("tc-copy2", "tcb-copy2", "ec0-copy2", "tc-shared", "ec-blend", "dense-matched", "th-shared"),
    *("tc-blend", "th-blend", "th-copy2"),
    *("tcq-copy1", "tc-copy1", "tcb-copy1", "ec0-copy1", "th-copy1", "tcq-halves", "tcq-quarters32", "ec0-halves"),
)
NUM_CORE = 4
DECISIVE = ("normalised", "normalised-gentle", "E1")
GENTLE = (
    *MAIN[:NUM_CORE],
    *("tc-copy2", "tcb-copy2", "ec0-copy2", "ec-blend", "dense-matched", "th-shared"),
    *("tcq-copy1", "tc-copy1", "tcb-copy1", "ec0-copy1", "tcq-halves", "tcq-quarters32", "ec0-halves"),
)
# One FFN per token: what else was tried, of one seed at both rates.
ROUTED = ("ec-copy2", "tcq-copy2", "tcb-copy2", "tc-copy2")  # two copies for each token: the best rule, and its rivals
LONGER_AT_ONE = ("tcq-copy1", "ec0-copy1", "tcq-halves", "ec0-halves")
ONE = tuple(name for name, arm in ARMS.items() if arm.ffns == 1 and arm.init is not None and name not in MAIN)


@dataclass(frozen=True)
class Run:
    """One training run.

    data: "mixture" or one domain. rows: windows of an optimiser step. pool_rows: windows of a forward pass, among
    which experts choose. experts_rate, router_rate: what the learning rate is multiplied by there. conversion,
    config: options of the converter and config fields that replace the arm's.
    """

    arm: str
    seed: int = 0
    part: str = "main"
    label: str = ""
    data: str = "mixture"
    parent: str = "stories260K"
    steps: int = 200
    rows: int = 32
    pool_rows: int = 32
    learning_rate: float = 1e-2
    experts_rate: float = 1.0
    router_rate: float = 1.0
    conversion: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the run among all runs, and of its file."""
        return ".".join(filter(None, (self.part, self.data, self.arm, self.label, f"seed{self.seed}")))

    def recipe(self) -> dict[str, Any]:
        return asdict(self)


def main_runs(seeds: tuple[int, ...] = (0, 1, 2), arms: tuple[str, ...] = MAIN, **recipe: Any) -> list[Run]:
    """The main comparison: every seed of the core arms, then every seed of the others."""
    parts = (arms[:NUM_CORE], arms[NUM_CORE:])
    return [Run(arm, seed, **recipe) for part in parts for seed in seeds for arm in part]


def gentle_runs() -> list[Run]:
    """The same at a tenth of the learning rate, where a run is far from done but the parent's own domain is kept."""
    return main_runs(arms=GENTLE, part="gentle", learning_rate=1e-3)


def domain_runs() -> Iterator[Run]:
    """One domain at a time, one seed."""
    for domain in DOMAINS:
        for arm in ("dense", "ec-shared", *ROUTED):
            yield Run(arm, 0, "domain", data=domain)


def ablation_runs() -> Iterator[Run]:
    """One change at a time: one seed, three where a default hangs on it."""
    for part, label, arm, change in _ablations():
        yield from (Run(arm, seed, part, label, **change) for seed in range(3 if label in DECISIVE else 1))


def _ablations() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Part, label, arm, change."""
    for coefficient in (0.01, 0.3):
        yield "balance", f"{coefficient:g}", "tc-copy2", {"config": {"router_aux_loss_coef": coefficient}}
    for rate in (3e-3, 3e-2):
        for arm in ("dense", "ec-shared", *ROUTED):
            yield "rates", f"all-{rate:g}", arm, {"learning_rate": rate}
    for rate in (0.3, 3.0):
        yield "rates", f"experts-x{rate:g}", "ec-copy2", {"experts_rate": rate}
    for rate in (0.0, 0.1, 10.0):
        yield "rates", f"router-x{rate:g}", "ec-copy2", {"router_rate": rate}
    for arm in ("ec-shared", "tc-copy2"):
        yield "rates", "router-x0.1", arm, {"router_rate": 0.1}
    yield "scores", "softmax", "ec-shared", {"config": {"router_score_function": "softmax"}}
    normalised = {"config": {"normalize_combine_weights": True}}
    yield "scores", "normalised", "ec-shared", normalised
    yield "scores", "normalised-gentle", "ec-shared", {**normalised, "learning_rate": 1e-3}
    yield "scores", "sigmoid", "ec-copy2", {"config": {"router_score_function": "sigmoid"}}
    for arm in ("ec-shared", "ec-copy2"):
        yield "scores", "centroid", arm, {"conversion": {"router": "centroid"}}
    for capacity in (0.5, 2.0):
        yield "capacity", f"c{capacity:g}", "ec-shared", {"conversion": {"capacity_factor": capacity}}
    # With c = 2 a bound of two experts means exactly two: tcq-copy2.
    for arm, least, most in (("ec-copy2", 1, 2), ("ec-copy2", 1, 4), ("ec-shared", 1, None), ("ec-shared", 0, 2)):
        bounds = {"min_experts_per_token": least, "max_experts_per_token": most}
        yield "bounds", f"{least}-{most or 'E'}", arm, {"config": bounds}
    # One expert that every token takes: a dense model of twice the width, at equal tokens and equal FLOPs.
    yield "experts", "E1", "ec-shared", {"conversion": {"num_experts": 1}}
    for experts in (4, 16, 32):
        for arm in ROUTED:
            yield "experts", f"E{experts}", arm, {"conversion": {"num_experts": experts}}
    # One FFN per token: what gives a router a gradient there, and more or smaller experts.
    for arm in ONE:
        yield "one", "", arm, {}
        yield "one-gentle", "", arm, {"learning_rate": 1e-3}
    for layers in ("every-second", "last-half"):
        yield "layers", layers, "ec-copy2", {"conversion": {"layers": layers}}
    # Steps of 64k tokens, gathered from forward passes of 2k, 8k or all of them.
    for pool_rows in (16, 64, 512):
        change = {"steps": 40, "rows": 512, "pool_rows": pool_rows}
        yield "pool", f"{pool_rows // 8}k", "ec-copy2", change
    for arm in ROUTED[1:]:
        yield "pool", "8k", arm, {"steps": 40, "rows": 512, "pool_rows": 64}
    # With a schedule of their own: does expert choice reach token choice's final loss in fewer tokens?
    for steps in (125, 160):
        yield "shorter", f"{steps}-steps", "ec-copy2", {"steps": steps}
    for arm in ("dense", "ec-shared", *ROUTED):
        yield "longer", "800-steps", arm, {"steps": 800}
    yield "longer", "800-steps-normalised", "ec-shared", {**normalised, "steps": 800}
    for arm in LONGER_AT_ONE:
        yield "longer", "800-steps", arm, {"steps": 800}
        yield "longer-gentle", "800-steps", arm, {"steps": 800, "learning_rate": 1e-3}
    yield "longer-gentle", "800-steps", "dense", {"steps": 800, "learning_rate": 1e-3}


def quick_runs() -> list[Run]:
    """The core arms, half of the steps, no BLiMP."""
    return main_runs(arms=MAIN[:NUM_CORE], steps=100)


def all_runs() -> list[Run]:
    return [*main_runs(), *gentle_runs(), *ablation_runs(), *domain_runs()]
