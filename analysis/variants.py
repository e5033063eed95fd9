"""The ways of routing that are compared, as config fields over the same weights."""

from dataclasses import dataclass
from typing import Any

from .errors import AnalysisError

DROPLESS = "token choice, dropless"  # the reference: the strongest token choice, and what its inference does
# Of token choice's balance loss, the layers' mean; Switch Transformer (arXiv 2101.03961, section 2.2) weighs their sum
# with 0.01. With 0.01 of the mean upcycled routers of five layers collapse: part `balance` of benchmarks/quality.
BALANCE_COEFFICIENT = 0.1
CAPACITIES = (1.0, 1.25)


@dataclass(frozen=True)
class Variant:
    """One way of routing with `num_choices` experts per token, k, on the mean: the same FLOPs for all of one k.

    Threshold training alone computes more: its slots are static, (1 + threshold_capacity_clamp) times the capacity.
    key: by which a user chooses it, the same for every number of experts per token.
    """

    key: str
    name: str
    num_choices: int
    fields: dict[str, Any]

    @property
    def is_token_choice(self) -> bool:
        return self.fields["routing"] == "token_choice"

    @property
    def has_thresholds(self) -> bool:
        return not self.is_token_choice

    @property
    def trains_by_threshold(self) -> bool:
        return self.fields["routing"] == "threshold"

    @property
    def bounds_experts(self) -> bool:
        return self.fields["min_experts_per_token"] > 0 or self.fields["max_experts_per_token"] is not None

    @property
    def inference_key(self) -> tuple[Any, ...]:
        """The same for variants whose inference is the same, as long as none of them was trained."""
        fields = ("inference_routing", "capacity_factor", "min_experts_per_token", "max_experts_per_token")
        return tuple(self.fields[name] for name in fields)

    @property
    def auxiliary_losses(self) -> list[str]:
        return ["balance"] if self.fields["router_aux_loss_coef"] else []


def variants_of(num_experts: int) -> list[Variant]:
    """Every variant that a model with so many experts can have, for one and for two experts per token.

    Raises:
        AnalysisError: with a single expert.
    """
    if num_experts < 2:
        raise AnalysisError(f"num_experts={num_experts} leaves nothing to choose; convert with more experts")
    return [variant for k in (1, 2) if k < num_experts for variant in _with_choices(k, num_experts)]


def _with_choices(k: int, num_experts: int) -> list[Variant]:
    neutral = {
        "routing": "expert_choice",
        "inference_routing": "threshold",
        "routing_pool": "batch",
        "capacity_factor": k,
        "min_experts_per_token": 0,
        "max_experts_per_token": None,
        "token_choice_capacity_factor": None,
        "threshold_after_steps": 0,
        "router_aux_loss_coef": 0.0,
    }
    token_choice = {
        "routing": "token_choice",
        "inference_routing": "token_choice",
        "router_aux_loss_coef": BALANCE_COEFFICIENT,
    }
    found = [
        (
            f"capacity-{factor}",
            f"token choice, capacity {factor}",
            token_choice | {"token_choice_capacity_factor": factor},
        )
        for factor in CAPACITIES
    ]
    found += [
        ("dropless", DROPLESS, token_choice),
        ("expert-choice", "expert choice", {}),
        ("at-least-1", "expert choice, at least 1", {"min_experts_per_token": 1}),
    ]
    if k + 1 < num_experts:  # a bound of all experts is none
        found.append(("at-most", f"expert choice, at most {k + 1}", {"max_experts_per_token": k + 1}))
    found.append(("threshold", "threshold", {"routing": "threshold"}))
    return [Variant(key, name, k, neutral | changed) for key, name, changed in found]


def configure(model: Any, variant: Variant) -> None:
    """Sets the fields where every block reads them, at each call; none of them changes a weight."""
    config = model.config.get_text_config()
    for name, value in variant.fields.items():
        setattr(config, name, value)
    config.validate()
