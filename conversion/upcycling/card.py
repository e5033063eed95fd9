"""The model card of a converted checkpoint, rendered from its record: measured figures only."""

from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import modeling_ecmoe

from ..checkpoints.provenance import licence, licence_note, short_name
from ..texts import shown
from .plan import Plan
from .settings import ROUTERS


def render_card(plan: Plan, record: dict[str, Any]) -> str:
    """The card's markdown; it does not depend on the name of the output folder."""
    initialisation = plan.settings.initialisation
    terms = licence(plan.sources[0])
    hub_ids = [source.source.partition("@")[0] for source in plan.sources if source.commit]
    card_data = ModelCardData(
        base_model=hub_ids or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if plan.is_composite else "text-generation",
        tags=["mixture-of-experts", "expert-choice", "ecmoe"],
        **terms,
    )
    config: Any = plan.config
    card = ModelCard.from_template(
        card_data,
        template_str=(files("ecmoe.model_cards") / "template.md").read_text(encoding="utf-8"),
        model_name=short_name(plan.sources[0]).rpartition("/")[2],
        source_names=" and ".join(f"`{short_name(source)}`" for source in plan.sources),
        summary=initialisation.summary.format(**plan.settings.words),
        paper=initialisation.source,
        step_0=_step_0(plan),
        is_mixture=plan.mixture is not None,
        is_composite=plan.is_composite,
        auto_class=modeling_ecmoe.auto_class_of(plan.model.config),
        auto_reader="AutoProcessor" if plan.is_composite else "AutoTokenizer",
        tokens_choose=config.routing == "token_choice",
        options=_options(plan),
        router=ROUTERS[record["router"]],
        experts_per_token=f"{config.min_experts_per_token} to {config.max_experts_per_token or config.num_experts}",
        sparse_layers=f"{config.mlp_layer_types.count('sparse')} of {config.num_hidden_layers}",
        text_name=shown(record["text"]),
        thresholds_from=plan.config.thresholds_from,
        licence_note="" if terms else licence_note(plan.sources[0]),
        **{key: record[key] for key in ("init", "parameters", "num_experts", "capacity_factor", "verification")},
        **{key: record[key] for key in ("seed", "calibration_tokens", "notes", "ways_out")},
    )
    return str(card).rstrip() + "\n"


def _step_0(plan: Plan) -> str:
    """What it computes before any training."""
    if plan.mixture is None:
        return plan.settings.initialisation.step_0.format(**plan.settings.words)
    if plan.is_exact:
        return "what its source computes: each token takes its best experts"
    return "with the source's experts what another choice of them gives; the table says what the loss changed by"


def _options(plan: Plan) -> dict[str, object]:
    """What the initialisation was told beside the number of experts, by what it means."""
    settings = plan.settings
    found: dict[str, object] = {}
    if settings.ratio is not None:
        found[settings.initialisation.ratio] = settings.ratio
    if settings.init == "granular":
        found["shards of a dense FFN"] = settings.num_shards
    return found
