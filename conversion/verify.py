"""The converter's check of its own work: dense and converted model side by side on the same tokens."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig

from modeling_ecmoe import record_routing
from modeling_ecmoe.block_ecmoe import EcMoeBlock

from .errors import ConversionError

NUM_GREEDY_TOKENS = 40
# Exact in float32 up to rounding; in 16 bits the two sums round differently.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@torch.no_grad()
def compare(dense: Any, converted: Any, tokenizer: Any, windows: Tensor, batch_size: int) -> dict[str, Any]:
    """Loss, divergence and greedy text of both models, and how the converted one routes, on windows [W, L] it was
    not calibrated on. Losses and divergence are nats per token."""
    with record_routing(converted) as record:
        measured = side_by_side({"dense": dense, "converted": converted}, windows, batch_size)
    measured["layer_errors"] = layer_errors(dense, converted, windows[:batch_size])
    return measured | greedy_texts({"dense": dense, "converted": converted}, tokenizer, windows) | record.summary()


@torch.no_grad()
def side_by_side(models: dict[str, Any], windows: Tensor, batch_size: int) -> dict[str, Any]:
    """Next-token loss of each of two models, the change from the first to the second, and KL(first || second), all in
    nats per token, on windows [W, L]. The keys hold the models' names."""
    (first_name, first), (second_name, second) = models.items()
    totals = torch.zeros(3, dtype=torch.float64)
    for batch in tqdm(windows.split(batch_size), desc="Verifying", unit="batch", disable=None):
        totals += _losses(first, second, batch) * len(batch)
    loss_first, loss_second, divergence = (totals / len(windows)).tolist()
    return {
        "tokens": windows.numel(),
        f"loss_{first_name}": loss_first,
        f"loss_{second_name}": loss_second,
        "loss_change": loss_second - loss_first,
        "kl_divergence": divergence,
    }


def greedy_texts(models: dict[str, Any], tokenizer: Any, windows: Tensor) -> dict[str, Any]:
    """What each of two models makes of the beginning of the first window, and whether it is the same."""
    prompt = windows[:1, : min(32, windows.shape[1] // 2)]
    ids = {name: greedy_ids(model, prompt) for name, model in models.items()}
    first, second = ids.values()
    texts = {f"greedy_{name}": tokenizer.decode(found, skip_special_tokens=True) for name, found in ids.items()}
    return {
        "greedy_same": first == second,
        "greedy_prompt": tokenizer.decode(prompt[0], skip_special_tokens=True),
    } | texts


def _losses(first: Any, second: Any, batch: Tensor) -> Tensor:
    """[3] float64: both next-token losses of a batch [B, L], and the divergence KL(first || second)."""
    logits = [model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1] for model in (first, second)]
    log_p, log_q = (values.to(first.device).float().log_softmax(-1).flatten(0, 1) for values in logits)
    targets = batch[:, 1:].flatten().to(log_p.device)
    divergence = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().mean()
    losses = [nn.functional.nll_loss(values, targets, reduction="none").double().mean() for values in (log_p, log_q)]
    return torch.stack([*losses, divergence]).cpu()


def layer_errors(dense: Any, converted: Any, batch: Tensor) -> dict[str, float]:
    """||block(x) - FFN(x)|| / ||FFN(x)|| of every sparse layer, x the inputs of the dense model's FFN on a batch.

    The keys are the layers' numbers as text, as in the JSON record.
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

    handles = [dense.get_decoder().layers[i].mlp.register_forward_hook(hook_of(i)) for i in blocks]
    try:
        dense(input_ids=batch.to(dense.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return errors


def greedy_ids(model: Any, prompt: Tensor) -> list[int]:
    """Greedy continuation of prompt [1, P] by a fixed number of tokens, without the prompt."""
    own = model.generation_config
    # In its place, for generate() takes from it what is not given: samples, beams, stop strings, another output.
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=NUM_GREEDY_TOKENS,
        min_new_tokens=NUM_GREEDY_TOKENS,
        **{name: getattr(own, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    )
    try:
        ids = model.generate(prompt.to(model.device), attention_mask=torch.ones_like(prompt, device=model.device))
    finally:
        model.generation_config = own
    return ids[0, prompt.shape[1] :].tolist()


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
