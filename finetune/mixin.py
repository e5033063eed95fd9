"""What expert choice adds to a trainer of Transformers or TRL, as a mixin before it in the method order.

    class Tuned(ExpertChoiceTrainerMixin, DPOTrainer): ...

Nothing in it is needed to train: the model keeps its thresholds itself. It brings thresholds that have caught up with
the router wherever they are looked at or kept, losses that do not depend on how rows are put into batches, what the
routes look like, learning rates by part, and runs that stop at a loss that is no number and resume to the bit.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import (
    DataCollatorWithFlattening,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from ecmoe.encoding import IGNORE
from modeling_ecmoe import record_routing, use_inference_routing

from .adapters import group_of
from .calibration import Calibration
from .callbacks import LogBeforeSaving, Progress, StepTimer, has_experts, is_expert_choice, thresholds_of
from .errors import RecipeError
from .folder import last_whole_checkpoint, step_of
from .losses import LossSums, RowLengths, router_losses, standard_error

LOSSES_BEFORE = "ecmoe_losses_before"  # among what Trainer's state keeps of callbacks


def is_flash(model: Any) -> bool:
    """Whether attention is FlashAttention's, which tells packed documents apart in a batch of one row alone."""
    return "flash" in str(model.config._attn_implementation)


class ExpertChoiceTrainerMixin:
    """Before a trainer of Transformers or TRL in the method order; works on dense models too, which have no routes.

    Args:
        router_learning_rate, experts_learning_rate: of these weights, where it is not learning_rate; 0 freezes them.

    Raises:
        RecipeError: for a rate of a part that the model has not, and for a balance loss of expert choice.
    """

    aux_loss_enabled: Any  # of TRL's trainers
    data_collator: Any

    def __init__(
        self,
        *args: Any,
        router_learning_rate: float | None = None,
        experts_learning_rate: float | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        self.rates = {"router": router_learning_rate, "routed experts": experts_learning_rate}
        self.timer = StepTimer()
        self.calibration = Calibration(self)
        self.sums = LossSums()
        super().__init__(*args, callbacks=[self.timer, LogBeforeSaving(), *(callbacks or [])], **kwargs)
        if self.pop_callback(ProgressCallback):
            self.add_callback(Progress())
        self._freeze()
        self._adds_router_loss = self._take_router_losses()
        self._refuse_settings()
        self.routes = is_expert_choice(self.model)
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)  # of this rank, since the last log
        self.timed_tokens = 0  # that are no padding, of the steps since this process began, on all ranks
        self._logged = (0, 0)  # of these tokens, and of the steps, at the last line of the log
        self.losses: list[tuple[float, int]] = []  # of the rows of the last evaluation: summed, and learned tokens
        self.routing: dict[str, float] | None = None  # the load in the last evaluation
        self.calibration.watch()

    def _freeze(self) -> None:
        """The parts whose learning rate is 0."""
        for part, rate in self.rates.items():
            chosen = [p for name, p in self.model.named_parameters() if group_of(name) == part]
            if rate is not None and not chosen:
                field = "router_learning_rate" if part == "router" else "experts_learning_rate"
                raise RecipeError(f"{field}={rate}: {self.model.config.model_type} has no {part}; leave it out")
            for parameter in chosen if rate == 0 else ():
                parameter.requires_grad_(False)

    def _refuse_settings(self) -> None:
        """What would cast the weights themselves, or take padding for text."""
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self.args, name):
                raise RecipeError(
                    f"{name}=True casts the weights that are trained and saved; leave it out, or set bf16"
                )
        collator = self.data_collator
        if getattr(collator, "padding_free", False) and getattr(collator, "pad_to_multiple_of", None):
            raise RecipeError(
                f"pad_to_multiple_of={collator.pad_to_multiple_of} fills batches that are one row with padding that "
                "nothing marks, and the experts would choose it; leave it out"
            )

    def _take_router_losses(self) -> bool:
        """Whether the router's losses are added here: TRL's trainers compute the loss beside the model, know no z-loss,
        and balance token choice over all layers at once, where opposite collapses cancel; and so does Trainer where it
        smooths labels or has a loss of the user's."""
        config = self.model.config.get_text_config()
        if not has_experts(self.model):
            return False
        has_router_loss = bool(config.router_z_loss_coef or config.router_aux_loss_coef)
        if not hasattr(self, "aux_loss_enabled"):
            is_beside = self.label_smoother is not None or self.compute_loss_func is not None
            return has_router_loss and is_beside
        if self.aux_loss_enabled and config.routing != "token_choice":
            raise RecipeError(
                f"router_aux_loss_coef={self.router_aux_loss_coef} balances token choice, and routing={config.routing} "
                "is balanced by construction; leave it out"
            )
        self.aux_loss_enabled = config.output_router_logits = False  # TRL has just set it
        return has_router_loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """As the trainer's, with the router's losses by their coefficients."""
        arguments = (model, inputs, return_outputs, num_items_in_batch)
        if not self._adds_router_loss or not self.model.training:
            return super().compute_loss(*arguments, **kwargs)
        labels = inputs.get("labels")  # which some losses take out
        whole = self.accelerator.unwrap_model(self.model)
        with router_losses(whole.get_base_model() if hasattr(whole, "get_base_model") else whole) as found:
            result = super().compute_loss(*arguments, **kwargs)
        added = torch.stack(found).mean()
        if num_items_in_batch is not None and labels is not None:
            # Over several micro-batches and ranks the loss is a share of the step's predicted tokens, and so is this.
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            added = added * ranks * (labels[..., 1:] != IGNORE).sum() / num_items_in_batch
        elif getattr(self, "loss_is_scaled_for_ga", None):  # as of GRPO, whose loss Trainer does not divide
            added = added / self.current_gradient_accumulation_steps
        return (result[0] + added, *result[1:]) if isinstance(result, tuple) else result + added

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As Trainer's, with the router's and the experts' parameters in groups of their own learning rate."""
        optimizer = super().create_optimizer(model)
        rates = self.rates
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
        named = [name for name in settings if name != "differentiable"]  # which torch adds to any while it loads
        lacking = [name for name in named if any(name not in group for group in optimizer.param_groups)]
        if lacking:
            raise ValueError(f"the checkpoint is another optimiser's, without {', '.join(lacking)}")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, by thresholds that have caught up with the router."""
        self._calibrate()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, by thresholds that have caught up with the router."""
        self._calibrate()
        return super().predict(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, with thresholds that have caught up with the router; of several ranks all have to ask for it,
        which only Trainer itself is sure to do."""
        if _internal_call or self.args.world_size == 1:
            self._calibrate()
        super().save_model(output_dir, _internal_call=_internal_call)

    def _calibrate(self) -> None:
        try:
            is_new = self.calibration.refresh()
        except ValueError as error:
            if "are no numbers" not in str(error):
                raise
            self._stop_at_nan("router scores", math.nan)
        if is_new and self.timer.thresholds is not None:
            self.timer.thresholds = thresholds_of(self.model)  # what the next line of the log compares with

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; a batch that is one row tells of which rows it was made."""
        collator = self.data_collator
        if getattr(collator, "padding_free", False) or isinstance(collator, DataCollatorWithFlattening):
            self.data_collator = RowLengths(collator)
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; the losses of the rows are added up beside the batch's mean."""
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        if labels is None:  # preferences, rewards: what is evaluated there is the trainer's own
            return super().prediction_step(model, inputs, *args, **kwargs)
        self._refuse_mixed_documents(inputs)
        lengths = inputs.pop("row_lengths", None)
        with self.sums.watch(self.accelerator.unwrap_model(model), labels, lengths):
            predicted = super().prediction_step(model, inputs, *args, **kwargs)
        self.sums.gather(self.accelerator)
        return predicted

    def _refuse_mixed_documents(self, inputs: Any) -> None:
        """Packed rows side by side under FlashAttention, where the documents of a row would see each other."""
        positions = inputs.get("position_ids") if isinstance(inputs, Mapping) and is_flash(self.model) else None
        if positions is None or len(positions) == 1 or inputs.get("attention_mask") is not None:
            return
        if (positions[:, 1:] == 0).any():
            raise RecipeError(
                f"attn_implementation={self.model.config._attn_implementation} sees no documents in a batch of "
                f"{len(positions)} packed rows; put them into one row, as TRL's padding_free=True does, or take sdpa"
            )

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The causal loss; beside it the load of the experts and, where they choose, the top-k loss, which looks at the
        future.

        A loss is the sum over learned tokens by their number. The trainers' own is a mean of the batches' means, in
        which a token of a short answer counts more than one of a long answer, and the more the larger the batch. A
        loss that is another than the likelihood stays the trainer's, and `nll` stands beside it.
        """
        # A compiled model runs past the hooks that count routes.
        if not has_experts(self.model) or self.args.torch_compile:
            return self._causal_pass(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        with record_routing(self.model) as record:
            output = self._causal_pass(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = output.metrics or {}
        first, *others = gather_object([record])  # each rank evaluated its share of the held-out rows
        for other in others:
            first.merge(other)
        if self.routes and f"{metric_key_prefix}_loss" in metrics:
            self._close_progress_bar()
            logged = {name: list(values) for name, values in getattr(self, "_metrics", {}).get("eval", {}).items()}
            with use_inference_routing(self.model, "expert_choice"):
                top_k = self._evaluation_pass(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            if logged:  # TRL's own of the causal pass alone
                self._metrics["eval"].update(logged)
            name = f"{metric_key_prefix}_nll" if f"{metric_key_prefix}_nll" in metrics else f"{metric_key_prefix}_loss"
            loss, loss_top_k = (found[name] for found in (metrics, top_k.metrics or {}))
            metrics[f"{metric_key_prefix}_loss_top_k"] = loss_top_k
            metrics[f"{metric_key_prefix}_loss_gap"] = loss - loss_top_k
        self.routing = first.summary()
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self.routing.items()}
        return output._replace(metrics=metrics)

    def _causal_pass(self, *args: Any, metric_key_prefix: str, **kwargs: Any) -> EvalLoopOutput:
        """The first pass, with the standard error of its loss; the losses of its rows are kept, and of those before
        training in the checkpoints too, so that a run can say how sure the change between the two is."""
        output = self._evaluation_pass(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.losses = self.sums.losses()
        error = standard_error(self.losses)
        if error is not None:
            name = "loss" if self._learns_likelihood() else "nll"
            (output.metrics or {})[f"{metric_key_prefix}_{name}_stderr"] = error
        if self.losses and self.state.global_step == 0 and self.state.stateful_callbacks is not None:
            self.state.stateful_callbacks[LOSSES_BEFORE] = self.losses
        return output

    def loss_changes(self) -> list[tuple[float, int]] | None:
        """Of each row of the last evaluation, the change of its summed loss since before training, and its learned
        tokens; None where those before are not known, or are other rows."""
        before = (self.state.stateful_callbacks or {}).get(LOSSES_BEFORE)
        if not before or [tokens for _, tokens in before] != [tokens for _, tokens in self.losses]:
            return None
        return [(now - then, tokens) for (then, _), (now, tokens) in zip(before, self.losses, strict=True)]

    def _evaluation_pass(self, *args: Any, metric_key_prefix: str, **kwargs: Any) -> EvalLoopOutput:
        """One pass over the held-out rows, with the loss by tokens in place of the mean of means."""
        self.sums.reset()
        output: EvalLoopOutput = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self.sums.means()
        if self.sums.rows and not means:
            raise RecipeError("the held-out rows hold no token that is learned; give others, or a larger max_length")
        if means:
            name = "loss" if self._learns_likelihood() else "nll"
            (output.metrics or {})[f"{metric_key_prefix}_{name}"] = means.pop("loss")
            for name, mean in means.items():  # TRL logs the means of the batches' means
                self._metrics["eval"][name] = [mean]
        return output

    def _learns_likelihood(self) -> bool:
        """Whether the trainer's loss is the negative log-likelihood of the labels, not the user's own or another."""
        owner = next(
            base for base in type(self).__mro__ if "compute_loss" in vars(base) and base is not ExpertChoiceTrainerMixin
        )
        is_own = not owner.__module__.startswith(("transformers.", "trl."))
        is_other = getattr(self.args, "loss_type", "nll") != "nll" or self.label_smoother is not None
        return not (is_own or is_other or self.compute_loss_func is not None)

    def _close_progress_bar(self) -> None:
        """Of the first pass of an evaluation: the second one has a bar of its own."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.on_evaluate(self.args, self.state, self.control)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As Trainer's, which is alarmed by a head that is tied to the embedding and so in no checkpoint."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer takes one step too many when it resumes from a checkpoint of the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's; counts the tokens that are no padding."""
        self._refuse_mixed_documents(inputs)
        self._tokens += _tokens_in(inputs)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens per second and how far the thresholds moved; a loss that is no number ends the run."""
        # Under a gradient scaler a step whose gradient is no number is left out: no weight moves, and the thresholds of
        # its micro-batches count with the next step's, but for those that are no number.
        for name, value in logs.items():
            is_loss = name == "loss" or name.endswith("_loss") or (name == "grad_norm" and not self.args.fp16)
            if is_loss and not math.isfinite(value):
                self._stop_at_nan(name, value)
        tokens = int(self.accelerator.gather(self._tokens).sum())
        self._tokens.zero_()
        self.timed_tokens += tokens
        # Trainer counts them otherwise, and TRL's online trainers what they generate.
        if self.args.include_num_input_tokens_seen == "no" and not hasattr(self, "_buffered_inputs"):
            self.state.num_input_tokens_seen += tokens  # goes into checkpoints
            self._total_train_tokens = self.state.num_input_tokens_seen  # TRL's own begins anew with a resumed run
            for logged in getattr(self, "_metrics", {}).values():
                if "num_tokens" in logged:
                    logged["num_tokens"] = [self.state.num_input_tokens_seen]
        if "loss" in logs:
            logs = logs | self._training_metrics()
        if "train_loss" in logs:
            logs = logs | {"train_loss": self._mean_loss()}
        super().log(logs, start_time)

    def _training_metrics(self) -> dict[str, float]:
        metrics, (tokens, steps), seconds = {}, self._logged, self.timer.seconds
        if len(seconds) > steps:
            metrics["train_tokens_per_second"] = (self.timed_tokens - tokens) / sum(seconds[steps:])
        self._logged = self.timed_tokens, len(seconds)
        if self.timer.thresholds is not None:
            thresholds = thresholds_of(self.model)
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
            where = getattr(self.model.config, "name_or_path", "") or type(self.model).__name__
            raise RecipeError(f"{name}={value} before any training; check model={where} and its dtype")
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
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()  # the weights that are kept, also where nothing was evaluated and calibrated
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception:
            folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if self.is_world_process_zero() and step_of(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _part(group: str | None, rates: dict[str, float | int | None]) -> str:
    return group if group is not None and rates.get(group) is not None else "rest"


def _tokens_in(inputs: Any) -> Tensor | int:
    """Tokens of a batch that are no padding, whatever a trainer calls its parts; 0 where it names none."""
    if not isinstance(inputs, Mapping):
        return 0
    if "input_ids" not in inputs:
        masks = [value for name, value in inputs.items() if name.endswith("attention_mask") or name.endswith("_mask")]
        return sum(mask.sum() for mask in masks if isinstance(mask, Tensor)) if masks else 0
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].numel() if mask is None else mask.sum()
