"""Router rows and thresholds of every sparse layer of a plan, by tensor name."""

from typing import Any

import torch
from torch import Tensor

from ecmoe.progress import progress_bar
from modeling_ecmoe.configuration_ecmoe import DenseFFN

from .plan import Plan, generator_of
from .router import INPUT_TOKENS, centroid_rows, ffn_inputs, norm_inputs, rescaled_rows, thresholds_of

# Sampling alone moves a load by a tenth then; more tokens would take longer than writing the shards.
ESTIMATE_TOKENS = 1_024
ESTIMATED = "no text: an estimate from the router's weights"  # what a config says of where its thresholds come from


def sparse_layers(plan: Plan) -> list[int]:
    config: Any = plan.config
    return [layer for layer, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]


def measured_router(
    plan: Plan, dense: Any, tokenizer: Any, windows: Tensor, prompts: list[list[str]] | None
) -> dict[str, Tensor]:
    """The router rows [R, D] that the dense model's FFN inputs suggest, R experts or replicas of granular ones, and
    the thresholds [E] at which every expert takes its share of the same inputs."""
    config: Any = plan.config
    layers, ffn = sparse_layers(plan), config.dense_ffn
    granularity = plan.settings.num_shards
    inputs = ffn_inputs(dense, list(windows[: max(1, INPUT_TOKENS // windows.shape[1])].split(4)), layers, ffn)
    means = _prompt_means(dense, tokenizer, prompts, layers, ffn) if prompts else {}
    measured = {}
    for layer in progress_bar(layers, desc="Router rows", unit="layer"):
        name, std = f"{_layer(plan, layer)}.mlp.gate.", config.initializer_range
        if prompts:
            rows_RD = rescaled_rows(means[layer], inputs[layer], std)
        else:
            generator = generator_of(plan.settings.seed, f"{name}centroid")
            rows_RD = centroid_rows(inputs[layer], config.num_experts // granularity, std, generator)
        measured[f"{name}weight"] = rows_RD
        rows_ED = rows_RD.repeat_interleave(granularity, dim=0).to(plan.dtype)
        measured[f"{name}threshold"] = one_per_replica(thresholds_of(rows_ED, inputs[layer], config), granularity)
    return measured


def _prompt_means(
    dense: Any, tokenizer: Any, prompts: list[list[str]], layers: list[int], ffn: DenseFFN
) -> dict[int, Tensor]:
    """[R, D] for each layer: the mean FFN input over all tokens of each expert's prompts."""
    rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for texts in prompts:
        batches = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
        for layer, inputs in ffn_inputs(dense, batches, layers, ffn).items():
            rows[layer].append(inputs.float().mean(0))
    return {layer: torch.stack(means) for layer, means in rows.items()}


def one_per_replica(threshold_E: Tensor, granularity: int) -> Tensor:
    """The shards of one replica have one threshold, as they have one router row; what is measured of each differs by
    rounding, which would send a token to some of them alone."""
    return threshold_E.view(-1, granularity)[:, :1].expand(-1, granularity).flatten()


def estimated_thresholds(plan: Plan, measured: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Thresholds without a pass of any model: those measured with the router, or what Gaussian tokens after the
    layer's norm would need. They count as one optimiser step, so that training soon replaces them."""
    config = plan.config
    rows_of = {tensor.name: tensor for tensor in plan.tensors if tensor.name.endswith(".mlp.gate.weight")}
    found = {}
    for layer in sparse_layers(plan):
        name = f"{_layer(plan, layer)}.mlp.gate."
        if measured is not None:
            threshold = measured[f"{name}threshold"]
        else:
            (rows_ED,) = rows_of[f"{name}weight"].pieces()
            generator = generator_of(plan.settings.seed, f"{name}estimate")
            inputs_TD = norm_inputs(*_scale_and_shift(plan, layer), ESTIMATE_TOKENS, generator)
            threshold = one_per_replica(thresholds_of(rows_ED, inputs_TD, config), plan.settings.num_shards)
        found[f"{name}threshold"] = threshold.float()
        found[f"{name}threshold_updates"] = torch.ones((), dtype=torch.int64, device="cpu")
    return found


def _layer(plan: Plan, layer: int) -> str:
    return f"{plan.layers}.{layer}"


def _scale_and_shift(plan: Plan, layer: int) -> tuple[Tensor, Tensor]:
    """By what the layer's norm multiplies unit inputs, [D], and what it adds.

    Without a norm before the FFN its input is the sum of the embedding and of the normalised outputs of every layer
    before; the sum of independent ones, for want of better.
    """
    source = plan.sources[0]
    config: Any = plan.config

    def read(name: str, otherwise: float) -> Tensor:
        if name in source.headers:
            return source.read(name).float().cpu()
        return torch.full((config.hidden_size,), float(otherwise), device="cpu")

    ffn = config.dense_ffn
    norm = config.ffn_norm(layer)
    if norm is not None:
        prefix = f"{_layer(plan, layer)}.{norm}"
        return read(f"{prefix}.weight", 1) + ffn.norm_adds_one, read(f"{prefix}.bias", 0)
    embedding = next(name for name in sorted(source.headers) if "embed_tokens" in name)
    variance_D = source.read(embedding, 0, ESTIMATE_TOKENS).float().cpu().square().mean(0)
    after = [
        f"{_layer(plan, number)}.post_{part}_layernorm.weight" for number in range(layer + 1) for part in _BRANCHES
    ]
    for name in after[:-1]:  # this layer's FFN comes later
        variance_D = variance_D + read(name, 1).square()
    return variance_D.sqrt(), torch.zeros_like(variance_D)


_BRANCHES = ("attention", "feedforward")
