"""Fine-tuning from end to end: data, trainer, thresholds, and the causal loss before and after."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, TrainerState, TrainingArguments, set_seed
from trl import SFTConfig

from ecmoe.progress import number_of
from modeling_ecmoe import sparse_blocks

from .adapters import add_lora, is_of_base, size_of, train_in_float32, trained_parameters
from .callbacks import StopWithCheckpoint, has_experts, is_expert_choice
from .card import render_card
from .curves import draw_curves
from .data import Collator, Endless, lengths_of, prepare
from .dry import SecondStep, estimate_run, two_batches
from .encode import is_learned_from, stop_token
from .errors import RecipeError
from .folder import (
    RECIPE_NAME,
    RESULTS_NAME,
    begin,
    changed_since,
    resume_point,
    when_saved,
    write_whole,
)
from .loading import distributed_config, load_config, load_model, load_tokenizer, meet
from .losses import standard_error
from .memory import peak_bytes, refuse_impossible, warn_of_memory
from .mixin import is_flash
from .precision import choose
from .recipe import Recipe, recipe_of, training_arguments
from .refusals import refusal_of_stop, refusals_in_one_line
from .sources import load_rows, say
from .trainer import EcMoeTrainer

_TWO_STEPS: dict[str, Any] = {
    "max_steps": 2,
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
    "push_to_hub": False,
}
MERGED_NAME = "merged"


def run(recipe: Recipe | Mapping[str, Any] | str | Path | None = None, **fields: Any) -> dict[str, Any]:
    """Fine-tunes the recipe's model, writes it to `output_dir`, and returns what was measured.

    Stopped at any moment, the same call goes on from the last checkpoint and ends as if it had not been stopped.
    The losses are causal: evaluation routes by threshold. Before and after are measured on the same held-out text.

    Args:
        recipe: a Recipe, flat `field: value` pairs, a YAML file, or the name of a shipped one such as "full".
        fields: of a recipe, replacing those that are there.

    Raises:
        RecipeError: for anything the user can put right.
    """
    recipe = recipe_of(recipe, **fields)
    meet(recipe)
    output = Path(recipe.output_dir).expanduser()
    resume = _resume(recipe)
    with refusals_in_one_line(recipe):
        trainer = make_trainer(recipe, resume=resume)
        # No rank looks at the folder any more when it is marked, and nearly all that can be refused was.
        trainer.accelerator.wait_for_everyone()
        print_trained(trainer.model)
        results = describe(trainer.model, recipe)
        _train(trainer, recipe, resume)
        results |= _progress(trainer)
        results |= _evaluate(trainer)
        trainer.card = render_card(recipe, trainer.args, results, is_adapter=recipe.lora is not None)
        trainer.save_model()
        trainer.create_model_card()  # after PEFT, which has written one that is empty
        trainer.save_state()
        if trainer.is_world_process_zero():
            if recipe.merge:
                _merge(trainer, recipe, results, output / MERGED_NAME)
            draw_curves(trainer.state.log_history, output / "curves.png")
            write_whole(output / RESULTS_NAME, json.dumps(results, indent=2) + "\n")
    return results


def _merge(trainer: EcMoeTrainer, recipe: Recipe, results: dict[str, Any], folder: Path) -> None:
    """Writes the whole model, adapters added to its weights, beside the adapters."""
    say(f"merging the adapters into {folder}")
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer: Any = trainer.processing_class
    if recipe.quantization:  # into the numbers that the adapters were trained on
        stops = model.generation_config.eos_token_id
        model = peft.PeftModel.from_pretrained(load_model(recipe).dequantize(), recipe.output_dir)
        model.generation_config.eos_token_id = stops
    model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = render_card(recipe, trainer.args, results, is_adapter=False)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _resume(recipe: Recipe) -> Path | None:
    """The checkpoint that a run goes on from, said aloud.

    Raises:
        RecipeError: when the folder is somebody else's, and first for a wrong model or wrong data.
    """
    try:
        resume = resume_point(recipe)
    except RecipeError:
        load_config(recipe)
        load_rows(recipe)
        raise
    output = Path(recipe.output_dir).expanduser()
    if resume is not None:
        say(f"goes on from {resume}")
    elif (output / RECIPE_NAME).is_file():
        say(f"output_dir={output} holds a run without a checkpoint: begins again; {when_saved(recipe)}")
    return resume


class Mark(TrainerCallback):
    """Makes the folder this run's when its checkpoint is loaded: one that does not fit leaves the earlier run's."""

    def __init__(self, recipe: Recipe, resume: Path | None) -> None:
        self.recipe, self.resume = recipe, resume
        self.has_begun = False

    def on_train_begin(self, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        self.has_begun = True
        if state.is_world_process_zero:
            begin(self.recipe, self.resume)


def _train(trainer: EcMoeTrainer, recipe: Recipe, resume: Path | None) -> None:
    """Trains from the beginning or a checkpoint.

    Raises:
        RecipeError: when a changed recipe does not fit the checkpoint.
        KeyboardInterrupt: when it was stopped, see `StopWithCheckpoint`.
    """
    mark = Mark(recipe, resume)
    trainer.callback_handler.callbacks.insert(0, mark)  # before a reporter writes into a folder that is nobody's
    # Not trainer.evaluate() before train(): a model that accelerate has prepared to evaluate it does not prepare
    # again, and DDP would train every rank by itself (accelerate 1.15).
    trainer.args.eval_on_start = resume is None
    if trainer.routes:
        trainer.calibration.prepare()
    stop = StopWithCheckpoint(trainer)
    trainer.add_callback(stop)
    try:
        with stop:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except (KeyError, RuntimeError, ValueError) as error:
        changes = changed_since(recipe, resume) if resume else []
        if isinstance(error, RecipeError) or mark.has_begun or not changes or refusal_of_stop(error, recipe):
            raise
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"{resume} does not fit this recipe ({reason}); changed since: {', '.join(changes)}; take back what the "
            "weights or the optimiser depend on, or name a new output_dir to begin"
        ) from error
    if stop.asked:
        raise KeyboardInterrupt


def dry_run(recipe: Recipe | Mapping[str, Any] | str | Path | None = None, **fields: Any) -> dict[str, Any]:
    """A batch of the longest rows, after a short one that makes the optimiser's moments; nothing is evaluated or
    written. Arguments as of `run`.

    Returns:
        peak_bytes: the most that was in use on the accelerator, or resident on the CPU, during that batch; free_bytes
        before the model was loaded; tokens and seconds of the batch, and its loss; estimate: about the whole run
        (`estimate_run`); trained: by part of the model, [trained, all] parameters; precision: what is trained in
        (`Precision`), with what each choice needs.
    """
    recipe = recipe_of(recipe, **fields)
    meet(recipe)
    _resume(recipe)
    say("dry run: loads model and data, then takes a short step and one of the longest rows; nothing is written")
    whole = training_arguments(recipe)
    with tempfile.TemporaryDirectory() as scratch, refusals_in_one_line(recipe):
        shortened = replace(recipe, output_dir=scratch, training=recipe.training | _TWO_STEPS)
        trainer = make_trainer(shortened, whole=whole)
        rows, size = trainer.train_dataset, trainer.args.train_batch_size * trainer.args.world_size
        trainer.train_dataset = two_batches(rows, size)
        trainer.add_callback(SecondStep(trainer))
        trainer.train()
    print_trained(trainer.model)
    longest = trainer.train_dataset["input_ids"][size:]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "peak_bytes": peak_bytes(),
        "free_bytes": trainer.precision.free,
        "tokens": sum(map(len, longest)),
        "seconds": trainer.timer.seconds[-1],
        "loss": losses[-1],
        "estimate": estimate_run(trainer, whole, rows, longest),
        "trained": trained_parameters(trainer.model),
        "precision": asdict(trainer.precision),
    }


def make_trainer(recipe: Recipe, resume: Path | None = None, whole: SFTConfig | None = None) -> Any:
    """Model, data and EcMoeTrainer of a recipe.

    resume: the checkpoint that the run goes on from.
    whole: the arguments of the run whose sequences are read, where the trainer takes a few steps of it.
    """
    config = load_config(recipe)
    precision = choose(recipe, config, resume)
    precision.say()
    if resume is None:
        refuse_impossible(recipe, config, precision.needed, precision.kept)
    recipe = precision.settle(recipe)
    arguments = training_arguments(recipe)
    _refuse_packing(config, arguments)
    if recipe.distributed:  # with the arguments the processes have found each other; refused before any data is read
        distributed_config(recipe)
    tokenizer = load_tokenizer(recipe, config)
    if arguments.max_length is None:
        arguments.max_length = getattr(config, "max_position_embeddings", None)
    longest = arguments.max_length or 0
    with arguments.main_process_first(desc="preparing the dataset"):  # the other ranks read its cache
        sequences = _sequences_used(whole or arguments)
        train, held_out, kind = prepare(recipe, arguments, tokenizer, config.vocab_size, sequences)
    if isinstance(train, Dataset) and not arguments.packing:
        longest = int(lengths_of(train).max())
    warn_of_memory(recipe, config, precision, arguments.train_batch_size, longest)
    say(f"loading {recipe.model}")
    model = load_model(recipe)
    if tokenizer.chat_template:
        _stop_after_answers(model, tokenizer, is_said=kind != "text")
    if recipe.lora is not None:
        set_seed(arguments.seed)  # SFTTrainer does so only when the adapters have been drawn
        model = add_lora(model, recipe.lora)
        train_in_float32(model)
    # TRL's own packing, and batches that are one row, have TRL's collator.
    padding: Any = arguments.pad_to_multiple_of
    ours = Collator(tokenizer.pad_token_id, is_flash(model), pad_to_multiple_of=padding)
    collator = None if arguments.packing or arguments.padding_free else ours
    try:
        trainer: Any = EcMoeTrainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=collator,
            processing_class=tokenizer,
            router_learning_rate=recipe.router_learning_rate,
            experts_learning_rate=recipe.experts_learning_rate,
        )
    except (ValueError, TypeError, ImportError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"SFTTrainer refuses the recipe: {' '.join(str(error).split())}") from error
    if arguments.packing:  # TRL's, whose rows may hold pieces of prompts alone
        learns = {"eval_dataset": trainer.eval_dataset.filter(is_learned_from)}
        learns["train_dataset"] = trainer.train_dataset.filter(is_learned_from)
        for name, rows in learns.items():
            if isinstance(rows, Dataset) and not len(rows):
                raise RecipeError(f"{name.replace('_dataset', '')} rows hold nothing to learn once they are packed")
            setattr(trainer, name, rows)
    if trainer.padding_free and not is_flash(model):
        say(
            f"a batch is one row, whose attention costs the square of its tokens with "
            f"attn_implementation={model.config._attn_implementation}; flash_attention_2 knows its rows, "
            "packing_strategy=wrapped and packing=false keep them"
        )
    evaluated = min(len(trainer.eval_dataset), recipe.max_eval_sequences)
    trainer.eval_dataset = trainer.eval_dataset.select(range(evaluated))
    tokens = int(lengths_of(trainer.eval_dataset).sum())
    say(f"held out: {number_of(evaluated, 'row')} of {number_of(tokens, 'token')}")
    if isinstance(trainer.train_dataset, IterableDataset):
        trainer.train_dataset = Endless(trainer.train_dataset)
    trainer.precision = precision
    return trainer


def _refuse_packing(config: Any, arguments: SFTConfig) -> None:
    """Of families in which the documents of one row would see each other."""
    for field in ("packing", "padding_free"):
        if getattr(arguments, field) and not getattr(config, "supports_packing", True):
            raise RecipeError(
                f"{field}=True puts several documents in one row, and {config.model_type} models, the dense ones too, "
                f"let them see each other; set {field}=false"
            )


def _stop_after_answers(model: Any, tokenizer: Any, is_said: bool) -> None:
    """Lets the saved generation config stop at what ends an answer in the chat template, beside what it stops at."""
    token, end = stop_token(tokenizer)
    if token is None and is_said:
        ends = f"ends an answer with {end!r}, which is no token of its own" if end else "shows no end of an answer"
        say(
            f"the chat template {ends}: generate and pipeline will go on after it; end it with the tokenizer's "
            "eos_token, as chat_template_path=chatml does"
        )
    stops = model.generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if token is not None and token not in stops:
        model.generation_config.eos_token_id = [*stops, token]


def _sequences_used(arguments: TrainingArguments) -> int | None:
    """Training sequences that `max_steps` steps use; None when epochs say how long the run is."""
    if arguments.max_steps <= 0:
        return None
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return arguments.max_steps * batch


def describe(model: Any, recipe: Recipe) -> dict[str, Any]:
    """Name, parameters, and the parameters that the average token meets, without adapters; and what is trained."""
    total = sum(size_of(p) for name, p in model.named_parameters() if is_of_base(name))
    idle = 0
    if has_experts(model):
        for block in sparse_blocks(model).values():
            experts = sum(size_of(p) for name, p in block.experts.named_parameters() if is_of_base(name))
            idle += experts - round(experts * block.config.capacity_factor / block.config.num_experts)
    elif chosen := getattr(model.config, "num_experts_per_tok", None):  # a plain mixture, whose experts are stacked
        stacks = [
            p for name, p in model.named_parameters() if ".experts." in name and is_of_base(name) and p.dim() == 3
        ]
        idle = sum(stack.numel() - round(stack.numel() * chosen / stack.shape[0]) for stack in stacks)
    return {
        "model": recipe.model,
        "model_type": model.config.model_type,
        "parameters": total,
        "active_parameters": total - idle,
        "trained_parameters": sum(size_of(p) for p in model.parameters() if p.requires_grad),
    }


def print_trained(model: Any) -> None:
    """What is trained, where that is not everything."""
    counts = trained_parameters(model)
    if not PartialState().is_main_process or all(trained == total for trained, total in counts.values()):
        return
    table = Table(title="What is trained")
    for column in ("part", "trained", "in the model"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, (trained, total) in counts.items():
        table.add_row(part, f"{trained:,}", f"{total:,}")
    Console().print(table)


def _progress(trainer: EcMoeTrainer) -> dict[str, Any]:
    seconds, first = trainer.timer.seconds, _evaluation_before(trainer)
    return {
        "loss_before": first.get("eval_nll", first.get("eval_loss")),  # not in the log of a checkpoint from elsewhere
        "loss_before_stderr": first.get("eval_nll_stderr", first.get("eval_loss_stderr")),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "tokens_per_second": trainer.timed_tokens / sum(seconds) if seconds else None,
        "seed": trainer.args.seed,
    }


def _evaluation_before(trainer: EcMoeTrainer) -> dict[str, Any]:
    return next((row for row in trainer.state.log_history if row["step"] == 0 and "eval_loss" in row), {})


def _evaluate(trainer: EcMoeTrainer) -> dict[str, Any]:
    """The causal loss after training, how sure it and its change are, and the load of the experts."""
    if is_expert_choice(trainer.model):
        trainer.calibration.run()
    found, before = trainer.evaluate(), _evaluation_before(trainer)
    # The likelihood, also where the loss that is learned is another.
    name = "eval_nll" if "eval_nll" in found else "eval_loss"
    results: dict[str, Any] = {"loss_after": found[name], "loss_after_stderr": found.get(f"{name}_stderr")}
    if name in before:
        pairs = trainer.loss_changes()
        results |= {"loss_change": found[name] - before[name], "loss_change_stderr": pairs and standard_error(pairs)}
    results |= {"held_out_rows": len(trainer.losses), "held_out_tokens": sum(tokens for _, tokens in trainer.losses)}
    if "eval_loss_top_k" in found:
        results |= {"loss_after_top_k": found["eval_loss_top_k"], "loss_gap": found["eval_loss_gap"]}
    if trainer.routing is not None:
        results["routing"] = trainer.routing
    return results
