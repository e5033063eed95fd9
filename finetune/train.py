"""Fine-tuning from end to end: data, Trainer, thresholds, and the causal loss before and after."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from modeling_ecmoe import calibrate_thresholds, record_routing, sparse_blocks, use_inference_routing

from .data import collate, prepare
from .recipe import Recipe, RecipeError, training_arguments

RESULTS_NAME = "finetune_results.json"
CALIBRATION_TOKENS = 131_072  # a quarter of them leaves the load of single experts 11 % off, by sampling alone
CALIBRATION_POOL = 4_096  # tokens of one forward pass, the pool among which experts choose meanwhile


class StepTimer(TrainerCallback):
    """Seconds of each optimiser step, evaluation and logging left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


def run(recipe: Recipe) -> dict[str, Any]:
    """Fine-tunes the recipe's model, writes it to `output_dir`, and returns what was measured.

    The losses are causal: evaluation routes by threshold. Before and after are measured on the same held-out text.

    Raises:
        RecipeError: for anything the user can put right.
    """
    output = Path(recipe.output_dir).expanduser()
    resume = _resume_point(recipe, output)
    arguments = training_arguments(recipe)
    model, tokenizer = load(recipe)
    with arguments.main_process_first(desc="preparing the dataset"):  # the other ranks read its cache
        train, held_out = prepare(recipe, tokenizer, _sequences_used(arguments))
    timer = StepTimer()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[timer],
    )
    results = describe(model, recipe) | {"loss_before": trainer.evaluate()["eval_loss"]}
    trainer.train(resume_from_checkpoint=resume)
    results |= _progress(trainer, arguments, recipe, timer)
    results |= _evaluate(trainer, model, train)
    trainer.save_model()
    if trainer.is_world_process_zero():
        (output / RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _resume_point(recipe: Recipe, output: Path) -> str | None:
    """The checkpoint to go on from, or None for a new run in a new folder."""
    wanted = recipe.training.get("resume_from_checkpoint")
    if output.exists() and not output.is_dir():
        raise RecipeError(f"output_dir={output} is a file; name a folder")
    if not wanted:
        if output.exists() and any(output.iterdir()):
            raise RecipeError(
                f"output_dir={output} is not empty; name a new folder, or go on there with resume_from_checkpoint=true"
            )
        return None
    if isinstance(wanted, str):
        checkpoint: str | None = wanted if Path(wanted).is_dir() else None
    else:
        checkpoint = get_last_checkpoint(str(output)) if output.is_dir() else None
    if checkpoint is None:
        raise RecipeError(
            f"resume_from_checkpoint={wanted} finds no checkpoint in output_dir={output}; leave it out to begin, with "
            "save_strategy=steps to be able to resume"
        )
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    if 0 < recipe.training.get("max_steps", 0) <= state.global_step:
        raise RecipeError(
            f"max_steps={recipe.training['max_steps']} was reached already, {checkpoint} is at step "
            f"{state.global_step}; raise it to go on"
        )
    return checkpoint


def _sequences_used(arguments: TrainingArguments) -> int | None:
    """Training sequences that `max_steps` steps use; None when epochs say how long the run is."""
    if arguments.max_steps <= 0:
        return None
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return arguments.max_steps * batch


def load(recipe: Recipe) -> tuple[Any, Any]:
    """Model and tokenizer of a recipe."""
    path = Path(recipe.model).expanduser()
    if (path.is_absolute() or recipe.model.startswith((".", "~"))) and not path.is_dir():
        raise RecipeError(f"model={recipe.model} does not exist; give a checkpoint folder or a Hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
        model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=recipe.dtype)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"model={recipe.model} cannot be loaded: {' '.join(str(error).split())}") from error
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and recipe.sequence_length > longest:
        raise RecipeError(
            f"sequence_length={recipe.sequence_length} is more than the model's {longest} positions; shorten it"
        )
    return model, tokenizer


def is_expert_choice(model: Any) -> bool:
    return str(model.config.model_type).startswith("ecmoe_")


def describe(model: Any, recipe: Recipe) -> dict[str, Any]:
    """Name, parameters, and the parameters that the average token meets."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    if is_expert_choice(model):
        for block in sparse_blocks(model).values():
            experts = sum(parameter.numel() for parameter in block.experts.parameters())
            idle += experts - round(experts * block.config.capacity_factor / block.config.num_experts)
    return {
        "model": recipe.model,
        "model_type": model.config.model_type,
        "parameters": total,
        "active_parameters": total - idle,
    }


def _progress(trainer: Trainer, arguments: TrainingArguments, recipe: Recipe, timer: StepTimer) -> dict[str, Any]:
    sequences = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    tokens = sequences * recipe.sequence_length
    return {
        "steps": trainer.state.global_step,
        "tokens": tokens * trainer.state.global_step,
        "tokens_per_second": tokens / statistics.median(timer.seconds) if timer.seconds else None,
        "seed": arguments.seed,
    }


def _evaluate(trainer: Trainer, model: Any, train: Dataset) -> dict[str, Any]:
    """The causal loss after training and, for expert choice, how the calibrated thresholds route."""
    if not is_expert_choice(model) or model.config.routing == "token_choice":  # the baseline has no thresholds
        return {"loss_after": trainer.evaluate()["eval_loss"]}
    _calibrate(trainer, model, train)
    with record_routing(model) as record:
        loss = trainer.evaluate()["eval_loss"]
    with use_inference_routing(model, "expert_choice"):  # not causal; beside the causal loss it shows the gap
        top_k_loss = trainer.evaluate()["eval_loss"]
    first, *others = gather_object([record])  # each rank evaluated its share of the held-out text
    for other in others:
        first.merge(other)
    return {"loss_after": loss, "loss_after_top_k": top_k_loss, "routing": first.summary()}


def _calibrate(trainer: Trainer, model: Any, train: Dataset) -> None:
    """Replaces the averages of training by exact quantiles on training text, each rank reading a part of it."""
    length = len(train[0]["input_ids"])
    ranks, rank = trainer.args.world_size, trainer.args.process_index
    each = max(
        1, min(len(train), CALIBRATION_TOKENS // length) // ranks
    )  # as many for every rank, which wait on each other
    rows = torch.tensor(train.shuffle(seed=0)[: each * ranks]["input_ids"])[rank::ranks]
    batches = [{"input_ids": batch} for batch in rows.split(max(1, CALIBRATION_POOL // length))]
    with trainer.accelerator.autocast():
        calibrate_thresholds(model, batches)
