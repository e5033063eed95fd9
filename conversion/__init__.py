"""Dense checkpoint in, expert-choice checkpoint out; or expert-choice in, plain mixture of experts out."""

from .convert import convert
from .errors import ConversionError
from .export import export_plain

__all__ = ["ConversionError", "convert", "export_plain"]
