"""What a record and a model card say of where a checkpoint comes from."""

import importlib.metadata
import importlib.util
from typing import Any

import yaml
from huggingface_hub import metadata_load

from .folder import Checkpoint
from .source import Source

RECORD_NAME = "ecmoe_conversion.json"
_PACKAGES = ("torch", "transformers", "accelerate", "safetensors")
# Of an environment without Accelerate, which `upcycle` does not need, no record is written.
VERSIONS = {name: importlib.metadata.version(name) for name in _PACKAGES if importlib.util.find_spec(name)}


def short_name(source: Source) -> str:
    """A Hub id as it is; of a folder its name, since a path on this machine says nothing elsewhere."""
    if source.commit or not isinstance(source, Checkpoint):
        return source.source
    return source.folder.resolve().name


def licence(source: Source) -> dict[str, Any]:
    """The licence fields of the source's own card."""
    if not isinstance(source, Checkpoint):
        return {}
    path = source.folder / "README.md"
    if not path.is_file():
        return {}
    try:
        data = metadata_load(path) or {}
    except (ValueError, OSError, yaml.YAMLError):  # a card with broken front matter
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def licence_note(source: Source) -> str:
    named = []
    if isinstance(source, Checkpoint):
        named = sorted(path.name for path in source.folder.glob("LICENSE*") if path.is_file())
    if named:
        return f"The licence of the dense model applies: {', '.join(named)} in this folder."
    return "The dense checkpoint names no licence; its terms apply to this model as well."
