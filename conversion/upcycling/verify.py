"""The converter's check of its own work: dense and converted model side by side on the same tokens."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from modeling_ecmoe import record_routing
from modeling_ecmoe.block_ecmoe import EcMoeBlock

from ..errors import ConversionError
from ..models import TOLERANCE, greedy_texts, side_by_side


@torch.no_grad()
def compare(dense: Any, converted: Any, tokenizer: Any, windows: Tensor, batch_size: int) -> dict[str, Any]:
    """Loss, divergence and greedy text of both models, and how the converted one routes, on windows [W, L] it was
    not calibrated on. Losses and divergence are nats per token."""
    with record_routing(converted) as record:
        measured = side_by_side({"dense": dense, "converted": converted}, windows, batch_size)
    measured["layer_errors"] = layer_errors(dense, converted, windows[:batch_size])
    return measured | greedy_texts({"dense": dense, "converted": converted}, tokenizer, windows) | record.summary()


def layer_errors(dense: Any, converted: Any, batch: Tensor) -> dict[str, float]:
    """||block(x) - FFN(x)|| / ||FFN(x)|| of every sparse layer, x the inputs of the dense model's FFN on a batch.

    The keys are the layers' numbers as text, as in the JSON record; none where the source has no module `mlp` whose
    output is the whole FFN's.
    """
    errors: dict[str, float] = {}
    blocks = {
        i: layer.mlp for i, layer in enumerate(converted.get_decoder().layers) if isinstance(layer.mlp, EcMoeBlock)
    }

    def hook_of(layer: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            found = blocks[layer](inputs[0].to(converted.device)).to(output.device)
            errors[str(layer)] = ((found.float() - output.float()).norm() / output.float().norm()).item()

        return hook

    ffns = {i: getattr(dense.get_decoder().layers[i], "mlp", None) for i in blocks}
    handles = [ffn.register_forward_hook(hook_of(i)) for i, ffn in ffns.items() if ffn is not None]
    try:
        dense(input_ids=batch.to(dense.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return errors


def check(measured: dict[str, Any], is_exact: bool, dtype: torch.dtype) -> None:
    """Fails a conversion that is not finite, or one that promises to be exact and is not.

    Raises:
        ConversionError: with the figures.
    """
    if not math.isfinite(measured["loss_dense"]):
        raise ConversionError(
            f"the dense model's own loss is {measured['loss_dense']}: its weights are damaged; fetch them again"
        )
    tolerance = TOLERANCE[dtype]
    changed, divergence = abs(measured["loss_change"]), measured["kl_divergence"]
    # In 16 bits a greedy choice between near ties may fall either way; in float32 it must not.
    same_text = measured["greedy_same"] or dtype != torch.float32
    if not math.isfinite(changed) or (is_exact and not (max(changed, divergence) <= tolerance and same_text)):
        raise ConversionError(
            f"the converted model does not compute what the dense one does: the loss changed by {changed:.2e}, "
            f"divergence {divergence:.2e} (at most {tolerance:.0e} is rounding), greedy text "
            f"{'kept' if measured['greedy_same'] else 'changed'}; nothing was written"
        )
