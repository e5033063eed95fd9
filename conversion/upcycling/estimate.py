"""What a conversion will cost, from its plan alone: parameters, FLOPs, disk, and memory and traffic of fine-tuning."""

from typing import Any

import torch

from ..checkpoints.source import is_unread
from .plan import Plan

# float32 weights, gradients and the two moments of AdamW; what `Trainer` keeps with bf16=True as well.
TRAINING_BYTES = 16
# Tokens that one GPU trains on per step in the traffic estimate.
TOKENS_PER_GPU = 16_384


def parameters(plan: Plan) -> dict[str, int]:
    """Parameters of the dense model, of the converted one, and those that the average token meets."""
    sizes = {t.name: t.numel for t in plan.tensors if ".mlp.gate.threshold" not in t.name}
    experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    total = sum(sizes.values())
    config: Any = plan.config
    idle = experts - round(experts * config.capacity_factor / config.num_experts)
    headers = plan.sources[0].headers
    dense = sum(
        torch.Size(header.shape).numel()
        for name, header in headers.items()
        if name not in plan.tied and not is_unread(name)
    )
    return {"dense": dense, "total": total, "active": total - idle, "experts": experts}


def estimate(plan: Plan, num_gpus: int) -> dict[str, Any]:
    """Figures of a dry run.

    flops_per_token: a forward pass, two per weight that a token is multiplied with; without attention scores, which
        grow with the context and are the same for both models.
    training_bytes_per_gpu: 16 bytes per parameter (float32 weights, gradients, AdamW moments) on each of `num_gpus`:
        all of them under DDP, an equal part under FSDP2, the experts' part divided under expert parallelism by itself
        (recipes/expert_parallel.yaml divides the rest by FSDP2 as well). The activations come on top.
    all_to_all_bytes_per_step: what one GPU sends to others under expert parallelism in a training step of 16,384
        tokens: rows to the experts and back, forward and backward, c * T rows of D values per sparse layer each.
    """
    config: Any = plan.config
    counted = parameters(plan)
    # The embedding is looked up, not multiplied; where it is the output layer as well, it is multiplied there.
    lookups = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    sparse_layers = config.mlp_layer_types.count("sparse")
    row_bytes = config.hidden_size * plan.dtype.itemsize
    rows = round(config.capacity_factor * TOKENS_PER_GPU)
    others = counted["total"] - counted["experts"]
    return {
        "init": plan.settings.init,
        "parameters": counted,
        "sparse_layers": sparse_layers,
        "flops_per_token": {
            "dense": 2 * (counted["dense"] - lookups),
            "converted": 2 * (counted["active"] - lookups),
        },
        "output_bytes": plan.nbytes,
        "num_gpus": num_gpus,
        "training_bytes_per_gpu": {
            "ddp": TRAINING_BYTES * counted["total"],
            "fsdp2": TRAINING_BYTES * -(-counted["total"] // num_gpus),
            "expert_parallel": TRAINING_BYTES * (others + -(-counted["experts"] // num_gpus)),
        },
        "all_to_all_bytes_per_step": 4 * sparse_layers * rows * row_bytes * (num_gpus - 1) // num_gpus,
        "tokens_per_gpu": TOKENS_PER_GPU,
    }
