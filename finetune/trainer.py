"""The trainer of a recipe."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length
from trl import SFTTrainer

from .errors import RecipeError
from .mixin import ExpertChoiceTrainerMixin


class EcMoeTrainer(ExpertChoiceTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer, for expert-choice and dense models."""

    card: str | None = None  # of a finished run, in place of TRL's and PEFT's

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """As SFTTrainer's, which rounds what is trained of a quantised model to bfloat16: most steps of AdamW would be
        rounded away."""
        is_loaded = isinstance(model, nn.Module)
        trained = [(p, p.data) for p in model.parameters() if p.requires_grad] if is_loaded else []
        super().__init__(model, *args, **kwargs)
        for parameter, data in trained:
            if parameter.dtype != data.dtype:
                parameter.data = data

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run's own. TRL's, for the Hub alone: of a model from a folder it says that it is a fine-tuned version of
        None."""
        if self.card is not None and self.is_world_process_zero():
            (Path(str(self.args.output_dir)) / "README.md").write_text(self.card, encoding="utf-8")
        elif self.card is None and self.args.push_to_hub:
            super().create_model_card(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As SFTTrainer's, when dataloader_drop_last leaves something to train on and to evaluate.

        Raises:
            RecipeError: when it does not, before the run has written anything.
        """
        batches: DataLoader = super().get_train_dataloader()
        for loader, what in ((batches, "train"), (self.get_eval_dataloader(), "eval")):
            if has_length(loader) and len(loader) == 0:
                size = f"per_device_{what}_batch_size"
                raise RecipeError(
                    f"dataloader_drop_last=true drops all sequences to {what} on, less than a batch of "
                    f"{size}={getattr(self.args, size)} on each of {self.args.world_size} processes; lower it, or "
                    "leave dataloader_drop_last out"
                )
        return batches
