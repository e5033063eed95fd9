"""ecmoe-finetune RECIPE.yaml [field=value ...], also as `accelerate launch -m ecmoe.finetune RECIPE.yaml`.

ecmoe-finetune full model=qwen3-8x dataset=roneneldan/TinyStories max_steps=300
"""

import argparse
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .arguments import check_arguments
from .errors import RecipeError

# What needs Transformers is imported when there is something to train: --help and a mistyped option need not wait.


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(
        sorted(path.name[:-5] for path in resources.files("ecmoe.recipes").iterdir() if path.name.endswith(".yaml"))
    )
    parser = argparse.ArgumentParser(prog="ecmoe-finetune", description="Fine-tune an expert-choice or dense model.")
    parser.add_argument("recipe", help=f"YAML file, or one of those that are shipped: {names}")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replaces a field of the recipe")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="one batch of the longest rows; says memory, seconds per step and how long the run takes",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with code 2 and one line on an error the user can put right."""
    options = _parser().parse_intermixed_args(argv)  # overrides before and after --dry-run
    recipe: Any = None
    try:
        check_arguments(options.recipe, options.overrides)
        import datasets
        from accelerate import PartialState
        from transformers.utils import logging

        from .recipe import load_recipe
        from .train import dry_run, run

        if not sys.stderr.isatty():  # a log gets lines of its own
            logging.disable_progress_bar()
            datasets.disable_progress_bars()
        recipe = load_recipe(options.recipe, options.overrides)
        results = dry_run(recipe) if options.dry_run else run(recipe)
    except RecipeError as error:
        if options.debug:
            raise
        print(f"ecmoe-finetune: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"ecmoe-finetune: interrupted; {_after_a_stop(recipe, options.dry_run)}", file=sys.stderr)
        sys.exit(130)
    if PartialState().is_main_process:
        if options.dry_run:
            _report_dry_run(results)
        else:
            _report(results, recipe)
    # Or threads of gloo may still hold tensors when the interpreter ends, and abort it (pytorch/pytorch#190489).
    PartialState().destroy_process_group()


def _after_a_stop(recipe: Any, is_dry_run: bool) -> str:
    if recipe is None or is_dry_run:
        return "nothing was written"
    from .folder import after_a_stop

    return after_a_stop(recipe)


def _report_dry_run(results: dict[str, Any]) -> None:
    """What the run would take of memory and time, in sentences."""
    from ecmoe.progress import duration, gigabytes, number_of

    precision, about = results["precision"], results["estimate"]
    lines, needed = [], precision["needed"]
    if needed:
        ways = {"adapters": "for adapters alone", "float32": "in float32", "bfloat16": "in bfloat16, moments of 8 bits"}
        costs = "; ".join(f"{gigabytes(size)} {ways[way]}" for way, size in needed.items())
        which = f" This run: {precision['dtype']}." if "adapters" not in needed else ""
        lines.append(f"Weights, gradients and moments take on each device: {costs}.{which}")
    lines.append(
        f"One step of {results['tokens']:,} tokens, loss {results['loss']:.4f}: {results['seconds']:.2f} s and "
        f"{gigabytes(results['peak_bytes'])} in use on each device; {gigabytes(results['free_bytes'])} were free."
    )
    total = about["steps"] * about["seconds_per_step"] + about["evaluations"] * about["seconds_per_evaluation"]
    lines.append(
        f"The whole run is about {number_of(about['steps'], 'step')} of {about['tokens_per_step']:,.0f} tokens"
        f"{' with padding' if about['has_padding'] else ''}, "
        f"{about['seconds_per_step']:.2f} s each, and {about['evaluations']} evaluations of "
        f"{duration(about['seconds_per_evaluation'])}: {duration(total)}. Nothing was written."
    )
    for line in lines:
        Console().print(line, highlight=False)


def _report(results: dict[str, Any], recipe: Any) -> None:
    from ecmoe.hub import merging_line

    from .card import doubt, fields_of_base, figure
    from .folder import RESULTS_NAME
    from .train import MERGED_NAME

    output_dir = recipe.output_dir
    table = Table(title=f"{results['model']} -> {output_dir}")
    table.add_column("")
    table.add_column(results["model_type"], justify="right")
    table.add_row("parameters", f"{results['parameters']:,}")
    table.add_row("active per token", f"{results['active_parameters']:,}")
    table.add_row("tokens trained on", f"{results['tokens']:,}")
    table.add_row("held out, rows", f"{results['held_out_rows']:,}")
    table.add_row("held out, learned tokens", f"{results['held_out_tokens']:,}")
    if results["loss_before"] is not None:
        table.add_row("causal loss before", figure(results["loss_before"], results["loss_before_stderr"]))
    table.add_row("causal loss after", figure(results["loss_after"], results["loss_after_stderr"]))
    if "loss_change" in results:
        table.add_row(
            "  change (± standard error)", figure(results["loss_change"], results["loss_change_stderr"], "+.4f")
        )
    if results["tokens_per_second"]:
        table.add_row("tokens/s", f"{results['tokens_per_second']:,.0f}")
    if "routing" in results:
        routing = results["routing"]
        table.add_row("expert load", f"{routing['load_min']:.2f} to {routing['load_max']:.2f} of its share")
        table.add_row("chosen by no expert", f"{routing['uncovered']:.1%}")
    console = Console()
    console.print(table)
    lines = [doubt(results), f"{'Model' if recipe.lora is None else 'Adapters'} and {RESULTS_NAME} in {output_dir}."]
    if recipe.merge:
        lines.append(f"The whole model, adapters merged, in {output_dir}/{MERGED_NAME}.")
    elif recipe.lora is not None:
        line = merging_line(output_dir, Path(output_dir).expanduser(), recipe.model, fields_of_base(recipe))
        lines.append(f"merge=true writes the whole model too; so does {line}")
    for line in filter(None, lines):
        console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
