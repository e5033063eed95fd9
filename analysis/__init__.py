"""Looking at expert-choice models: reads checkpoints, never writes them."""

from .errors import AnalysisError
from .evaluate import evaluate
from .report import report

__all__ = ["AnalysisError", "evaluate", "report"]
