"""What the command prints at the end: tables of what a record holds."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ecmoe.progress import duration, gigabytes
from modeling_ecmoe.report_ecmoe import LARGEST_LOAD, LEAST_LOAD

from .checkpoints.provenance import RECORD_NAME
from .texts import OWN_TEXT
from .upcycling.verify import far_kinds, remedy


def print_conversion(record: dict[str, Any], destination: str) -> None:
    """Dense and converted side by side."""
    verification, parameters = record["verification"], record["parameters"]
    tokens_choose = record["routing"] == "token_choice"
    table = _dense_beside_sparse(f"{record['source']} -> {destination} ({record['init']})", parameters)
    console = Console()
    if verification is None:
        console.print(table)
        advice = "train, or call ecmoe.calibrate_thresholds(model, batches), before judging the model"
        said = "" if tokens_choose else f" The thresholds are estimates: {advice}."
        console.print(f"Not verified.{said}", soft_wrap=True, highlight=False)
    else:
        load = f"{verification['load_min']:.2f} to {verification['load_max']:.2f} of its share"
        table.add_row("causal loss", f"{verification['loss_dense']:.6f}", f"{verification['loss_converted']:.6f}")
        table.add_row("divergence, nats per token", "", f"{verification['kl_divergence']:.1e}")
        if verification.get("layer_errors"):
            table.add_row("largest error of a layer", "", f"{max(verification['layer_errors'].values()):.1e}")
        table.add_row("experts per token", "", f"{verification['experts_per_token']:.2f}")
        table.add_row("expert load", "", load)
        table.add_row("chosen by no expert", "", f"{verification['uncovered']:.1%}")
        console.print(table)
        if "bounds" in verification:
            console.print(_regimes(verification))
        if "kinds" in verification:
            console.print(_kinds_of_text(record))
        if far := far_kinds(record):
            found = f"On {', '.join(far)} alone some experts are outside {LEAST_LOAD} to {LARGEST_LOAD} of their share."
            console.print(f"{found} {remedy(destination)}.", soft_wrap=True, highlight=False)
        same = "the same" if verification["greedy_same"] else "different"
        change = f"The loss changed by {verification['loss_change']:+.1e}."
        console.print(f"Greedy text: {same}. {change}", highlight=False)
        done = "Measured" if tokens_choose else "Calibrated and measured"
        console.print(f"{done} on {_text_of(record)}.", soft_wrap=True, highlight=False)
    _print_ways_out(console, record["ways_out"])
    console.print(f"Checkpoint in {destination}, all measurements in {RECORD_NAME} there.", highlight=False)


def _regimes(verification: dict[str, Any]) -> Table:
    """The source's own rule and every bound on the experts of a token, side by side."""
    table = Table(title="Experts of a token: the source's rule, and expert choice within bounds", padding=0)
    table.add_column("bounds", no_wrap=True)
    for column in ("causal loss", "change", "mean", "load", "varies by", "without any"):
        table.add_column(column, justify="right", no_wrap=True)
    source = verification["source"]
    rows = [("the source's", source)]
    rows += [(f"from {bound['least']} to {bound['most']}", bound) for bound in verification["bounds"]]
    for title, figures in rows:
        table.add_row(
            title,
            f"{figures['loss']:.4f}",
            "" if figures is source else f"{figures['loss'] - source['loss']:+.4f}",
            f"{figures['experts_per_token']:.2f}",
            f"{figures['load_min']:.2f} to {figures['load_max']:.2f}",
            f"{figures['load_cv']:.0%}",
            f"{figures['uncovered']:.1%}",
        )
    dropped = " and ".join(f"{share:.1%} at {capacity}" for capacity, share in source["dropped"].items())
    table.caption = f"Load: 1 is an expert's share. Of the source's choices a capacity would drop {dropped}."
    return table


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


def _print_ways_out(console: Console, ways_out: Mapping[str, str]) -> None:
    """For whoever needs the model in another tool, before it is trained."""
    ways = " or ".join(f"{title} (--to {to})" for to, title in ways_out.items())
    line = f"Other tools can have it as {ways}." if ways else "It cannot be written as a plain class for other tools."
    console.print(line, soft_wrap=True, highlight=False)


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
    console = Console()
    if "output_bytes" in record:
        _add_cost(table, record, record["running_bytes"])
        console.print(table)
        console.print("Nothing was written.")
        return
    console.print(table)
    change = "The change of the loss was not measured (--no-verify)."
    if verification is not None:
        change = f"The loss changed by {verification['loss_change']:+.4f} nats per token."
    if record["is_exact"]:
        console.print(f"Same routes, same weights. {change}", highlight=False)
    elif record["same_routes"]:
        _warn(f"the combine weights changed: a measured number of each expert stands for them. {change}")
    else:
        count = record["num_experts_per_tok"]
        rule = f"each token takes its {count} best experts" if count > 1 else "each token takes its best expert"
        if record["num_expert_groups"] > 1:
            rule += " of whatever group"
        if record["routing"] != "token_choice":
            rule += " instead of those above their thresholds"
        elif record["is_biased"]:
            rule += " without the biases that they were ranked by"
        _warn(f"the routing changed: {rule}. {change}")
    if verification is not None:
        console.print(f"Measured on {_text_of(record)}.", soft_wrap=True, highlight=False)
    console.print(f"Checkpoint in {destination}, all measurements in {RECORD_NAME} there.", highlight=False)


