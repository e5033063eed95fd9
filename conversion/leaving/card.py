"""The model card of a checkpoint that has left the family, rendered from its record: measured figures only."""

from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoints.provenance import licence, licence_note, short_name
from ..texts import shown
from .plain import PlainPlan


def render_plain_card(plan: PlainPlan, record: dict[str, Any]) -> str:
    """The card of a checkpoint that left the family; it does not depend on the name of the output folder."""
    terms = licence(plan.source)
    was_looked_at = record["verification"] is not None and (plan.form.is_scaled or plan.form.is_shifted)
    is_indifferent = was_looked_at and not plan.fitted
    card_data = ModelCardData(
        base_model=[plan.source.source.partition("@")[0]] if plan.source.commit else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts"],
        **terms,
    )
    used = ["to", "num_experts", "num_experts_per_tok", "capacity_factor", "same_routes", "notes", "parameters"]
    used.append("verification")
    card = ModelCard.from_template(
        card_data,
        template_str=(files("ecmoe.model_cards") / "plain.md").read_text(encoding="utf-8"),
        model_name=short_name(plan.source).rpartition("/")[2],
        source_name=short_name(plan.source),
        title=plan.target.title,
        idle=plan.form.num_idle,
        exactness=_exactness(plan, is_indifferent),
        text_name=shown(record["text"]),
        licence_note="" if terms else licence_note(plan.source),
        **{key: record[key] for key in used},
    )
    return str(card).rstrip() + "\n"


def _exactness(plan: PlainPlan, is_indifferent: bool) -> list[str]:
    """One line for each part of the model: whether it computes what the source's does.

    is_indifferent: whether no layer's routes change what it computes.
    """
    form, config = plan.form, plan.source_config
    lines = [
        "Exact: embeddings, attention, norms, dense layers and output layer are the source's tensors.",
        _routes(plan, is_indifferent),
    ]
    if form.is_scaled and not is_indifferent:
        lines.append(
            "Not exact: the combine weights. They add up to one here, and one measured number per expert (`scales` in "
            "the record) stands for what they were."
        )
    elif not is_indifferent:
        lines.append("Exact for the same routes: the combine weights, and each expert's output.")
    if config.shared_expert_intermediate_size:
        held = "lies inside every expert, which is so much wider" if form.is_joined else "is this one's shared expert"
        if plan.target.by_score and form.is_joined:
            held = "is this one's shared expert, and every expert takes its share of it away again"
        lines.append(f"Exact: the shared expert {held}.")
    return lines


def _routes(plan: PlainPlan, is_indifferent: bool) -> str:
    """The line on the routes, or on all that the experts compute where no route changes it."""
    form, config, title = plan.form, plan.source_config, plan.target.title
    if is_indifferent:
        return (
            "Exact: what the experts compute. In every layer they add nothing or are alike, as before training, and "
            f"nothing depends on routes and weights, which are not the source's: every token takes {form.top_k}."
        )
    if config.routing == "token_choice" and config.token_choice_bias_update_rate is not None and not form.is_exact:
        return (
            f"Not exact: the routes. Every token takes the {form.top_k} experts of the highest scores; the source "
            f"ranks by score minus threshold, and {title} has neither threshold nor bias."
        )
    if config.num_expert_groups > 1:
        return (
            f"Not exact: the routes. Every token takes the {form.top_k} experts of the highest scores. In the source "
            f"it has as many of each of {config.num_expert_groups} groups of experts, and {title} has no such groups."
        )
    if config.routing == "token_choice":
        return f"Exact: the routes. The source is a token-choice model with {form.top_k} experts per token."
    if plan.target.by_score and form.is_exact:
        filled = ", and idle experts fill up a token's number" if form.num_idle else ""
        return f"Exact: the routes. A bias stands for each threshold{filled}."
    if plan.target.by_score and form.normalised:
        return (
            f"Not exact: the routes. Every token takes the {form.top_k} experts furthest above their threshold, which "
            "a bias stands for, also those below it; idle experts would count where weights are divided by their sum."
        )
    if plan.target.by_score:
        return (
            f"Exact for tokens with at most {form.top_k} experts above their threshold; the others keep their best "
            f"{form.top_k}. A bias stands for each threshold, and idle experts fill up a token's number."
        )
    return (
        f"Not exact: the routes. Every token takes {form.top_k}, also one that no expert of the source chose or "
        f"that more chose, and the load is balanced no more. {title} has no threshold and no bias"
        + (
            ". A layer's router rows were moved along the direction in which their input is nearly constant, to "
            "rank by the distance to the threshold, where that left less error on the text."
            if plan.measured
            else ", and the router rows are the source's as they are."
        )
    )
