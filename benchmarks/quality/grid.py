"""What is run: arms, and the grid of named runs.

Equal tokens: all runs of a part see the same number, and with the same seed the same ones in the same order. Equal
active FLOPs: arms are compared with those that have as many FFNs per token. A shared expert (`blend`, `shared`) and
one routed expert make two; so do two routed experts of `copy`. A dense model has one; `dense-matched` is given the
matrix products of two by more steps.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ecmoe.analysis.variants import BALANCE_COEFFICIENT

from .data import DOMAINS

DECAY = 0.99  # of the thresholds' average in all runs
WARM_UP = 1 / 5  # of the steps that threshold training begins with expert choice: 4k of 19k in arXiv 2603.11535


@dataclass(frozen=True)
class Arm:
    """One way to go on from the dense parent.

    init: of the converter; None stays dense. ffns: per token, shared expert included. routed: experts per token.
    routing: the config's. matched: more steps instead of a second FFN.
    """

    title: str
    init: str | None
    ffns: int
    routed: int = 0
    routing: str = "expert_choice"
    matched: bool = False

    def fields(self, steps: int) -> dict[str, Any]:
        """Config fields beside those that the initialisation sets."""
        if self.routing == "token_choice":
            return {
                "routing": "token_choice",
                "inference_routing": "token_choice",
                "min_experts_per_token": 0,
                "router_aux_loss_coef": BALANCE_COEFFICIENT,
            }
        if self.routing == "threshold":  # which knows no bounds
            return {
                "routing": "threshold",
                "min_experts_per_token": 0,
                "threshold_after_steps": round(WARM_UP * steps),
                "threshold_decay": DECAY,
            }
        return {"threshold_decay": DECAY}


def _arms(short: str, title: str, routing: str) -> dict[str, Arm]:
    return {
        f"{short}-copy1": Arm(f"{title}, copy", "copy", 1, 1, routing),
        f"{short}-copy2": Arm(f"{title}, copy", "copy", 2, 2, routing),
        f"{short}-blend": Arm(f"{title}, blend", "blend", 2, 1, routing),
        f"{short}-shared": Arm(f"{title}, shared", "shared", 2, 1, routing),
    }


ARMS = {
    "dense": Arm("dense", None, 1),
    "dense-matched": Arm("dense, 1.64 times the steps", None, 2, matched=True),
    **_arms("tc", "token choice", "token_choice"),
    **_arms("ec", "expert choice", "expert_choice"),
    **_arms("th", "expert choice, then thresholds", "threshold"),
}
TOKEN_CHOICE = {1: "tc-copy1", 2: "tc-copy2"}  # what the issue compares with, by FFNs per token
MAIN = (
    *("tc-copy2", "ec-copy2", "dense", "ec-shared"),
    *("tc-shared", "ec-blend", "tc-copy1", "ec-copy1", "dense-matched", "th-shared"),
    *("tc-blend", "th-blend", "th-copy2", "th-copy1"),
)
NUM_CORE = 4
DECISIVE = ("normalised", "normalised-gentle", "E1")
GENTLE = (*MAIN[:NUM_CORE], "ec-blend", "tc-copy1", "ec-copy1", "dense-matched", "th-shared")


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
        for arm in ("dense", "tc-copy2", "ec-copy2", "ec-shared"):
            yield Run(arm, 0, "domain", data=domain)


def ablation_runs() -> Iterator[Run]:
    """One change at a time: one seed, three where a default hangs on it."""
    for part, label, arm, change in _ablations():
        yield from (Run(arm, seed, part, label, **change) for seed in range(3 if label in DECISIVE else 1))


def _ablations() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Part, label, arm, change."""
    routed = ("ec-copy2", "tc-copy2")
    for coefficient in (0.01, 0.3):
        yield "balance", f"{coefficient:g}", "tc-copy2", {"config": {"router_aux_loss_coef": coefficient}}
    for rate in (3e-3, 3e-2):
        for arm in ("dense", "ec-shared", *routed):
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
    # With c = 1 a bound of one expert means exactly one, with c = 2 one of two exactly two.
    for arm, least, most in (
        *(("ec-copy2", 0, None), ("ec-copy2", 1, 2), ("ec-copy2", 1, 4)),
        *(("ec-shared", 1, None), ("ec-shared", 0, 2), ("ec-copy1", 0, None)),
    ):
        bounds = {"min_experts_per_token": least, "max_experts_per_token": most}
        yield "bounds", f"{least}-{most or 'E'}", arm, {"config": bounds}
    # One expert that every token takes: a dense model of twice the width, at equal tokens and equal FLOPs.
    yield "experts", "E1", "ec-shared", {"conversion": {"num_experts": 1}}
    for experts in (4, 16, 32):
        for arm in routed:
            yield "experts", f"E{experts}", arm, {"conversion": {"num_experts": experts}}
    # One FFN per token of smaller experts, whose weights have a gradient from the task.
    granular = {"init": "granular", "granularity": 2, "num_experts": 16, "capacity_factor": 2.0}
    for arm in ("ec-copy1", "tc-copy1"):
        yield "one", "granular", arm, {"conversion": granular}
        yield "one", "split", arm, {"conversion": {"init": "split"}}
    yield "one", "granular", "th-copy1", {"conversion": granular}
    for layers in ("every-second", "last-half"):
        yield "layers", layers, "ec-copy2", {"conversion": {"layers": layers}}
    # Steps of 64k tokens, gathered from forward passes of 2k, 8k or all of them.
    for pool_rows in (16, 64, 512):
        change = {"steps": 40, "rows": 512, "pool_rows": pool_rows}
        yield "pool", f"{pool_rows // 8}k", "ec-copy2", change
    yield "pool", "8k", "tc-copy2", {"steps": 40, "rows": 512, "pool_rows": 64}
    # With a schedule of their own: does expert choice reach token choice's final loss in fewer tokens?
    for steps in (125, 160):
        yield "shorter", f"{steps}-steps", "ec-copy2", {"steps": steps}
    for arm in ("dense", "ec-shared", *routed):
        yield "longer", "800-steps", arm, {"steps": 800}
    yield "longer", "800-steps-normalised", "ec-shared", {**normalised, "steps": 800}
    yield "longer", "800-steps-granular", "ec-copy1", {"conversion": granular, "steps": 800}


def quick_runs() -> list[Run]:
    """The core arms, half of the steps, no BLiMP."""
    return main_runs(arms=MAIN[:NUM_CORE], steps=100)


def all_runs() -> list[Run]:
    return [*main_runs(), *gentle_runs(), *ablation_runs(), *domain_runs()]
