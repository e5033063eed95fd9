"""transformers.Trainer with what expert choice adds: learning rates by part, routing metrics, safe checkpoints."""

import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, has_length

from modeling_ecmoe import record_routing, sparse_blocks, use_inference_routing

from .adapters import group_of
from .calibration import Calibration
from .errors import RecipeError
from .folder import last_whole_checkpoint, step_of
from .recipe import Recipe


def is_expert_choice(model: Any) -> bool:
    """Whether a model of the family, not its token-choice baseline."""
    config = model.config
    return str(config.model_type).startswith("ecmoe_") and config.routing != "token_choice"


class StepTimer(TrainerCallback):
    """Seconds of each optimiser step, evaluation and logging left out; and the thresholds at the last log."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.thresholds: Tensor | None = None
        self._begin = 0.0

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        # A checkpoint has been loaded by now, and thresholds were logged when it was saved.
        self.thresholds = _thresholds(model) if is_expert_choice(model) else None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


class LogBeforeSaving(TrainerCallback):
    """A checkpoint never splits the steps that one line of the log averages: a resumed log has the same lines."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = control.should_log or control.should_save
        return control

    on_epoch_end = on_step_end


class EcMoeTrainer(Trainer):
    """Trainer, for expert-choice and dense models.

    Nothing in it is needed to train: the model keeps its thresholds itself.
    """

    model: Any

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        self.recipe = recipe
        self.timer = StepTimer()
        self.calibration = Calibration(self)
        super().__init__(*args, **kwargs, callbacks=[self.timer, LogBeforeSaving()])
        self.routes = is_expert_choice(self.model)
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)  # of this rank, since the last log
        self._timed_steps = 0
        self.routing: dict[str, float] | None = None  # how the thresholds routed in the last evaluation

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

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As Trainer's, with the router's and the experts' parameters in groups of their own learning rate."""
        optimizer = super().create_optimizer(model)
        rates = {"router": self.recipe.router_learning_rate, "routed experts": self.recipe.experts_learning_rate}
        if not any(rates.values()):
            return optimizer
        parts = {id(parameter): group_of(name) for name, parameter in self.model.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            for part in ("router", "routed experts", "rest"):
                chosen = [p for p in group["params"] if _part(parts.get(id(p)), rates) == part]
                if chosen:
                    groups.append(group | {"params": chosen, "lr": rates.get(part) or group["lr"]})
        optimizer.param_groups = groups
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's, which takes over the settings of another optimiser and fails at the first step."""
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer: Any = self.optimizer
        settings = getattr(optimizer, "defaults", {})  # DeepSpeed's has none, and looks for itself
        lacking = [name for name in settings if any(name not in group for group in optimizer.param_groups)]
        if lacking:
            raise ValueError(f"the checkpoint is another optimiser's, without {', '.join(lacking)}")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, by thresholds that have caught up with the router."""
        self._calibrate()
        return super().evaluate(*args, **kwargs)

    def _calibrate(self) -> None:
        try:
            is_new = self.calibration.refresh()
        except ValueError:  # the router scores are no numbers
            self._stop_at_nan("router scores", math.nan)
        if is_new and self.timer.thresholds is not None:
            self.timer.thresholds = _thresholds(self.model)  # what the next line of the log compares with

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The causal loss; beside it how the thresholds route, and the top-k loss, which looks at the future."""
        if not self.routes or self.args.torch_compile:  # a compiled model runs past the hooks that count routes
            return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        with record_routing(self.model) as record:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._close_progress_bar()
        with use_inference_routing(self.model, "expert_choice"):
            top_k = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        first, *others = gather_object([record])  # each rank evaluated its share of the held-out rows
        for other in others:
            first.merge(other)
        metrics, metrics_top_k = output.metrics or {}, top_k.metrics or {}
        loss, loss_top_k = (found[f"{metric_key_prefix}_loss"] for found in (metrics, metrics_top_k))
        metrics[f"{metric_key_prefix}_loss_top_k"] = loss_top_k
        metrics[f"{metric_key_prefix}_loss_gap"] = loss - loss_top_k
        self.routing = first.summary()
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self.routing.items()}
        return output._replace(metrics=metrics)

    def _close_progress_bar(self) -> None:
        """Of the first pass of an evaluation: the second one has a bar of its own."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.on_evaluate(self.args, self.state, self.control)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer takes one step too many when it resumes from a checkpoint of the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's; counts the tokens that are no padding."""
        mask = inputs.get("attention_mask")
        self._tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens per second and how far the thresholds moved; a loss that is no number ends the run."""
        # Under a gradient scaler a step whose gradient is no number is left out: no weight moves, and the thresholds of
        # its micro-batches count with the next step's, but for those that are no number.
        for name in ("loss", "eval_loss", *(() if self.args.fp16 else ("grad_norm",))):
            if name in logs and not math.isfinite(logs[name]):
                self._stop_at_nan(name, logs[name])
        tokens = int(self.accelerator.gather(self._tokens).sum())
        self._tokens.zero_()
        if self.args.include_num_input_tokens_seen == "no":  # Trainer counts them otherwise
            self.state.num_input_tokens_seen += tokens  # goes into checkpoints
        if "loss" in logs:
            logs = logs | self._training_metrics(tokens)
        if "train_loss" in logs:
            logs = logs | {"train_loss": self._mean_loss()}
        super().log(logs, start_time)

    def _training_metrics(self, tokens: int) -> dict[str, float]:
        metrics = {}
        seconds = self.timer.seconds[self._timed_steps :]
        self._timed_steps = len(self.timer.seconds)
        if seconds:
            metrics["train_tokens_per_second"] = tokens / len(seconds) / statistics.median(seconds)
        if self.timer.thresholds is not None:
            thresholds = _thresholds(self.model)
            metrics["threshold_change"] = (thresholds - self.timer.thresholds).abs().mean().item()
            self.timer.thresholds = thresholds
        return metrics

    def _mean_loss(self) -> float:
        """Of the whole run, also of one that was stopped and resumed; Trainer's own begins where it was resumed."""
        total, last = float(self._tr_loss), 0.0
        for row in self.state.log_history:
            if "loss" in row:
                total += row["loss"] * (row["step"] - last)
                last = row["step"]
        return total / max(self.state.global_step, 1)

    def _stop_at_nan(self, name: str, value: float) -> NoReturn:
        if self.state.global_step == 0:
            raise RecipeError(f"{name}={value} before any training; check model={self.recipe.model} and its dtype")
        checkpoint = last_whole_checkpoint(Path(str(self.args.output_dir)))
        kept = f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written"
        raise RecipeError(
            f"{name}={value} at step {self.state.global_step}: training has diverged; lower learning_rate, or set "
            f"max_grad_norm or warmup_steps; {kept}"
        )

    def _save_rng_state(self, output_dir: str) -> None:
        """The last part that every rank writes; the state that marks a checkpoint as whole comes after it."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint that cannot be written leaves no half of itself, and the earlier ones alone."""
        self._calibrate()
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception:
            folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if self.is_world_process_zero() and step_of(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _thresholds(model: Any) -> Tensor:
    """Of all layers, [L, E] on the CPU."""
    gates = [block.gate for block in sparse_blocks(model).values()]
    return torch.stack([gate.threshold.detach().float().cpu() for gate in gates])


def _part(group: str | None, rates: dict[str, float | int | None]) -> str:
    return group if group is not None and rates.get(group) is not None else "rest"


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
