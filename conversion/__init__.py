"""Dense in, expert choice out, in folders or in memory; or expert choice in, plain mixture of experts out."""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import ConversionError

if TYPE_CHECKING:
    from .leaving.export import export
    from .upcycling.convert import convert
    from .upcycling.in_memory import upcycle

__all__ = ["ConversionError", "convert", "export", "upcycle"]
_FILES = {"convert": "upcycling.convert", "export": "leaving.export", "upcycle": "upcycling.in_memory"}


def __getattr__(name: str) -> Any:
    """The functions are loaded when they are asked for: Transformers takes seconds, and --help does without it."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)
