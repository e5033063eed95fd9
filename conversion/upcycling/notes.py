"""What is said of a conversion that is possible and may not be what was meant; and how its result can leave."""

import copy
from typing import Any

from ..targets import ways_out
from .composites import left_out
from .plan import Plan


def notes_on(plan: Plan) -> list[str]:
    """One line each, with the remedy."""
    config: Any = plan.config
    settings, found = plan.settings, []
    balance = getattr(plan.sources[0].config().get_text_config(), "router_aux_loss_coef", 0) if plan.mixture else 0
    if balance and settings.routing != "token_choice":
        found.append(
            f"router_aux_loss_coef={balance} of the source is switched off: the experts take equal shares without a "
            "balance loss; routing=token_choice keeps it"
        )
    if parts := left_out(plan.sources[0]):
        found.append(
            "text_only=True leaves out "
            + ", ".join(f"{part} ({size:,} parameters)" for part, size in parts.items())
            + ": what is written reads text alone"
        )
    if not router_learns(config):
        other = "" if settings.init == "mix" else ", init=granular (the FLOPs of one, in two halves), or init=shared"
        found.append(
            f"init={settings.init} at capacity_factor={config.capacity_factor:g}: every token has one expert, with the "
            "normalised combine weight 1 whatever its score is, so the router has no gradient and learns nothing; "
            f"give capacity_factor=2 (--capacity-factor 2; a token then passes two FFNs){other}"
            if config.num_experts > 1
            else "num_experts=1: there is nothing to choose among, and the router learns nothing; give 2 or more"
        )
    if 1 < config.num_experts == settings.num_shards:
        found.append(
            f"num_experts={config.num_experts} are one copy of each of the {settings.num_shards} shards: there is "
            f"nothing to choose among; give {2 * settings.num_shards} or more, or a smaller granularity"
        )
    closed = "" if plan.is_composite else _closed_by_dense_layers(config)
    if closed:
        found.append(
            f"layers={settings.layers} leaves dense layers, with which the model cannot be written as {closed}; give "
            "layers=all if other tools are to read it"
        )
    return found


def router_learns(config: Any) -> bool:
    """Whether a combine weight depends on the router: of one expert a token, divided by their sum, none does."""
    least, most = config.min_experts_per_token, config.max_experts_per_token or config.num_experts
    one_each = most == 1 or (least >= 1 and config.capacity_factor == 1)
    return not (config.normalize_combine_weights and one_each)


def _closed_by_dense_layers(config: Any) -> str:
    """The classes that a model could leave as if all its layers had experts, and cannot with some dense; "" for none.

    As long as one way is left open, nothing is closed.
    """
    if "dense" not in config.mlp_layer_types or ways_out(config):
        return ""
    whole = copy.deepcopy(config)
    whole.mlp_layer_types = ["sparse"] * config.num_hidden_layers
    return " or ".join(f"{title} (--to {to})" for to, title in ways_out(whole).items())
