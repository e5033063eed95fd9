"""What the command prints at the end: tables of what a record holds."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from .checkpoints.provenance import RECORD_NAME
from .texts import OWN_TEXT
from .upcycling.verify import LARGEST_LOAD, LEAST_LOAD, far_kinds, remedy


def print_conversion(record: dict[str, Any], destination: str) -> None:
    """Dense and converted side by side."""
    verification, parameters = record["verification"], record["parameters"]
    table = _dense_beside_sparse(f"{record['source']} -> {destination} ({record['init']})", parameters)
    console = Console()
    if verification is None:
        console.print(table)
        advice = "train, or call ecmoe.calibrate_thresholds(model, batches), before judging the model"
        console.print(f"Not verified. The thresholds are estimates: {advice}.", soft_wrap=True, highlight=False)
    else:
        load = f"{verification['load_min']:.2f} to {verification['load_max']:.2f} of its share"
        table.add_row("causal loss", f"{verification['loss_dense']:.6f}", f"{verification['loss_converted']:.6f}")
        table.add_row("divergence, nats per token", "", f"{verification['kl_divergence']:.1e}")
        table.add_row("largest error of a layer", "", f"{max(verification['layer_errors'].values()):.1e}")
        table.add_row("experts per token", "", f"{verification['experts_per_token']:.2f}")
        table.add_row("expert load", "", load)
        table.add_row("chosen by no expert", "", f"{verification['uncovered']:.1%}")
        console.print(table)
        if "kinds" in verification:
            console.print(_kinds_of_text(record))
        if far := far_kinds(record):
            found = f"On {', '.join(far)} alone some experts are outside {LEAST_LOAD} to {LARGEST_LOAD} of their share."
            console.print(f"{found} {remedy(destination)}.", soft_wrap=True, highlight=False)
        same = "the same" if verification["greedy_same"] else "different"
        change = f"The loss changed by {verification['loss_change']:+.1e}."
        console.print(f"Greedy text: {same}. {change}", highlight=False)
        console.print(f"Calibrated and measured on {_text_of(record)}.", soft_wrap=True, highlight=False)
    console.print(f"Checkpoint in {destination}, all measurements in {RECORD_NAME} there.", highlight=False)


def _kinds_of_text(record: dict[str, Any]) -> Table:
    """How the experts fare on each kind of text."""
    table = Table(title="Held-out text by its kind; load: 1 is an expert's share")
    columns = ("kind of text", "tokens to calibrate", "held out", "causal loss", "load, least", "largest")
    for name in (*columns, "experts per token"):
        table.add_column(name, justify="left" if name == columns[0] else "right")
    for kind, found in record["verification"]["kinds"].items():
        table.add_row(
            kind,
            f"{record['calibration_tokens_of_kinds'].get(kind, 0):,}",
            f"{found['tokens']:,}",
            f"{found['loss_converted']:.4f}",
            f"{found['load_min']:.2f}",
            f"{found['load_max']:.2f}",
            f"{found['experts_per_token']:.2f}",
        )
    return table


def _text_of(record: dict[str, Any]) -> str:
    """A loss on text that comes with the package says little of the user's own, so the remedy stands beside it."""
    return f"{OWN_TEXT}; --text FILE takes yours" if record["text"] == OWN_TEXT else record["text"]


def print_export(record: dict[str, Any], destination: str) -> None:
    """Source and plain checkpoint side by side, or the plan of it, and what has changed."""
    parameters, verification = record["parameters"], record.get("verification")
    table = _side_by_side(f"{record['source']} -> {destination} ({record['architecture']})", "expert choice", "plain")
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


def print_plan(plan: dict[str, Any], options: dict[str, Any]) -> None:
    """The figures of a dry run."""
    parameters, flops, memory = plan["parameters"], plan["flops_per_token"], plan["training_bytes_per_gpu"]
    gpus = plan["num_gpus"]
    table = _dense_beside_sparse(f"Plan: {options['source']} -> {options['destination']} ({plan['init']})", parameters)
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


def _side_by_side(title: str, left: str, right: str) -> Table:
    table = Table(title=title)
    table.add_column("")
    table.add_column(left, justify="right")
    table.add_column(right, justify="right")
    return table


def _dense_beside_sparse(title: str, parameters: dict[str, int]) -> Table:
    """What a conversion and the plan of one begin with."""
    table = _side_by_side(title, "dense", "expert choice")
    table.add_row("parameters", f"{parameters['dense']:,}", f"{parameters['total']:,}")
    table.add_row("active per token", f"{parameters['dense']:,}", f"{parameters['active']:,}")
    return table


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
