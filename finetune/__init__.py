"""Fine-tuning on transformers.Trainer: one recipe for expert-choice models and their dense controls."""

from .recipe import Recipe, RecipeError, load_recipe
from .train import run

__all__ = ["Recipe", "RecipeError", "load_recipe", "run"]
