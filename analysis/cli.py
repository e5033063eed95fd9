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

from ecmoe.progress import number_of

from .arguments import check_arguments
from .errors import AnalysisError
from .limits import CALIBRATION_TOKENS, COMPARED_TOKENS, COMPARISON_SECONDS, EVALUATED_TOKENS, EVALUATION_SECONDS
from .printing import calibration_table, evaluation_table, remarks
from .variants import variants_of
from .verdict import settings, tables

# What needs torch is imported when a command runs: --help and a mistyped option are answered at once.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ecmoe-inspect", description="Look at expert-choice models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("evaluate", help="losses, speed, routes and minimal pairs of a checkpoint")
    _add_common(command, "checkpoint folder or Hub id, expert-choice or any causal language model", needs_data=False)
    for part, what in (("messages", "conversations"), ("prompt", "prompts"), ("completion", "completions")):
        command.add_argument(f"--{part}-column", help=f"of .jsonl and .parquet with {what} (default: {part})")
    command.add_argument(
        "--against",
        nargs="+",
        metavar="CHECKPOINT",
        help="others to evaluate on the same rows, such as the dense parent",
    )
    command.add_argument("--pairs", nargs="+", metavar="FILE", help="minimal pairs as BLiMP's .jsonl files, or folders")
    _add_amount(
        command,
        f"read at most so many of --data; 0 reads all (default: {EVALUATED_TOKENS:,}, or as many of them as take some "
        f"{EVALUATION_SECONDS // 60} minutes here)",
    )
    variants = variants_of(num_experts=8)  # any number that has them all
    command = commands.add_parser(
        "compare",
        help="token choice, expert choice and threshold routing side by side",
        description=f"Up to {len(variants)} ways of routing, one after the other. What takes the time, for each: a few "
        "forward and backward passes that time a training step (--no-timing); --steps of training; calibration; two "
        "passes over the held-out tokens (--tokens). It says first how long it will take, and leaves out what does not "
        "fit into --minutes.",
    )
    _add_common(command, "expert-choice checkpoint folder or Hub id", needs_data=True)
    command.add_argument("--steps", type=int, default=0, help="train each so long before measuring (default: 0)")
    command.add_argument(
        "--routings",
        nargs="+",
        metavar="NAME",
        help=f"all, or some of {', '.join(dict.fromkeys(variant.key for variant in variants))}; "
        "with :1 or :2 for one or two experts per token alone (default: those there is time for)",
    )
    command.add_argument("--no-timing", dest="timing", action="store_false", help="time no training steps")
    command.add_argument(
        "--minutes", type=float, help=f"it may take about so long (default: {COMPARISON_SECONDS // 60})"
    )
    _add_amount(command, f"held out to measure on, at most (default: {COMPARED_TOKENS:,}, or fewer if time is short)")
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


def _add_amount(command: argparse.ArgumentParser, tokens: str) -> None:
    command.add_argument("--tokens", "--max-tokens", dest="max_tokens", type=int, metavar="N", help=tokens)
    command.add_argument("--quick", action="store_true", help="what can be had in about a minute")


def _add_common(command: argparse.ArgumentParser, checkpoint: str, needs_data: bool) -> None:
    command.add_argument("checkpoint", help=checkpoint)
    command.add_argument(
        "--data",
        required=needs_data,
        help="text file (.txt, .md, .jsonl, .parquet) or a folder of them"
        + ("" if needs_data else "; also conversations, and prompts with completions"),
    )
    command.add_argument("--text-column", help="of .jsonl and .parquet with text (default: text)")
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
    print(f"{options['output']}: {number_of(len(result['ids']), 'token')}, {number_of(len(result['layers']), 'layer')}")


def _calibrate(options: dict[str, Any]) -> None:
    from .recalibration import calibrate, load_warning

    as_json = options.pop("json")
    found = calibrate(**options)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _console().print(calibration_table(found))
        print(f"Thresholds from: {found['thresholds_from']}. The old ones are in ecmoe_calibration.json there.")
    if warning := load_warning(found):
        print(f"ecmoe-inspect: warning: {warning}", file=sys.stderr)


def _evaluate(options: dict[str, Any]) -> None:
    from .evaluation import evaluate

    as_json = options.pop("json")
    result = evaluate(**options)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    console = _console()
    console.print(evaluation_table(result))
    for line in remarks(result):
        console.print(line, highlight=False, markup=False)


def _compare(options: dict[str, Any]) -> None:
    from transformers.utils import logging

    from .comparison import compare

    as_json = options.pop("json")
    logging.disable_progress_bar()  # checkpoints are loaded and calibrated below one bar of our own
    result = compare(**options)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    console = _console()
    for table in tables(result):
        console.print(table)
        console.print()
    for line in (settings(result), "", *result["verdict"]):
        console.print(line, highlight=False, markup=False)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=100)


if __name__ == "__main__":
    main()
