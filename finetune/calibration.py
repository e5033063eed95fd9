"""The thresholds of a run: exact quantiles on training text wherever they are looked at or kept."""

import sys
from collections import deque
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from modeling_ecmoe import calibrate_thresholds

from .data import Endless

CALIBRATION_TOKENS = 131_072  # a quarter of them leaves the load of single experts 11 % off, by sampling alone
_TOKENS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")  # columns of TRL's rows
_INPUTS = {"input_ids", "attention_mask", "position_ids", "seq_idx"}
_INPUTS |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}  # of a batch that is one row
CALIBRATION_POOL = 4_096  # tokens of one forward pass, the pool among which experts choose meanwhile


class Calibration:
    """Before every evaluation and checkpoint: the averages of training lag behind a router that learns quickly."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.inputs: list[dict[str, Tensor]] | None = None
        self.last: tuple[Any, int] = (None, 0)  # training run and step of the last calibration
        self.lately: deque[dict[str, Tensor]] = deque()  # what a trainer of its own rows has trained on

    def watch(self) -> None:
        """Keeps what the model is trained on lately, where the dataset holds prompts that it goes on from by itself."""
        if self._has_token_rows() or not self.trainer.routes:
            return
        base = self.trainer.accelerator.unwrap_model(self.trainer.model).get_decoder()
        base.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _has_token_rows(self) -> bool:
        rows: Any = self.trainer.train_dataset
        names = getattr(rows, "column_names", None)
        return isinstance(rows, Endless) or names is None or any(name in names for name in _TOKENS)

    def _keep(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not (module.training and torch.is_grad_enabled()) or ids is None:
            return  # generated, or looked at
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else torch.ones_like(ids)
        self.lately.append({"input_ids": ids.detach().cpu(), "attention_mask": mask.detach().cpu()})
        while sum(batch["input_ids"].numel() for batch in self.lately) > CALIBRATION_TOKENS and len(self.lately) > 1:
            self.lately.popleft()

    def prepare(self) -> None:
        """Reads the text before training reads the same stream."""
        self.inputs = self._batches()

    def refresh(self) -> bool:
        """Runs once in a step, and says whether it did. Not in threshold training, whose routes hang on the averages;
        dense models and token choice have none."""
        is_wanted = self.trainer.routes and self.trainer.model.config.get_text_config().routing == "expert_choice"
        state, (run, step) = self.trainer.state, self.last
        if not is_wanted or state.global_step <= (step if run is state else 0):
            return False
        self.run()
        return True

    def run(self) -> None:
        """Replaces the averages of training by exact quantiles on training text, each rank reading a part of it."""
        if self.inputs is None and self._has_token_rows():
            self.prepare()
        inputs = self.inputs if self._has_token_rows() else list(self.lately)
        if not inputs:
            return
        # An optimiser that trains other weights than it keeps (schedule-free ones) first puts back those that are kept.
        if callable(getattr(self.trainer.optimizer, "eval", None)):
            self.trainer.optimizer.eval()
        with self.trainer.accelerator.autocast():
            calibrate_thresholds(self.trainer.model, inputs, text_name="the text of fine-tuning")
        self.last = self.trainer.state, self.trainer.state.global_step

    def _batches(self) -> list[dict[str, Tensor]]:
        """This rank's part of the calibration text, as many batches on every rank, which wait for each other."""
        trainer = self.trainer
        ranks, rank = trainer.args.world_size, trainer.args.process_index
        # Attention over a batch that is one row costs the square of its tokens: not more than a training step's.
        most = trainer.args.train_batch_size if getattr(trainer.data_collator, "padding_free", False) else sys.maxsize
        batches, batch = [], []
        for row in _calibration_rows(trainer.train_dataset, ranks)[rank::ranks]:
            batch.append(row)
            if len(batch) == most or sum(map(_tokens_of, batch)) >= CALIBRATION_POOL:
                batches.append(batch)
                batch = []
        batches += [batch] if batch or not batches else []
        shared = min(trainer.accelerator.gather(torch.tensor([len(batches)], device=trainer.args.device)).tolist())
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="calibration")
        inputs = (collate(batch) for batch in batches[:shared])
        return [{name: value for name, value in one.items() if name in _INPUTS} for one in inputs]


def _calibration_rows(train: Dataset | Endless, ranks: int) -> list[dict[str, Any]]:
    """Training sequences worth CALIBRATION_TOKENS, as many for every rank."""
    shuffled = iter(train.shuffle(seed=0) if isinstance(train, Dataset) else train)
    rows, tokens = [], 0
    for row in shuffled:
        rows.append(row)
        tokens += _tokens_of(row)
        if tokens >= CALIBRATION_TOKENS and len(rows) % ranks == 0:
            break
    return rows[: max(1, len(rows) // ranks) * ranks]


def _tokens_of(row: dict[str, Any]) -> int:
    return sum(len(row[name]) for name in _TOKENS if name in row)
