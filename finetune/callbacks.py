"""What is watched while a trainer trains: how long steps take, and that a checkpoint splits no line of the log."""

import os
import signal
import threading
import time
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ecmoe.progress import progress_bar
from modeling_ecmoe import sparse_blocks
from modeling_ecmoe.registry_ecmoe import is_own


def has_experts(model: Any) -> bool:
    """Whether a model of the family, its token-choice baseline among them."""
    return is_own(model.config)


def is_expert_choice(model: Any) -> bool:
    """Whether a model of the family, not its token-choice baseline."""
    return has_experts(model) and model.config.get_text_config().routing != "token_choice"


class StepTimer(TrainerCallback):
    """Seconds of each optimiser step, evaluation and logging left out; and the thresholds at the last log."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._events: list[tuple[Any, Any]] = []  # of steps that a GPU may not have finished yet
        self.thresholds: Tensor | None = None
        self._begin: Any = 0.0

    @property
    def seconds(self) -> list[float]:
        """Of all steps; waits for the last one of a GPU."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds.append(begin.elapsed_time(end) / 1e3)
        self._events.clear()
        return self._seconds

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        # A checkpoint has been loaded by now, and thresholds were logged when it was saved.
        self.thresholds = thresholds_of(model) if is_expert_choice(model) else None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin = _now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        end = _now()
        if isinstance(end, float):
            self._seconds.append(end - self._begin)
        else:
            self._events.append((self._begin, end))


def _now() -> Any:
    """Seconds, or on a GPU an event in its stream: the host is ahead of it, and a step is over there before."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Progress(ProgressCallback):
    """Trainer's bars with the time that is left; where they are no terminal's, a line every half minute."""

    def on_train_begin(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        self.current_step = 0
        if state.is_world_process_zero:
            self.training_bar = progress_bar(total=state.max_steps, desc="Training", unit="step")

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and has_length(eval_dataloader) and self.prediction_bar is None:
            options: dict[str, Any] = {"total": len(eval_dataloader), "leave": self.training_bar is None}
            self.prediction_bar = progress_bar(desc="Evaluating", unit="batch", **options)
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)


class LogBeforeSaving(TrainerCallback):
    """A checkpoint never splits the steps that one line of the log averages: a resumed log has the same lines."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = control.should_log or control.should_save
        return control

    on_epoch_end = on_step_end


class StopWithCheckpoint(TrainerCallback):
    """While it is entered, Ctrl-C or `kill` ends training after the step that runs, with a checkpoint; a second one
    ends it at once, and so does the first before any step.

    Left to others: signals that somebody else handles; several processes, which would stop at different steps and wait
    for each other; runs that write no checkpoint that they could go on from.
    """

    _usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.asked, self._process = trainer, False, os.getpid()
        self._taken: list[int] = []

    def __enter__(self) -> "StopWithCheckpoint":
        args = self.trainer.args
        can_resume = args.save_strategy != "no" and not args.save_only_model
        if can_resume and args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._taken = [number for number, usual in self._usual.items() if signal.getsignal(number) is usual]
        for number in self._taken:
            signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: Any) -> None:
        for number in self._taken:
            signal.signal(number, self._usual[number])
        self._taken = []

    def _ask(self, number: int, frame: Any) -> None:
        self.__exit__()
        if os.getpid() != self._process:  # a forked worker
            os.kill(os.getpid(), number)
        elif self.trainer.state.global_step == 0:
            raise KeyboardInterrupt
        else:
            self.asked = True
            os.write(2, b"\ninterrupted: ends this step, saves a checkpoint and stops; once more stops at once\n")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """After the callbacks that say what is due at this step anyway, of which nothing is left out."""
        if self.asked:
            if not (control.should_save or control.should_evaluate):  # the averages go on as if nothing had happened
                self.trainer.calibration.last = state, state.global_step
            control.should_log = control.should_save = control.should_training_stop = True
        return control


def thresholds_of(model: Any) -> Tensor:
    """Of all layers, [L, E] on the CPU."""
    gates = [block.gate for block in sparse_blocks(model).values()]
    return torch.stack([gate.threshold.detach().float().cpu() for gate in gates])
