"""The thresholds of a run: exact quantiles on training text wherever they are looked at or kept."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from modeling_ecmoe import calibrate_thresholds

from .data import Endless

CALIBRATION_TOKENS = 131_072  # a quarter of them leaves the load of single experts 11 % off, by sampling alone
CALIBRATION_POOL = 4_096  # tokens of one forward pass, the pool among which experts choose meanwhile


class Calibration:
    """Before every evaluation and checkpoint: the averages of training lag behind a router that learns quickly."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.inputs: list[dict[str, Tensor]] | None = None
        self.step = 0  # of the last run

    def prepare(self) -> None:
        """Reads the text before training reads the same stream."""
        self.inputs = self._batches()

    def refresh(self) -> bool:
        """Runs once in a step, and says whether it did. Not in threshold training, whose routes hang on the averages;
        dense models and token choice have none."""
        is_wanted = self.trainer.routes and self.trainer.model.config.routing == "expert_choice"
        if not is_wanted or self.trainer.state.global_step <= self.step:
            return False
        self.run()
        return True

    def run(self) -> None:
        """Replaces the averages of training by exact quantiles on training text, each rank reading a part of it."""
        if self.inputs is None:
            self.prepare()
        with self.trainer.accelerator.autocast():
            calibrate_thresholds(self.trainer.model, self.inputs or [])
        self.step = self.trainer.state.global_step

    def _batches(self) -> list[dict[str, Tensor]]:
        """This rank's part of the calibration text, as many batches on every rank, which wait for each other."""
        trainer = self.trainer
        ranks, rank = trainer.args.world_size, trainer.args.process_index
        batches, batch = [], []
        for row in _calibration_rows(trainer.train_dataset, ranks)[rank::ranks]:
            batch.append(row)
            if sum(len(row["input_ids"]) for row in batch) >= CALIBRATION_POOL:
                batches.append(batch)
                batch = []
        batches += [batch] if batch or not batches else []
        shared = min(trainer.accelerator.gather(torch.tensor([len(batches)], device=trainer.args.device)).tolist())
        inputs = [trainer.data_collator(batch) for batch in batches[:shared]]
        for one in inputs:
            one.pop("labels")
        return inputs


def _calibration_rows(train: Dataset | Endless, ranks: int) -> list[dict[str, Any]]:
    """Training sequences worth CALIBRATION_TOKENS, as many for every rank."""
    shuffled = iter(train.shuffle(seed=0) if isinstance(train, Dataset) else train)
    rows, tokens = [], 0
    for row in shuffled:
        rows.append(row)
        tokens += len(row["input_ids"])
        if tokens >= CALIBRATION_TOKENS and len(rows) % ranks == 0:
            break
    return rows[: max(1, len(rows) // ranks) * ranks]
