"""Looking at expert-choice models. Reads checkpoints; `calibrate` alone writes to one, and thresholds alone."""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import AnalysisError

if TYPE_CHECKING:
    from .comparison import compare
    from .drawing import draw
    from .evaluation import evaluate
    from .page import report
    from .recalibration import calibrate

__all__ = ["AnalysisError", "calibrate", "compare", "draw", "evaluate", "report"]
_FILES = {
    "calibrate": "recalibration",
    "compare": "comparison",
    "draw": "drawing",
    "evaluate": "evaluation",
    "report": "page",
}


def __getattr__(name: str) -> Any:
    """The functions are loaded when they are asked for: Transformers takes seconds, and --help does without it."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)
