"""Looking at expert-choice models: reads checkpoints, never writes them."""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import AnalysisError

if TYPE_CHECKING:
    from .comparison import compare
    from .drawing import draw
    from .evaluation import evaluate
    from .page import report

__all__ = ["AnalysisError", "compare", "draw", "evaluate", "report"]
_FILES = {"compare": "comparison", "draw": "drawing", "evaluate": "evaluation", "report": "page"}


def __getattr__(name: str) -> Any:
    """The functions are loaded when they are asked for: Transformers takes seconds, and --help does without it."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)
