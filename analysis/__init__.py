"""Looking at expert-choice models: reads checkpoints, never writes them."""

from .errors import AnalysisError
from .evaluate import evaluate

__all__ = ["AnalysisError", "evaluate"]
