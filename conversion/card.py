"""The model card of a converted checkpoint, rendered from its record: measured figures only."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from .initialisations import INITIALISATIONS
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
