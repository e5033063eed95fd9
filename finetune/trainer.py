"""The trainer of a recipe."""

from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import has_length

from .adapters import group_of
from .errors import RecipeError
from .mixin import ExpertChoiceTrainerMixin
from .recipe import Recipe


class EcMoeTrainer(ExpertChoiceTrainerMixin, Trainer):
    """Trainer, for expert-choice and dense models."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        self.recipe = recipe
        rates = {name: getattr(recipe, name) for name in ("router_learning_rate", "experts_learning_rate")}
        super().__init__(*args, **rates, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's, when dataloader_drop_last leaves something to train on and to evaluate.

        Raises:
            RecipeError: when it does not, before the run has written anything.
        """
        batches: DataLoader = super().get_train_dataloader()
        self._refuse_no_batch(batches, "training", "per_device_train_batch_size")
        self._refuse_no_batch(self.get_eval_dataloader(), "held-out", "per_device_eval_batch_size")
        return batches

    def _refuse_no_batch(self, batches: DataLoader, what: str, size: str) -> None:
        rows: Any = batches.dataset
        if has_length(batches) and len(batches) == 0:
            raise RecipeError(
                f"dataloader_drop_last=true drops all {len(rows)} {what} sequences, less than a batch of "
                f"{size}={getattr(self.args, size)} on each of {self.args.world_size} processes; lower it, or leave "
                "dataloader_drop_last out"
            )


def freeze(model: Any, recipe: Recipe) -> None:
    """Freezes the router or the experts where the recipe gives them a learning rate of 0.

    Raises:
        RecipeError: when the model has no such part.
    """
    for field, part in (("router_learning_rate", "router"), ("experts_learning_rate", "routed experts")):
        rate = getattr(recipe, field)
        if rate is None:
            continue
        chosen = [p for name, p in model.named_parameters() if group_of(name) == part]
        if not chosen:
            raise RecipeError(f"{field}={rate}: {model.config.model_type} has no {part}; leave it out")
        if rate == 0:
            for parameter in chosen:
                parameter.requires_grad_(False)
