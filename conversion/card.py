"""The model card of a converted checkpoint, rendered from its record: measured figures only."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from .initialisations import INITIALISATIONS
from .plain import PlainPlan
from .plan import Plan
from .source import Source


def render_card(plan: Plan, record: dict[str, Any]) -> str:
    """The card's markdown; it does not depend on the name of the output folder."""
    initialisation = INITIALISATIONS[record["init"]]
    licence = _licence(plan.sources[0])
    hub_ids = [source.source.partition("@")[0] for source in plan.sources if source.commit]
    card_data = ModelCardData(
        base_model=hub_ids or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", "expert-choice", "ecmoe"],
        **licence,
    )
    config: Any = plan.config
    card = ModelCard.from_template(
        card_data,
        template_str=(files("model_cards") / "template.md").read_text(encoding="utf-8"),
        model_name=_short(plan.sources[0]).rpartition("/")[2],
        source_names=" and ".join(f"`{_short(source)}`" for source in plan.sources),
        summary=initialisation.summary,
        paper=initialisation.source,
        step_0=initialisation.step_0,
        sparse_layers=f"{config.mlp_layer_types.count('sparse')} of {config.num_hidden_layers}",
        text_name=f"`{Path(record['text']).name}`",
        licence_note="" if licence else _licence_note(plan.sources[0]),
        **{key: record[key] for key in ("init", "parameters", "num_experts", "capacity_factor", "verification")},
    )
    return str(card).rstrip() + "\n"


def render_plain_card(plan: PlainPlan, record: dict[str, Any]) -> str:
    """The card of a checkpoint that left the family; it does not depend on the name of the output folder."""
    licence = _licence(plan.source)
    card_data = ModelCardData(
        base_model=[plan.source.source.partition("@")[0]] if plan.source.commit else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts"],
        **licence,
    )
    used = ("to", "num_experts", "num_experts_per_tok", "capacity_factor", "is_exact", "parameters", "verification")
    card = ModelCard.from_template(
        card_data,
        template_str=(files("model_cards") / "plain.md").read_text(encoding="utf-8"),
        model_name=_short(plan.source).rpartition("/")[2],
        source_name=_short(plan.source),
        title=plan.target.title,
        idle=plan.form.num_idle,
        exactness=_exactness(plan),
        text_name=f"`{Path(record['text']).name}`",
        licence_note="" if licence else _licence_note(plan.source),
        **{key: record[key] for key in used},
    )
    return str(card).rstrip() + "\n"


def _exactness(plan: PlainPlan) -> list[str]:
    """One line for each part of the model: whether it computes what the source's does."""
    form, config, title = plan.form, plan.source_config, plan.target.title
    lines = ["Exact: embeddings, attention, norms, dense layers and output layer are the source's tensors."]
    if config.routing == "token_choice":
        lines.append(f"Exact: the routes. The source is a token-choice model with {form.top_k} experts per token.")
    elif plan.target.by_score and form.is_exact:
        lines.append("Exact: the routes. A bias stands for each threshold, and idle experts fill up a token's number.")
    elif plan.target.by_score:
        lines.append(
            f"Exact for tokens with at most {form.top_k} experts above their threshold; the others keep their best "
            f"{form.top_k}. A bias stands for each threshold, and idle experts fill up a token's number."
        )
    else:
        lines.append(
            f"Not exact: the routes. Every token takes {form.top_k}, also one that no expert of the source chose or "
            f"that more chose, and the load is balanced no more. {title} has no threshold and no bias"
            + (
                ". A layer's router rows were moved along the direction in which their input is nearly constant, to "
                "rank by the distance to the threshold, where that left less error on the text."
                if plan.measured
                else ", and the router rows are the source's as they are."
            )
        )
    if form.is_scaled:
        lines.append(
            "Not exact: the combine weights. They add up to one here, and one measured number per expert (`scales` in "
            "the record) stands for what they were."
        )
    else:
        lines.append("Exact for the same routes: the combine weights, and each expert's output.")
    if config.shared_expert_intermediate_size:
        held = "lies inside every expert, which is so much wider" if form.is_joined else "is this one's shared expert"
        if plan.target.by_score and form.is_joined:
            held = "is this one's shared expert, and every expert takes its share of it away again"
        lines.append(f"Exact: the shared expert {held}.")
    return lines


def _short(source: Source) -> str:
    """A Hub id as it is; of a folder its name, since a path on this machine says nothing elsewhere."""
    return source.source if source.commit else source.folder.resolve().name


def _licence(source: Source) -> dict[str, Any]:
    """The licence fields of the source's own card."""
    path = source.folder / "README.md"
    if not path.is_file():
        return {}
    try:
        data = metadata_load(path) or {}
    except (ValueError, OSError, yaml.YAMLError):  # a card with broken front matter
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def _licence_note(source: Source) -> str:
    named = sorted(path.name for path in source.folder.glob("LICENSE*") if path.is_file())
    if named:
        return f"The licence of the dense model applies: {', '.join(named)} in this folder."
    return "The dense checkpoint names no licence; its terms apply to this model as well."
