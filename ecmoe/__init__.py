"""Expert-choice mixture-of-experts for Transformers. Importing it makes the family known to the Auto classes.

What a notebook needs is offered here and loaded when it is first asked for; the import itself loads neither torch nor
Transformers, so that a command answers --help at once. `upcycle` a model in memory, `convert` and `export` checkpoints,
`evaluate`, `compare`, `report` and `draw`, look at routes and set thresholds, and fine-tune with `ecmoe.finetune`.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modeling_ecmoe  # registers the family

# In a clone the rooms stand beside this folder and not in it. There they are found whatever is installed elsewhere, so
# that a clone and an installed package are never mixed.
_clone = Path(__file__).parents[1]
if (_clone / "pyproject.toml").is_file() and (_clone / "conversion" / "upcycling").is_dir():
    __path__.insert(0, str(_clone))

if TYPE_CHECKING:
    from modeling_ecmoe import calibrate_thresholds, record_routing, routing_report, use_inference_routing

    from . import analysis, conversion, finetune
    from .analysis import calibrate, compare, draw, evaluate, report
    from .conversion import convert, export, upcycle

__all__ = [
    "analysis",
    "calibrate",
    "calibrate_thresholds",
    "compare",
    "conversion",
    "convert",
    "draw",
    "evaluate",
    "export",
    "finetune",
    "record_routing",
    "report",
    "routing_report",
    "upcycle",
    "use_inference_routing",
]

_MODULES = {
    "modeling_ecmoe": ["calibrate_thresholds", "record_routing", "routing_report", "use_inference_routing"],
    "ecmoe.analysis": ["calibrate", "compare", "draw", "evaluate", "report"],
    "ecmoe.conversion": ["convert", "export", "upcycle"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
_ROOMS = ("analysis", "conversion", "finetune")


def __getattr__(name: str) -> Any:
    """A function from the room it lives in, or a room itself."""
    modeling_ecmoe.register_all()
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
