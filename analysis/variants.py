"""The ways of routing that are compared, as config fields over the same weights."""

from dataclasses import dataclass
from typing import Any

from .errors import AnalysisError

DROPLESS = "token choice, dropless"  # the reference: the strongest token choice, and what its inference does
# Of token choice's balance loss, the layers' mean; Switch Transformer (arXiv 2101.03961, section 2.2) weighs their sum
# with 0.01. With 0.01 of the mean upcycled routers of five layers collapse: part `balance` of benchmarks/quality.
BALANCE_COEFFICIENT = 0.1
BIAS_UPDATE_RATE = 1e-3  # of the paper (arXiv 2408.15664, section 4.1)
CAPACITIES = (1.0, 1.25)


@dataclass(frozen=True)
class Variant:
    """One way of routing with `num_choices` experts per token, k, on the mean: the same FLOPs for all of one k.

    Threshold training alone computes more: its slots are static, (1 + threshold_capacity_clamp) times the capacity.
    key: by which a user chooses it, the same for every number of experts per token.
    is_token_choice: every token has exactly k experts at inference, whatever balances them.
    starts_without_bias: the thresholds that the checkpoint has are those of expert choice, and no bias of token choice.
    """

    key: str
    name: str
    num_choices: int
    fields: dict[str, Any]
    is_token_choice: bool = False
    starts_without_bias: bool = False

    @property
    def has_thresholds(self) -> bool:
        """Whether they are calibrated on text."""
        return self.fields["routing"] != "token_choice"

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
        has_bias = self.fields["token_choice_bias_update_rate"] is not None and not self.starts_without_bias
        return *(self.fields[name] for name in fields), has_bias

    @property
    def auxiliary_losses(self) -> list[str]:
        return ["balance"] if self.fields["router_aux_loss_coef"] else []


def variants_of(
    num_experts: int, own: float = 1, bias_update_rate: float | None = None, num_groups: int = 1
) -> list[Variant]:
    """Every variant that a model can have: for one and for two experts per token, or for as many as it has itself.

    Args:
        num_experts: of each block.
        own: the checkpoint's experts per token, `capacity_factor`; above 2 they alone are compared.
        bias_update_rate: the checkpoint's `token_choice_bias_update_rate`. Where there is one, its thresholds are the
            bias of token choice, and every token choice here begins with them.
        num_groups: the checkpoint's `num_expert_groups`, of which a token has as many experts of each: one and two of
            each are compared.

    Raises:
        AnalysisError: with a single expert, or one in each group.
    """
    if num_experts // num_groups < 2:
        groups = f" with num_expert_groups={num_groups}" if num_groups > 1 else ""
        raise AnalysisError(f"num_experts={num_experts}{groups} leaves nothing to choose; convert with more experts")
    each = own / num_groups
    of_each = (round(each),) if 2.5 < each < num_experts / num_groups - 0.5 else (1, 2)
    numbers = [number * num_groups for number in of_each]
    has_bias = bias_update_rate is not None
    return [v for k in numbers if k < num_experts for v in _with_choices(k, num_experts, has_bias, num_groups)]


def _with_choices(k: int, num_experts: int, has_bias: bool, num_groups: int) -> list[Variant]:
    neutral = {
        "routing": "expert_choice",
        "inference_routing": "threshold",
        "routing_pool": "batch",
        "capacity_factor": k,
        "min_experts_per_token": 0,
        "max_experts_per_token": None,
        "token_choice_capacity_factor": None,
        "token_choice_bias_update_rate": None,
        "threshold_after_steps": 0,
        "router_aux_loss_coef": 0.0,
    }
    tokens_choose = {"routing": "token_choice", "inference_routing": "token_choice"}
    balanced = tokens_choose | {
        "router_aux_loss_coef": BALANCE_COEFFICIENT,
        "token_choice_bias_update_rate": 0.0 if has_bias else None,
    }
    nudged = tokens_choose | {"token_choice_bias_update_rate": BIAS_UPDATE_RATE}
    by_tokens: list[tuple[str, str, dict[str, Any]]] = [
        (f"capacity-{factor}", f"token choice, capacity {factor}", balanced | {"token_choice_capacity_factor": factor})
        for factor in CAPACITIES
    ]
    by_tokens += [
        ("dropless", DROPLESS, balanced),
        ("nudged-bias", "token choice, nudged bias", nudged),
        ("quantiles", "token choice, by quantiles", {"min_experts_per_token": k, "max_experts_per_token": k}),
    ]
    by_experts: list[tuple[str, str, dict[str, Any]]] = [
        ("expert-choice", "expert choice", {}),
        ("at-least-1", f"expert choice, at least {num_groups}", {"min_experts_per_token": num_groups}),
    ]
    most = k + num_groups
    if most < num_experts:  # a bound of all experts is none
        by_experts.append(("at-most", f"expert choice, at most {most}", {"max_experts_per_token": most}))
    by_experts.append(("threshold", "threshold", {"routing": "threshold"}))
    return [
        Variant(key, name, k, neutral | changed, True, key == "nudged-bias" and not has_bias)
        for key, name, changed in by_tokens
    ] + [Variant(key, name, k, neutral | changed) for key, name, changed in by_experts]


def configure(model: Any, variant: Variant) -> None:
    """Sets the fields where every block reads them, at each call; none of them changes a weight."""
    config = model.config.get_text_config()
    for name, value in variant.fields.items():
        setattr(config, name, value)
    config.validate()
