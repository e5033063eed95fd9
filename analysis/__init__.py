"""Looking at expert-choice models: reads checkpoints, never writes them."""

from .compare import compare
from .errors import AnalysisError
from .evaluate import evaluate
from .report import report

__all__ = ["AnalysisError", "compare", "evaluate", "report"]
