"""ecmoe-finetune RECIPE.yaml [field=value ...], also as `accelerate launch -m ecmoe.finetune RECIPE.yaml`.

ecmoe-finetune full model=qwen3-8x dataset=roneneldan/TinyStories max_steps=300
"""

import argparse
import sys
from importlib import resources
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
    parser.add_argument("--dry-run", action="store_true", help="one step on the longest sequences; report memory")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with code 2 and one line on an error the user can put right."""
    options = _parser().parse_intermixed_args(argv)  # overrides before and after --dry-run

    try:
        check_arguments(options.recipe, options.overrides)
        from accelerate import PartialState

        from .recipe import load_recipe
        from .train import dry_run, run

        recipe = load_recipe(options.recipe, options.overrides)
        results = dry_run(recipe) if options.dry_run else run(recipe)
    except RecipeError as error:
        if options.debug:
            raise
        print(f"ecmoe-finetune: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ecmoe-finetune: interrupted; the same command goes on from its last checkpoint", file=sys.stderr)
        sys.exit(130)
    if not PartialState().is_main_process:
        return
    if options.dry_run:
        needed, free = results["precision"]["needed"], results["precision"]["free"]
        if needed:
            costs = " or ".join(f"{size / 1e9:.2f} GB in {dtype}" for dtype, size in needed.items())
            Console().print(
                f"Weights, gradients and moments take {costs} (moments of 8 bits there) on each device; activations "
                f"come on top. {free / 1e9:.2f} GB were free. This run's weights are {results['precision']['dtype']}.",
                highlight=False,
            )
        Console().print(
            f"One step of {results['tokens']:,} tokens, loss {results['loss']:.4f}: "
            f"{results['peak_bytes'] / 1e9:.2f} GB in use on each device. Nothing was written.",
            highlight=False,
        )
    else:
        _report(results, recipe.output_dir)


def _report(results: dict[str, Any], output_dir: str) -> None:
    from .folder import RESULTS_NAME

    table = Table(title=f"{results['model']} -> {output_dir}")
    table.add_column("")
    table.add_column(results["model_type"], justify="right")
    table.add_row("parameters", f"{results['parameters']:,}")
    table.add_row("active per token", f"{results['active_parameters']:,}")
    table.add_row("tokens trained on", f"{results['tokens']:,}")
    if results["loss_before"] is not None:
        table.add_row("causal loss before", f"{results['loss_before']:.4f}")
    table.add_row("causal loss after", f"{results['loss_after']:.4f}")
    if "routing" in results:
        table.add_row("  not causal (top-k)", f"{results['loss_after_top_k']:.4f}")
        table.add_row("  gap", f"{results['loss_gap']:+.4f}")
    if results["tokens_per_second"]:
        table.add_row("tokens/s", f"{results['tokens_per_second']:,.0f}")
    if "routing" in results:
        routing = results["routing"]
        table.add_row("expert load", f"{routing['load_min']:.2f} to {routing['load_max']:.2f} of its share")
        table.add_row("chosen by no expert", f"{routing['uncovered']:.1%}")
    console = Console()
    console.print(table)
    console.print(f"Model and {RESULTS_NAME} in {output_dir}.", highlight=False)


if __name__ == "__main__":
    main()
