"""ecmoe-convert SRC DST: a dense checkpoint becomes an expert-choice one.

ecmoe-convert Qwen/Qwen3-0.6B qwen3-8x --num-experts 8 --capacity-factor 1
"""

import argparse
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from .convert import RECORD_NAME, convert
from .errors import ConversionError
from .initialisations import INITIALISATIONS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ecmoe-convert", description="Convert a dense checkpoint into an expert-choice mixture of experts."
    )
    parser.add_argument("source", help="checkpoint folder or Hub id (Llama, Mistral, Qwen2, Qwen3)")
    parser.add_argument("destination", help="folder to make; it must not exist")
    parser.add_argument("--num-experts", type=int, default=8, help="experts per layer (default: 8)")
    parser.add_argument("--capacity-factor", type=float, default=1, help="mean experts per token (default: 1)")
    inits = "; ".join(f"{name}: {init.summary}" for name, init in INITIALISATIONS.items())
    parser.add_argument("--init", default="blend", help=f"how experts begin (default: blend). {inits}")
    parser.add_argument("--seed", type=int, default=0, help="of the router weights (default: 0)")
    parser.add_argument("--max-shard-size", default="5GB", help="of the output's files (default: 5GB)")
    parser.add_argument("--text", help="UTF-8 text file to calibrate on (default: a little English of Python's own)")
    parser.add_argument("--revision", help="of a Hub id")
    parser.add_argument("--device", help="for calibration and verification (default: an accelerator if there is one)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with code 2 and one line on an error the user can put right."""
    options = vars(_parser().parse_args(argv))
    debug = options.pop("debug")
    try:
        record = convert(**options)
    except ConversionError as error:
        if debug:
            raise
        print(f"ecmoe-convert: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ecmoe-convert: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    _report(record, options["destination"])


def _report(record: dict[str, Any], destination: str) -> None:
    """Dense and converted side by side."""
    verification, parameters = record["verification"], record["parameters"]
    table = Table(title=f"{record['source']} -> {destination} ({record['init']})")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("expert choice", justify="right")
    table.add_row("parameters", f"{parameters['dense']:,}", f"{parameters['total']:,}")
    table.add_row("active per token", f"{parameters['dense']:,}", f"{parameters['active']:,}")
    table.add_row("causal loss", f"{verification['loss_dense']:.6f}", f"{verification['loss_converted']:.6f}")
    table.add_row("experts per token", "", f"{verification['experts_per_token']:.2f}")
    table.add_row("expert load", "", f"{verification['load_min']:.2f} to {verification['load_max']:.2f} of its share")
    table.add_row("chosen by no expert", "", f"{verification['uncovered']:.1%}")
    console = Console()
    console.print(table)
    same = "the same" if verification["greedy_same"] else "different"
    console.print(f"Greedy text: {same}. The loss changed by {verification['loss_change']:+.1e}.", highlight=False)
    console.print(f"Checkpoint in {destination}, all measurements in {RECORD_NAME} there.", highlight=False)


if __name__ == "__main__":
    main()
