"""Dense checkpoint in, expert-choice checkpoint out."""

from .convert import convert
from .errors import ConversionError

__all__ = ["ConversionError", "convert"]
