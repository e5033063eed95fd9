"""ecmoe-inspect {evaluate,compare,draw,report,calibrate}: what expert-choice checkpoints do with text, and how.

ecmoe-inspect evaluate qwen3-8x-tuned --data text.jsonl
ecmoe-inspect compare qwen3-8x --data text.jsonl --steps 20
ecmoe-inspect draw --experts 3 --top 2 --output walk.svg
ecmoe-inspect report qwen3-8x-tuned --text "Once upon a time" --output routes.html
ecmoe-inspect calibrate qwen3-8x --text chats.jsonl
"""

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from .arguments import check_arguments
from .errors import AnalysisError
from .limits import CALIBRATION_TOKENS, COMPARED_TOKENS, EVALUATED_TOKENS
from .verdict import settings, tables

# What needs torch is imported when a command runs: --help and a mistyped option are answered at once.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ecmoe-inspect", description="Look at expert-choice models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("evaluate", help="losses, speed, routes and minimal pairs of a checkpoint")
    _add_common(command, "checkpoint folder or Hub id, expert-choice or any causal language model", needs_data=False)
    command.add_argument("--pairs", nargs="+", metavar="FILE", help="minimal pairs as BLiMP's .jsonl files, or folders")
    command.add_argument(
        "--max-tokens",
        type=int,
        default=EVALUATED_TOKENS,
        help=f"read about so many (default: {EVALUATED_TOKENS:,}; 0: all)",
    )
    command = commands.add_parser(
        "compare",
        help="token choice, expert choice and threshold routing side by side",
        description="Up to fourteen ways of routing, one after the other: minutes on a CPU. What takes the time, for "
        "each: a few forward and backward passes that time a training step, also with --steps 0; --steps of training; "
        "calibration; two passes over the held-out tokens (--max-tokens).",
    )
    _add_common(command, "expert-choice checkpoint folder or Hub id", needs_data=True)
    command.add_argument(
        "--steps", type=int, default=0, help="train each so long before measuring (default: 0; steps are timed anyway)"
    )
    command.add_argument(
        "--max-tokens",
        type=int,
        default=COMPARED_TOKENS,
        help=f"held out, to measure on (default: {COMPARED_TOKENS:,})",
    )
    command = commands.add_parser("draw", help="expert choice step by step on small numbers, as picture and text")
    command.add_argument("--experts", type=int, default=3, help="number of experts (default: 3)")
    command.add_argument("--top", type=int, default=2, help="tokens that each expert takes (default: 2)")
    command.add_argument("--seed", type=int, default=0, help="of the numbers (default: 0)")
    command.add_argument("--matrices", metavar="FILE", help="JSON with tokens, experts, w1 and w2 instead of a seed")
    command.add_argument("--output", metavar="FILE", help="picture to write, .svg or .png; the text is printed anyway")
    command = commands.add_parser("report", help="the routes of a text as one HTML page, readable without a network")
    command.add_argument("checkpoint", help="expert-choice checkpoint folder or Hub id")
    command.add_argument("--text", help="the text, at most as long as the model's context")
    command.add_argument("--text-file", metavar="FILE", help="UTF-8 file with the text")
    command.add_argument("--output", metavar="FILE", required=True, help="page to write, .html")
    command.add_argument("--device", help="default: an accelerator if there is one")
    _add_calibrate(commands)
    return parser


def _add_calibrate(commands: Any) -> None:
    command = commands.add_parser(
        "calibrate",
        help="new thresholds for a checkpoint, in place, measured on the text it is meant for",
        description="Replaces the thresholds of a checkpoint in place; the old ones stay in ecmoe_calibration.json "
        "there. Loss and expert load on text that is held out are printed before and after.",
    )
    command.add_argument("checkpoint", help="folder of an expert-choice checkpoint")
    command.add_argument(
        "--text",
        required=True,
        metavar="FILE",
        help="text file (.txt, .md, .jsonl, .parquet) or a folder of them; of .jsonl rows with messages the model's "
        "chat template makes text",
    )
    command.add_argument(
        "--tokens",
        type=int,
        default=CALIBRATION_TOKENS,
        help=f"to calibrate on, at most; a quarter as many are held out (default: {CALIBRATION_TOKENS:,})",
    )
    command.add_argument("--text-column", default="text", help="of .jsonl and .parquet (default: text)")
    command.add_argument("--device", help="default: an accelerator if there is one")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_common(command: argparse.ArgumentParser, checkpoint: str, needs_data: bool) -> None:
    command.add_argument("checkpoint", help=checkpoint)
    command.add_argument(
        "--data", required=needs_data, help="text file (.txt, .md, .jsonl, .parquet) or a folder of them"
    )
    command.add_argument("--text-column", default="text", help="of .jsonl and .parquet (default: text)")
    command.add_argument("--device", help="default: an accelerator if there is one")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with code 2 and one line on an error the user can put right."""
    options = vars(_parser().parse_args(argv))
    debug, command = options.pop("debug"), options.pop("command")
    try:
        check_arguments(command, options)
        _quieten()
        {"evaluate": _evaluate, "compare": _compare, "draw": _draw, "report": _report, "calibrate": _calibrate}[
            command
        ](options)
    except AnalysisError as error:
        if debug:
            raise
        print(f"ecmoe-inspect: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ecmoe-inspect: interrupted", file=sys.stderr)
        sys.exit(130)


def _quieten() -> None:
    """Bars of others are for terminals."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bars()


