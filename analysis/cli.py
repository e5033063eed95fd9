"""ecmoe-inspect {evaluate}: what an expert-choice checkpoint does with text.

ecmoe-inspect evaluate qwen3-8x-tuned --data text.jsonl
"""

import argparse
import json
import sys
from typing import Any

from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from .errors import AnalysisError
from .evaluate import MAX_TOKENS, evaluate


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ecmoe-inspect", description="Look at expert-choice models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("evaluate", help="losses, speed, routes and minimal pairs of a checkpoint")
    command.add_argument("checkpoint", help="expert-choice checkpoint folder or Hub id")
    command.add_argument("--data", help="text file (.txt, .md, .jsonl, .parquet) or a folder of them")
    command.add_argument("--pairs", nargs="+", metavar="FILE", help="minimal pairs as BLiMP's .jsonl files, or folders")
    command.add_argument("--text-column", default="text", help="of .jsonl and .parquet (default: text)")
    command.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, help=f"read about so many (default: {MAX_TOKENS:,}; 0: all)"
    )
    command.add_argument("--device", help="default: an accelerator if there is one")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with code 2 and one line on an error the user can put right."""
    options = vars(_parser().parse_args(argv))
    debug, as_json = options.pop("debug"), options.pop("json")
    options.pop("command")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bars()
    options["max_tokens"] = options["max_tokens"] or None
    try:
        result = evaluate(**options)
    except AnalysisError as error:
        if debug:
            raise
        print(f"ecmoe-inspect: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ecmoe-inspect: interrupted", file=sys.stderr)
        sys.exit(130)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print_evaluation(result)


def _print_evaluation(result: dict[str, Any]) -> None:
    table = Table(title=result["checkpoint"], show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    if "loss" in result:
        table.add_row("causal loss, nats per token", f"{result['loss']:.4f}")
        table.add_row("perplexity", f"{result['perplexity']:,.2f}")
        table.add_row("top-k loss (looks at the future)", f"{result['loss_top_k']:.4f}")
        table.add_row("gap", f"{result['loss_gap']:+.4f}")
        table.add_row("tokens", f"{result['tokens']:,}")
        table.add_row("tokens/s", f"{result['tokens_per_second']:,.0f}")
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
