"""The expert-choice model family. Importing it makes every family known to the Auto classes of Transformers.

What it offers is loaded when it is asked for: the families' classes, such as `EcMoeQwen3ForCausalLM` of qwen3_ecmoe.py,
and what works on any model of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .registry_ecmoe import (
    auto_class_of,
    class_endings,
    class_named,
    composites,
    config_class,
    families,
    model_class,
    register_all,
)

if TYPE_CHECKING:
    from .calibration_ecmoe import calibrate_thresholds
    from .context_ecmoe import use_inference_routing
    from .report_ecmoe import RoutingRecord, record_routing, routing_report, sparse_blocks, training_routes

register_all()

_FILES = {
    "context_ecmoe": ["use_inference_routing"],
    "calibration_ecmoe": ["calibrate_thresholds"],
    "report_ecmoe": ["RoutingRecord", "record_routing", "routing_report", "sparse_blocks", "training_routes"],
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A function or class from the file it lives in; `__all__` lists the families' classes too."""
    register_all()  # again, where another import hook came before ours
    if name in _FILE_OF:
        return getattr(importlib.import_module(f".{_FILE_OF[name]}", __name__), name)
    if name == "__all__":
        classes = [prefix + ending for prefix in families().values() for ending in class_endings()]
        classes += [prefix + ending for prefix in composites().values() for ending in class_endings(is_composite=True)]
        return [*_FILE_OF, "auto_class_of", "composites", "config_class", "families", "model_class", *classes]
    found = class_named(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