def _draw(options: dict[str, Any]) -> None:
    from .drawing import draw

    print(draw(options.pop("experts"), **options))


def _report(options: dict[str, Any]) -> None:
    from .page import report

    result = report(**options)
    print(f"{options['output']}: {len(result['ids']):,} tokens, {len(result['layers'])} layers")


def _calibrate(options: dict[str, Any]) -> None:
    from .recalibration import calibrate, load_warning

    as_json = options.pop("json")
    found = calibrate(**options)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_calibration(found)
    if warning := load_warning(found):
        print(f"ecmoe-inspect: warning: {warning}", file=sys.stderr)


def _print_calibration(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['checkpoint']}, {found['held_out_tokens']:,} held-out tokens of {found['text']}")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    rows = {
        "causal loss, nats per token": ("loss", ".4f"),
        "load of an expert, least (1 is its share)": ("load_min", ".2f"),
        "largest": ("load_max", ".2f"),
        "experts per token": ("experts_per_token", ".2f"),
        "chosen by no expert": ("uncovered", ".1%"),
    }
    for title, (name, style) in rows.items():
        table.add_row(title, *(format(found[when][name], style) for when in ("before", "after")))
    Console().print(table)
    print(f"Thresholds from: {found['thresholds_from']}. The old ones are in ecmoe_calibration.json there.")


def _evaluate(options: dict[str, Any]) -> None:
    from .evaluation import evaluate

    as_json = options.pop("json")
    options["max_tokens"] = options["max_tokens"] or None
    result = evaluate(**options)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print_evaluation(result)


def _compare(options: dict[str, Any]) -> None:
    from transformers.utils import logging

    from .comparison import compare

    as_json = options.pop("json")
    logging.disable_progress_bar()  # fourteen checkpoints are loaded below one bar of our own
    result = compare(**options)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    console = Console()
    console = console if console.is_terminal else Console(width=100)
    for table in tables(result):
        console.print(table)
        console.print()
    for line in (settings(result), "", *result["verdict"]):
        console.print(line, highlight=False, markup=False)


def _print_evaluation(result: dict[str, Any]) -> None:
    table = Table(title=result["checkpoint"], show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    if "loss" in result:
        table.add_row("causal loss, nats per token", f"{result['loss']:.4f}")
        table.add_row("perplexity", f"{result['perplexity']:,.2f}")
        if "loss_top_k" in result:
            table.add_row("top-k loss (looks at the future)", f"{result['loss_top_k']:.4f}")
            table.add_row("gap", f"{result['loss_gap']:+.4f}")
        table.add_row("tokens", f"{result['tokens']:,}")
        table.add_row("tokens/s", f"{result['tokens_per_second']:,.0f}")
    if "thresholds_from" in result:
        table.add_row("thresholds from", result["thresholds_from"])
    if "routes" in result:
        summary = result["routes"]["summary"]
        table.add_row("experts per token", f"{summary['experts_per_token']:.2f}")
        table.add_row("chosen by no expert", f"{summary['uncovered']:.1%}")
        for name, layer in result["routes"]["layers"].items():
            loads = " ".join(f"{load:.2f}" for load in layer["load"])
            table.add_row(f"load, {name.removesuffix('.mlp').removeprefix('model.')}", loads)
    if "pairs" in result:
        pairs = result["pairs"]
        table.add_row(f"minimal pairs, {pairs['pairs']:,}", f"{pairs['accuracy']:.1%}")
        if len(pairs["files"]) > 1:
            for name, accuracy in pairs["files"].items():
                table.add_row(f"  {name}", f"{accuracy:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
