"""The converter's check of its own work: dense and converted model side by side on the same tokens."""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from modeling_ecmoe import record_routing

NUM_GREEDY_TOKENS = 40


@torch.no_grad()
def causal_loss(model: Any, windows: Tensor, batch_size: int) -> float:
    """Mean next-token cross-entropy over windows [W, L], in nats per token."""
    total = 0.0
    for batch in tqdm(windows.split(batch_size), desc=f"Loss of {model.config.model_type}", unit="batch"):
        batch = batch.to(model.device)
        total += model(input_ids=batch, labels=batch, use_cache=False).loss.double().item() * len(batch)
    return total / len(windows)


@torch.no_grad()
def greedy_ids(model: Any, prompt: Tensor) -> list[int]:
    """Greedy continuation of prompt [1, P] by a fixed number of tokens, without the prompt."""
    ids = model.generate(
        prompt.to(model.device),
        attention_mask=torch.ones_like(prompt, device=model.device),
        do_sample=False,
        max_new_tokens=NUM_GREEDY_TOKENS,
        min_new_tokens=NUM_GREEDY_TOKENS,
    )
    return ids[0, prompt.shape[1] :].tolist()


def compare(dense: Any, converted: Any, tokenizer: Any, windows: Tensor, batch_size: int) -> dict[str, Any]:
    """Loss and greedy text of both models, and how the converted one routes, on windows [W, L] it was not
    calibrated on."""
    prompt = windows[:1, : min(32, windows.shape[1] // 2)]
    measured: dict[str, Any] = {"tokens": windows.numel(), "loss_dense": causal_loss(dense, windows, batch_size)}
    with record_routing(converted) as record:
        measured["loss_converted"] = causal_loss(converted, windows, batch_size)
    measured["loss_change"] = measured["loss_converted"] - measured["loss_dense"]
    dense_ids, converted_ids = greedy_ids(dense, prompt), greedy_ids(converted, prompt)
    measured["greedy_same"] = dense_ids == converted_ids
    measured["greedy_prompt"] = tokenizer.decode(prompt[0], skip_special_tokens=True)
    measured["greedy_dense"] = tokenizer.decode(dense_ids, skip_special_tokens=True)
    measured["greedy_converted"] = tokenizer.decode(converted_ids, skip_special_tokens=True)
    return measured | record.summary()