def print_plan(plan: dict[str, Any], options: dict[str, Any]) -> None:
    """The figures of a dry run."""
    parameters, flops, conversion = plan["parameters"], plan["flops_per_token"], plan["conversion"]
    table = _dense_beside_sparse(f"Plan: {options['source']} -> {options['destination']} ({plan['init']})", parameters)
    ratio = flops["converted"] / flops["dense"]
    table.add_row("FLOPs per token", f"{flops['dense']:.3g}", f"{flops['converted']:.3g} ({ratio:.2f} of it)")
    before = f"{plan['sparse_layers']} of {plan['num_layers']}" if _is_of_mixture(parameters) else "0"
    table.add_row("layers with experts", before, f"{plan['sparse_layers']} of {plan['num_layers']}")
    experts = plan["experts_per_token"]
    table.add_row("experts per token", "", f"{experts['mean']:g} on average, {experts['least']} to {experts['most']}")
    memory = max(conversion["writing_bytes"], conversion["running_bytes"])
    _add_cost(table, plan | conversion, memory)
    table.add_section()
    ways = {"float32": "in float32", "bfloat16": "in bfloat16", "lora": "by LoRA (lora={})", "qlora": "by QLoRA (4bit)"}
    for name, title in ways.items():
        needed = plan["training_bytes"][name]
        table.add_row(f"to fine-tune {title}", gigabytes(needed["dense"]), gigabytes(needed["converted"]))
    gpus, each = plan["num_gpus"], plan["training_bytes_per_gpu"]
    if gpus > 1:
        for name, title in (("ddp", "DDP"), ("fsdp2", "FSDP2"), ("expert_parallel", "experts alone divided")):
            table.add_row(f"in float32 on {gpus} GPUs, {title}", "", f"{gigabytes(each[name])} each")
        table.add_row("all-to-all per GPU and step", "", gigabytes(plan["all_to_all_bytes_per_step"]))
    console = Console()
    console.print(table)
    traffic = f" All-to-all: {plan['tokens_per_gpu']:,} tokens per GPU." if gpus > 1 else ""
    console.print(
        "FLOPs: forward, without attention scores. To fine-tune: weights, gradients and moments (of 8 bits in "
        f"bfloat16); activations come on top.{traffic} The time is a rough estimate.",
        soft_wrap=True,
        highlight=False,
    )
    _print_ways_out(console, plan["ways_out"])
    console.print("Nothing was written.", highlight=False)


def _add_cost(table: Table, cost: Mapping[str, Any], memory: int) -> None:
    """What it takes beside what is there; a line of its own on standard error where that is too little."""
    disk, free = cost["output_bytes"], cost["free_disk_bytes"]
    table.add_row("output on disk", "", f"{gigabytes(disk)} ({gigabytes(free)} free)")
    table.add_row("memory to make it", "", f"{gigabytes(memory)} ({gigabytes(cost['free_bytes'])} free)")
    table.add_row(f"time on {cost['device']}", "", f"about {duration(cost['seconds'])}")
    if disk > free:
        _warn("the output does not fit on the disk of the destination; free some, or choose another")
    if memory > cost["free_bytes"]:
        _warn("the models that are run do not fit into the memory; say --no-verify, or --device auto")


def _warn(text: str) -> None:
    print(f"ecmoe-convert: warning: {text}", file=sys.stderr)


def _side_by_side(title: str, left: str, right: str) -> Table:
    table = Table(title=title)
    table.add_column("")
    table.add_column(left, justify="right")
    table.add_column(right, justify="right")
    return table


def _is_of_mixture(parameters: dict[str, int]) -> bool:
    """Whether the source was a mixture already: a token meets a part of it."""
    return parameters["dense_active"] < parameters["dense"]


def _dense_beside_sparse(title: str, parameters: dict[str, int]) -> Table:
    """What a conversion and the plan of one begin with."""
    is_mixture = _is_of_mixture(parameters)
    table = _side_by_side(title, "source" if is_mixture else "dense", "converted" if is_mixture else "expert choice")
    table.add_row("parameters", f"{parameters['dense']:,}", f"{parameters['total']:,}")
    table.add_row("active per token", f"{parameters['dense_active']:,}", f"{parameters['active']:,}")
    return table
