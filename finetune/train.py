"""Fine-tuning from end to end: data, Trainer, thresholds, and the causal loss before and after."""

import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from datasets import IterableDataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.distributed import DistributedConfig

from modeling_ecmoe import calibrate_thresholds, sparse_blocks

from .adapters import add_lora, trained_parameters
from .curves import draw_curves
from .data import Collator, prepare
from .folder import RESULTS_NAME, begin, last_whole_checkpoint, resume_point
from .recipe import Recipe, RecipeError, training_arguments
from .sources import Rows
from .trainer import EcMoeTrainer, freeze, is_expert_choice

CALIBRATION_TOKENS = 131_072  # a quarter of them leaves the load of single experts 11 % off, by sampling alone
CALIBRATION_POOL = 4_096  # tokens of one forward pass, the pool among which experts choose meanwhile


def run(recipe: Recipe) -> dict[str, Any]:
    """Fine-tunes the recipe's model, writes it to `output_dir`, and returns what was measured.

    Stopped at any moment, the same call goes on from the last checkpoint and ends as if it had not been stopped.
    The losses are causal: evaluation routes by threshold. Before and after are measured on the same held-out text.

    Raises:
        RecipeError: for anything the user can put right.
    """
    output = Path(recipe.output_dir).expanduser()
    resume = resume_point(recipe)
    trainer = make_trainer(recipe)
    # No rank looks at the folder any more, and everything that can be refused before training was.
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        begin(recipe, resume)
    print_trained(trainer.model)
    try:
        results = describe(trainer.model, recipe) | {"loss_before": trainer.evaluate()["eval_loss"]}
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        results |= _progress(trainer)
        results |= _evaluate(trainer)
        trainer.save_model()
        trainer.save_state()
    except (OSError, RuntimeError) as error:
        raise _in_one_line(error, output, trainer.args.world_size) from error
    if trainer.is_world_process_zero():
        draw_curves(trainer.state.log_history, output / "curves.png")
        (output / RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """One optimiser step on the longest sequences, and the memory it took; nothing is written.

    Returns:
        peak_bytes: of the accelerator, or what this process has resident on the CPU; tokens: of the step;
        loss: of that step; trained: by part of the model, [trained, all] parameters.
    """
    resume_point(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        once = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "push_to_hub": False}
        training = recipe.training | once | {"num_train_epochs": 1}
        trainer = make_trainer(replace(recipe, output_dir=scratch, training=training), longest_first=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        loss = trainer.train().training_loss
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    print_trained(trainer.model)
    return {
        "peak_bytes": peak,
        "tokens": trainer.tokens_per_step,
        "loss": loss,
        "trained": trained_parameters(trainer.model),
    }


def make_trainer(recipe: Recipe, longest_first: bool = False) -> EcMoeTrainer:
    """Model, data and Trainer of a recipe.

    longest_first: train on the longest sequences alone, as many as one step takes.
    """
    arguments = training_arguments(recipe)
    model, tokenizer = load(recipe)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    with arguments.main_process_first(desc="preparing the dataset"):  # the other ranks read its cache
        train, held_out = prepare(recipe, tokenizer, vocab_size, _sequences_used(arguments))
    if longest_first and not isinstance(train, IterableDataset):
        lengths = torch.tensor([len(ids) for ids in train["input_ids"]])
        step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        train = train.select(lengths.argsort(descending=True, stable=True)[:step].tolist())
    if recipe.lora is not None:
        model = add_lora(model, recipe.lora)
    freeze(model, recipe)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    try:
        return EcMoeTrainer(
            recipe=recipe,
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=Collator(padding),
            processing_class=tokenizer,
        )
    except (ValueError, ImportError) as error:
        raise RecipeError(f"Trainer refuses the recipe: {' '.join(str(error).split())}") from error


def _in_one_line(error: OSError | RuntimeError, output: Path, world_size: int) -> Exception:
    """What a stopped run says: a disk that is full, or a rank that is gone; other errors as they are."""
    checkpoint = last_whole_checkpoint(output)
    goes_on = f"the same command goes on from {checkpoint}" if checkpoint else "no checkpoint was written yet"
    reason = " ".join(str(error).split())[:200]
    if isinstance(error, OSError):
        return RecipeError(f"output_dir={output} cannot be written: {reason}; {goes_on}")
    lost = isinstance(error, torch.distributed.DistError) or "gloo" in reason.lower() or "connection" in reason.lower()
    if world_size > 1 and lost:
        return RecipeError(f"another process of this run has ended: {reason}; {goes_on}")
    return error


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
    options: dict[str, Any] = dict(recipe.routing_fields)
    try:
        if recipe.distributed:
            options["distributed_config"] = DistributedConfig(**recipe.distributed)
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
        model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=recipe.dtype, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"model={recipe.model} cannot be loaded: {' '.join(str(error).split())}") from error
    if recipe.routing_fields and not str(model.config.model_type).startswith("ecmoe_"):
        raise RecipeError(f"{next(iter(recipe.routing_fields))} is for expert-choice models, not {recipe.model}")
    if recipe.chat_template:
        tokenizer.chat_template = _read_template(recipe.chat_template)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and recipe.sequence_length > longest:
        raise RecipeError(
            f"sequence_length={recipe.sequence_length} is more than the model's {longest} positions; shorten it"
        )
    return model, tokenizer


def _read_template(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"chat_template={name} cannot be read ({error})") from error


def describe(model: Any, recipe: Recipe) -> dict[str, Any]:
    """Name, parameters, and the parameters that the average token meets."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    if str(model.config.model_type).startswith("ecmoe_"):
        for block in sparse_blocks(model).values():
            experts = sum(parameter.numel() for parameter in block.experts.parameters())
            idle += experts - round(experts * block.config.capacity_factor / block.config.num_experts)
    return {
        "model": recipe.model,
        "model_type": model.config.model_type,
        "parameters": total,
        "active_parameters": total - idle,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def print_trained(model: Any) -> None:
    """What is trained, where that is not everything."""
    counts = trained_parameters(model)
    if not PartialState().is_main_process or all(trained == total for trained, total in counts.values()):
        return
    table = Table(title="What is trained")
    for column in ("part", "trained", "of"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, (trained, total) in counts.items():
        table.add_row(part, f"{trained:,}", f"{total:,}")
    Console().print(table)


def _progress(trainer: EcMoeTrainer) -> dict[str, Any]:
    seconds, tokens = trainer.timer.seconds, trainer.tokens_per_step
    return {
        "steps": trainer.state.global_step,
        "tokens": tokens * trainer.state.global_step,
        "tokens_per_second": tokens / statistics.median(seconds) if seconds else None,
        "seed": trainer.args.seed,
    }


def _evaluate(trainer: EcMoeTrainer) -> dict[str, Any]:
    """The causal loss after training and, for expert choice, how the calibrated thresholds route."""
    if is_expert_choice(trainer.model):
        _calibrate(trainer)
    found = trainer.evaluate()
    results: dict[str, Any] = {"loss_after": found["eval_loss"]}
    if "eval_loss_top_k" in found:
        results |= {"loss_after_top_k": found["eval_loss_top_k"], "loss_gap": found["eval_loss_gap"]}
        times = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
        left_out = {"eval_loss", "eval_loss_top_k", "eval_loss_gap", "epoch", *times}
        results["routing"] = {k.removeprefix("eval_"): v for k, v in found.items() if k not in left_out}
    return results


def _calibrate(trainer: EcMoeTrainer) -> None:
    """Replaces the averages of training by exact quantiles on training text, each rank reading a part of it."""
    ranks, rank = trainer.args.world_size, trainer.args.process_index
    rows = _calibration_rows(trainer.train_dataset, ranks)[rank::ranks]
    batches, batch = [], []
    for row in rows:
        batch.append(row)
        if sum(len(row["input_ids"]) for row in batch) >= CALIBRATION_POOL:
            batches.append(batch)
            batch = []
    batches += [batch] if batch or not batches else []
    # The ranks wait for each other in every pass.
    shared = min(trainer.accelerator.gather(torch.tensor([len(batches)], device=trainer.args.device)).tolist())
    inputs = [trainer.data_collator(batch) for batch in batches[:shared]]
    for one in inputs:
        one.pop("labels")
    with trainer.accelerator.autocast():
        calibrate_thresholds(trainer.model, inputs)


def _calibration_rows(train: Rows, ranks: int) -> list[dict[str, Any]]:
    """Training sequences worth CALIBRATION_TOKENS, as many for every rank."""
    shuffled = iter(train if isinstance(train, IterableDataset) else train.shuffle(seed=0))
    rows, tokens = [], 0
    for row in shuffled:
        rows.append(row)
        tokens += len(row["input_ids"])
        if tokens >= CALIBRATION_TOKENS and len(rows) % ranks == 0:
            break
    return rows[: max(1, len(rows) // ranks) * ranks]
