"""ecmoe-convert SRC DST: a dense checkpoint becomes an expert-choice one, or with --to that a plain one.

ecmoe-convert Qwen/Qwen3-0.6B qwen3-8x --num-experts 8 --capacity-factor 1
ecmoe-convert --to token-choice qwen3-8x-tuned qwen3-8x-plain
"""

import argparse
import inspect
import sys
from typing import Any

from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from .convert import RECORD_NAME, convert
from .errors import ConversionError
from .export import export_plain
from .initialisations import INITIALISATIONS
from .plan import FAMILIES
from .sample import OWN_TEXT
from .settings import NAMED_LAYERS, ROUTERS
from .targets import DESTINATIONS

_DESTINATIONS_HELP = """--to, for tools that know plain classes alone; what the loss changed by is measured:
  token-choice  Mixtral (from Llama, Mistral), Qwen2-MoE, Qwen3-MoE: top-k instead of thresholds
  glm4-moe      GLM-4-MoE, from sigmoid scores (--init blend, shared): thresholds as biases, nearly exact"""


def _parser() -> argparse.ArgumentParser:
    inits = "\n".join(f"  {name:9} {init.summary}" for name, init in INITIALISATIONS.items())
    routers = "\n".join(f"  {name:9} {text}" for name, text in ROUTERS.items())
    ratios = "; ".join(f"{n}: {i.ratio}, {i.default_ratio}" for n, i in INITIALISATIONS.items() if i.ratio)
    parser = argparse.ArgumentParser(
        prog="ecmoe-convert",
        description="Convert a dense checkpoint into an expert-choice mixture of experts.",
        epilog=f"initialisations:\n{inits}\n\nrouters:\n{routers}\n\n{_DESTINATIONS_HELP}\n\n"
        "Killed or interrupted, the same command goes on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is not there: the defaults are those of the functions
    )
    parser.add_argument("source", help=f"checkpoint folder or Hub id[@revision] ({', '.join(FAMILIES)})")
    parser.add_argument("destination", help="folder to make; it must not exist, or be empty")
    parser.add_argument("--num-experts", type=int, help="experts per layer (default: 8; with mix one per checkpoint)")
    parser.add_argument("--capacity-factor", type=float, help="mean experts per token (default: 1; granular: G)")
    parser.add_argument("--init", help="how experts begin, see below (default: shared)")
    parser.add_argument("--ratio", type=float, help=f"of some initialisations ({ratios})")
    parser.add_argument("--granularity", type=int, help="G, shards per dense FFN of granular (default: 2)")
    parser.add_argument("--layers", help=f"{', '.join(NAMED_LAYERS)}, or such as 1,3,5 (default: all)")
    parser.add_argument("--router", help="how the router begins, see below (default: normal)")
    parser.add_argument("--router-prompts", metavar="FILE", help="JSON list with a list of texts for each expert")
    parser.add_argument("--mix-with", nargs="+", metavar="SOURCE", help="the other checkpoints of mix")
    parser.add_argument("--mix-attention", help="average or first (default: average)")
    parser.add_argument("--seed", type=int, help="of everything that is drawn (default: 0)")
    parser.add_argument("--max-shard-size", help="of the output's files (default: 5GB)")
    parser.add_argument("--text", help="UTF-8 text file to calibrate on (default: a little English of Python's own)")
    parser.add_argument("--revision", help="of a Hub id")
    parser.add_argument("--device", help="where models are run (default: an accelerator if there is one; auto: all)")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="run no model; estimate thresholds")
    parser.add_argument("--push-to-hub", metavar="REPOSITORY", help="upload the finished folder")
    parser.add_argument(
        "--to", help=f"write an expert-choice checkpoint as a plain one: {' or '.join(DESTINATIONS)}, see below"
    )
    parser.add_argument("--num-experts-per-tok", type=int, help="of --to (default: the source's mean, rounded)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; touch neither weights nor disk")
    parser.add_argument("--num-gpus", type=int, help="of the dry run's estimates (default: 8)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with code 2 and one line on an error the user can put right."""
    options = vars(_parser().parse_args(argv))
    debug, to = options.pop("debug", False), options.get("to")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bars()
    try:
        function = convert if to is None else export_plain
        _refuse_foreign(options, function)
        record = function(**options)
    except ConversionError as error:
        if debug:
            raise
        print(f"ecmoe-convert: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ecmoe-convert: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if to is not None:
        _report_plain(record, options["destination"])
    elif options.get("dry_run"):
        _print_plan(record, options)
    else:
        _report(record, options["destination"])


def _refuse_foreign(options: dict[str, Any], function: Any) -> None:
    """An option of the other direction is a mistake, not something to pass over.

    Raises:
        ConversionError: naming it.
    """
    for name in options.keys() - inspect.signature(function).parameters.keys():
        where = "belongs to --to" if function is convert else f"does not go with --to {options['to']}"
        raise ConversionError(f"{name}={options[name]} {where}; leave it out")


def _report(record: dict[str, Any], destination: str) -> None:
    """Dense and converted side by side."""
    verification, parameters = record["verification"], record["parameters"]
    table = Table(title=f"{record['source']} -> {destination} ({record['init']})")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("expert choice", justify="right")
    table.add_row("parameters", f"{parameters['dense']:,}", f"{parameters['total']:,}")
    table.add_row("active per token", f"{parameters['dense']:,}", f"{parameters['active']:,}")
    console = Console()
    if verification is None:
        console.print(table)
        remedy = "train, or call modeling_ecmoe.calibrate_thresholds(model, batches), before judging the model"
        console.print(f"Not verified. The thresholds are estimates: {remedy}.", soft_wrap=True, highlight=False)
    else:
        load = f"{verification['load_min']:.2f} to {verification['load_max']:.2f} of its share"
        table.add_row("causal loss", f"{verification['loss_dense']:.6f}", f"{verification['loss_converted']:.6f}")
        table.add_row("divergence, nats per token", "", f"{verification['kl_divergence']:.1e}")
        table.add_row("largest error of a layer", "", f"{max(verification['layer_errors'].values()):.1e}")
        table.add_row("experts per token", "", f"{verification['experts_per_token']:.2f}")
        table.add_row("expert load", "", load)
        table.add_row("chosen by no expert", "", f"{verification['uncovered']:.1%}")
        console.print(table)
        same = "the same" if verification["greedy_same"] else "different"
        change = f"The loss changed by {verification['loss_change']:+.1e}."
        console.print(f"Greedy text: {same}. {change}", highlight=False)
        console.print(f"Calibrated and measured on {_text_of(record)}.", soft_wrap=True, highlight=False)
    console.print(f"Checkpoint in {destination}, all measurements in {RECORD_NAME} there.", highlight=False)


def _text_of(record: dict[str, Any]) -> str:
    """A loss on the text that comes with Python says little of the user's own, so the remedy stands beside it."""
    return "Python's own documentation; --text FILE takes yours" if record["text"] == OWN_TEXT else record["text"]


def _report_plain(record: dict[str, Any], destination: str) -> None:
    """Source and plain checkpoint side by side, or the plan of it, and what has changed."""
    parameters, verification = record["parameters"], record.get("verification")
    table = Table(title=f"{record['source']} -> {destination} ({record['architecture']})")
    table.add_column("")
    table.add_column("expert choice", justify="right")
    table.add_column("plain", justify="right")
    table.add_row("parameters", f"{parameters['source']:,}", f"{parameters['total']:,}")
    table.add_row("that a token meets", "", f"{parameters['active']:,}")
    table.add_row("experts per token", f"{record['capacity_factor']} on average", str(record["num_experts_per_tok"]))
    if verification is not None:
        table.add_row("causal loss", f"{verification['loss_source']:.6f}", f"{verification['loss_export']:.6f}")
        table.add_row("divergence, nats per token", "", f"{verification['kl_divergence']:.1e}")
    if "output_bytes" in record:
        table.add_row("output on disk", "", _gigabytes(record["output_bytes"]))
    console = Console()
    console.print(table)
    if "output_bytes" in record:
        console.print("Nothing was written.")
        return
    change = "The change of the loss was not measured (--no-verify)."
    if verification is not None:
        change = f"The loss changed by {verification['loss_change']:+.4f} nats per token."
    if record["is_exact"]:
        console.print(f"Same routes, same weights. {change}", highlight=False)
    else:
        count = record["num_experts_per_tok"]
        rule = f"each token takes its {count} best experts" if count > 1 else "each token takes its best expert"
        warning = f"the routing changed: {rule} instead of those above their thresholds. {change}"
        print(f"ecmoe-convert: warning: {warning}", file=sys.stderr)
    if verification is not None:
        console.print(f"Measured on {_text_of(record)}.", soft_wrap=True, highlight=False)
    console.print(f"Checkpoint in {destination}, all measurements in {RECORD_NAME} there.", highlight=False)


def _print_plan(plan: dict[str, Any], options: dict[str, Any]) -> None:
    """The figures of a dry run."""
    parameters, flops, memory = plan["parameters"], plan["flops_per_token"], plan["training_bytes_per_gpu"]
    gpus = plan["num_gpus"]
    table = Table(title=f"Plan: {options['source']} -> {options['destination']} ({plan['init']})")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("expert choice", justify="right")
    table.add_row("parameters", f"{parameters['dense']:,}", f"{parameters['total']:,}")
    table.add_row("active per token", f"{parameters['dense']:,}", f"{parameters['active']:,}")
    ratio = flops["converted"] / flops["dense"]
    table.add_row("FLOPs per token", f"{flops['dense']:.3g}", f"{flops['converted']:.3g} ({ratio:.2f} of dense)")
    table.add_row("layers with experts", "", str(plan["sparse_layers"]))
    table.add_row("output on disk", "", _gigabytes(plan["output_bytes"]))
    for name, title in (("ddp", "DDP"), ("fsdp2", "FSDP2"), ("expert_parallel", "experts alone divided")):
        table.add_row(f"to fine-tune on {gpus} GPUs, {title}", "", f"{_gigabytes(memory[name])} each")
    table.add_row("all-to-all per GPU and step", "", _gigabytes(plan["all_to_all_bytes_per_step"]))
    console = Console()
    console.print(table)
    console.print(
        "FLOPs: forward, without attention scores. Memory: float32 weights, gradients and AdamW moments; activations, "
        f"and FSDP2's gathered layer, come on top. All-to-all: {plan['tokens_per_gpu']:,} tokens per GPU. "
        "Nothing was written.",
        highlight=False,
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


if __name__ == "__main__":
    main()
