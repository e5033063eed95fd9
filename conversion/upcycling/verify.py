"""The converter's check of its own work: dense and converted model side by side on the same tokens."""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modeling_ecmoe import RoutingRecord, record_routing
from modeling_ecmoe.block_ecmoe import EcMoeBlock
from modeling_ecmoe.report_ecmoe import is_near_share

from ..errors import ConversionError
from ..models import TOLERANCE, greedy_texts, side_by_side

LEAST_TOKENS = 64  # an expert's share of a kind of text that is long enough to tell


@torch.no_grad()
def compare(dense: Any, converted: Any, tokenizer: Any, windows: dict[str, Tensor], batch_size: int) -> dict[str, Any]:
    """Loss, divergence and greedy text of both models, and how the converted one routes, on windows [W, L] of each
    kind of text it was not calibrated on. Losses and divergence are nats per token."""
    records: dict[str, RoutingRecord] = {}

    @contextlib.contextmanager
    def recording(kind: str) -> Iterator[None]:
        with record_routing(converted) as record:
            yield
        if kind in records:
            record.merge(records[kind])
        records[kind] = record

    with layer_errors(dense, converted) as errors:
        measured = side_by_side({"dense": dense, "converted": converted}, windows, batch_size, recording)
    for kind, figures in measured.get("kinds", {}).items():
        figures |= records[kind].summary()
    whole = functools.reduce(_merged, records.values())
    first = next(iter(windows.values()))
    texts = greedy_texts({"dense": dense, "converted": converted}, tokenizer, first)
    return measured | {"layer_errors": errors} | texts | whole.summary()


def _merged(one: RoutingRecord, other: RoutingRecord) -> RoutingRecord:
    both = RoutingRecord(one.num_experts, one.capacity_factor)
    both.merge(one)
    both.merge(other)
    return both


@contextlib.contextmanager
def layer_errors(dense: Any, converted: Any) -> Iterator[dict[str, float]]:
    """||block(x) - FFN(x)|| / ||FFN(x)|| of every sparse layer, x the inputs of the dense model's FFN in its first pass
    while the context is open.

    The keys are the layers' numbers as text, as in the JSON record; none where the source has no module whose output
    is the whole FFN's.
    """
    errors: dict[str, float] = {}
    ffn = converted.config.get_text_config().dense_ffn
    layers = [getattr(layer, "mlp", None) for layer in ffn.layers_of(converted)]
    blocks = {i: block for i, block in enumerate(layers) if isinstance(block, EcMoeBlock)}
    inputs: dict[int, Tensor] = {}
    handles: list[Any] = []

    def hooks_of(layer: int) -> Any:
        def keep(_module: nn.Module, given: tuple[Tensor]) -> None:
            if str(layer) not in errors:
                inputs[layer] = given[0]

        def compare_outputs(_module: nn.Module, _given: Any, output: Tensor) -> None:
            if layer not in inputs:
                return
            found = blocks[layer](inputs.pop(layer).to(converted.device)).to(output.device)
            errors[str(layer)] = ((found.float() - output.float()).norm() / output.float().norm()).item()

        return keep, compare_outputs

    for i in blocks:
        first, last = ffn.ends_of(ffn.layers_of(dense)[i])
        if first is not None:
            keep, compare_outputs = hooks_of(i)
            handles += [first.register_forward_pre_hook(keep), last.register_forward_hook(compare_outputs)]
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()


def load_warning(record: dict[str, Any], destination: str) -> str | None:
    """What to say where experts are far from their share of text that the thresholds were not measured on.

    record: of a conversion, with or without a verification.
    """
    measured = record["verification"]
    if measured is None or record["routing"] == "token_choice" or is_near_share(measured):
        return None
    return (
        f"Experts take {measured['load_min']:.2f} to {measured['load_max']:.2f} of their share of held-out text, which "
        f"is far from 1: the thresholds are those of other text, or of too little. {remedy(destination)}"
    )


def far_kinds(record: dict[str, Any]) -> list[str]:
    """The kinds of held-out text on which some expert is far from its share; not those so short that chance alone
    would bring it there."""
    if record["routing"] == "token_choice":  # whose load is the source's own
        return []
    share = record["capacity_factor"] / record["num_experts"]
    kinds = (record["verification"] or {}).get("kinds", {})
    return [kind for kind, part in kinds.items() if part["tokens"] * share >= LEAST_TOKENS and not is_near_share(part)]


def remedy(destination: str) -> str:
    """Which text to give, and how."""
    return (
        "Calibrate on text of the kind that the model is meant for: ecmoe-convert ... --text FILE, or "
        f"ecmoe-inspect calibrate {destination} --text FILE"
    )


def check(measured: dict[str, Any], is_exact: bool, dtype: torch.dtype) -> None:
    """Fails a conversion that is not finite, or one that promises to be exact and is not.

    Raises:
        ConversionError: with the figures.
    """
    if not math.isfinite(measured["loss_dense"]):
        raise ConversionError(
            f"the source's own loss is {measured['loss_dense']}: its weights are damaged; fetch them again"
        )
    tolerance = TOLERANCE[dtype]
    changed, divergence = abs(measured["loss_change"]), measured["kl_divergence"]
    # In 16 bits a greedy choice between near ties may fall either way; in float32 it must not.
    same_text = measured["greedy_same"] or dtype != torch.float32
    if not math.isfinite(changed) or (is_exact and not (max(changed, divergence) <= tolerance and same_text)):
        raise ConversionError(
            f"the converted model does not compute what its source does: the loss changed by {changed:.2e}, "
            f"divergence {divergence:.2e} (at most {tolerance:.0e} is rounding), greedy text "
            f"{'kept' if measured['greedy_same'] else 'changed'}; nothing was written"
        )
