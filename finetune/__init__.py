"""Fine-tuning on transformers.Trainer: one recipe for expert-choice models and their dense controls."""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import RecipeError

if TYPE_CHECKING:
    from .mixin import ExpertChoiceTrainerMixin
    from .recipe import Recipe, load_recipe
    from .train import dry_run, run
    from .trainer import EcMoeTrainer

__all__ = ["EcMoeTrainer", "ExpertChoiceTrainerMixin", "Recipe", "RecipeError", "dry_run", "load_recipe", "run"]
_FILES = {
    "EcMoeTrainer": "trainer",
    "ExpertChoiceTrainerMixin": "mixin",
    "Recipe": "recipe",
    "dry_run": "train",
    "load_recipe": "recipe",
    "run": "train",
}


def __getattr__(name: str) -> Any:
    """The functions are loaded when they are asked for: Transformers takes seconds, and --help does without it."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)
