"""Dense checkpoint in, expert-choice checkpoint out; or expert-choice in, plain mixture of experts out."""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import ConversionError

if TYPE_CHECKING:
    from .export import export_plain
    from .upcycle import convert

__all__ = ["ConversionError", "convert", "export_plain"]
_FILES = {"convert": "upcycle", "export_plain": "export"}


def __getattr__(name: str) -> Any:
    """The functions are loaded when they are asked for: Transformers takes seconds, and --help does without it."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)
