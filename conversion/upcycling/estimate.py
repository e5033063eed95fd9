"""What a conversion will cost, from its plan alone: parameters, FLOPs, disk, memory and time; and its fine-tuning."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from .. import texts
from ..checkpoints.places import existing_parent
from ..checkpoints.source import PIECE_BYTES, is_unread
from ..machine import Machine, logits_bytes, seconds_of
from ..targets import ways_out
from .composites import left_out
from .notes import notes_on
from .plan import Plan
from .router import INPUT_TOKENS

# Bytes for each parameter that is trained, as the fine-tuner does it: weights, gradients and the moments of AdamW in
# float32; weights and gradients in bfloat16 with moments of 8 bits.
TRAINING_BYTES = {"float32": 16, "bfloat16": 6}
# A number that QLoRA holds in 4 bits (NF4), its share of a block's scale and of that one's, as the fine-tuner has it.
BYTES_IN_4BIT = 0.5 + (1 + 4 / 256) / 64
_DRAWN = 4  # so much longer experts take whose numbers are drawn
LORA_RANK = 16  # the fine-tuner's default
# Tokens that one GPU trains on per step in the traffic estimate.
TOKENS_PER_GPU = 16_384


def parameters(plan: Plan) -> dict[str, int]:
    """Parameters of the dense model, of the converted one, and those that the average token meets: of a dense model
    all, of a mixture fewer."""
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
    met = dense
    if plan.mixture is not None:
        met = total - round(experts * (1 - plan.sources[0].config_fields()["num_experts_per_tok"] / config.num_experts))
    return {"dense": dense, "dense_active": met, "total": total, "active": total - idle, "experts": experts}


def flops_per_token(plan: Plan) -> dict[str, int]:
    """Of a forward pass of the decoder, two per weight that a token is multiplied with; without attention scores, which
    grow with the context and are the same for both models."""
    config: Any = plan.config
    counted = parameters(plan)
    # The embedding is looked up, not multiplied; where it is the output layer as well, it is multiplied there.
    lookups = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    # What makes features of an image is not passed by tokens.
    of_tokens = (f"{plan.decoder}.", "lm_head.")
    aside = sum(tensor.numel for tensor in plan.tensors if not tensor.name.startswith(of_tokens)) + lookups
    return {"dense": 2 * (counted["dense_active"] - aside), "converted": 2 * (counted["active"] - aside)}


def estimate(
    plan: Plan,
    target: Path,
    machine: Machine,
    num_gpus: int | None,
    verify: bool,
    calibration_tokens: int | None = None,
) -> dict[str, Any]:
    """Figures of a dry run.

    experts_per_token: the mean, and the least and the most that a token can have.
    flops_per_token: of a forward pass, without attention scores.
    output_bytes, free_disk_bytes: of the checkpoint, and what is free where it will be.
    conversion: bytes of memory that writing takes and that running the models takes, what is free, and `seconds`.
    training_bytes: to fine-tune the dense and the converted model on one device, without activations: all weights in
        float32 or bfloat16; `lora`, adapters beside frozen weights as they are stored; or `qlora`, beside frozen linear
        layers and experts in 4 bits.
    num_gpus, training_bytes_per_gpu: full fine-tuning in float32 on several GPUs, those that are here or as many as
        asked for: all of it on each under DDP, an equal part under FSDP2, the experts' part divided under expert
        parallelism by itself (recipes/expert_parallel.yaml divides the rest by FSDP2 as well).
    all_to_all_bytes_per_step: what one GPU sends to others under expert parallelism in a training step of 16,384
        tokens: rows to the experts and back, forward and backward, c * T rows of D values per sparse layer each.
    ways_out: what --to can take of the result, and the class it becomes. left_out: the parts of a source that reads
        more than text that are not written, and their parameters. notes: what should be known before.
    """
    config: Any = plan.config
    counted = parameters(plan)
    sparse_layers = config.mlp_layer_types.count("sparse")
    row_bytes = config.hidden_size * plan.dtype.itemsize
    rows = round(config.capacity_factor * TOKENS_PER_GPU)
    others = counted["total"] - counted["experts"]
    gpus = num_gpus or (machine.count if machine.device != "cpu" else 1)
    size = TRAINING_BYTES["float32"]
    return {
        "init": plan.settings.init,
        "parameters": counted,
        "experts_per_token": {
            "mean": config.capacity_factor,
            "least": config.min_experts_per_token,
            "most": config.max_experts_per_token or config.num_experts,
        },
        "sparse_layers": sparse_layers,
        "num_layers": config.num_hidden_layers,
        "flops_per_token": flops_per_token(plan),
        "output_bytes": plan.nbytes,
        "free_disk_bytes": shutil.disk_usage(existing_parent(target)).free,
        "conversion": {
            "device": machine.name,
            "writing_bytes": _writing_bytes(plan),
            "running_bytes": _running_bytes(plan, verify),
            "free_bytes": machine.free,
            "seconds": seconds_to_convert(plan, machine, verify, calibration_tokens),
        },
        "training_bytes": _training_bytes(plan, counted),
        "num_gpus": gpus,
        "training_bytes_per_gpu": {
            "ddp": size * counted["total"],
            "fsdp2": size * -(-counted["total"] // gpus),
            "expert_parallel": size * (others + -(-counted["experts"] // gpus)),
        },
        "all_to_all_bytes_per_step": 4 * sparse_layers * rows * row_bytes * (gpus - 1) // gpus,
        "tokens_per_gpu": TOKENS_PER_GPU,
        "ways_out": ways_out(plan.model.config),
        "left_out": left_out(plan.sources[0]),
        "notes": notes_on(plan),
    }


def _writing_bytes(plan: Plan) -> int:
    """The dense tensors that one stack of experts is made of, a matrix of it in float32 for noise, and one piece."""
    itemsize = plan.dtype.itemsize
    sources = max(sum(math.prod(shape) for shape in tensor.sources.values()) for tensor in plan.tensors)
    matrix = max(math.prod(t.shape[1:]) for t in plan.tensors if ".mlp.experts." in t.name)
    return sources * itemsize * len(plan.sources) + 2 * 4 * matrix + PIECE_BYTES


def _running_bytes(plan: Plan, verify: bool) -> int:
    """The models that are run, and the logits by which they are held against each other."""
    config: Any = plan.config
    dense = plan.sources[0].bytes_to_load if verify or plan.settings.router != "normal" else 0
    return dense + (plan.nbytes + logits_bytes(config)) * verify


def seconds_to_convert(plan: Plan, machine: Machine, verify: bool, calibration_tokens: int | None = None) -> float:
    """About how long it takes: bytes over what a disk takes, passes of the models over measured products."""
    config: Any = plan.config
    flops = flops_per_token(plan)
    passes = INPUT_TOKENS * flops["dense"] * (plan.settings.router != "normal")
    if verify:
        gone_through = 1 if config.bounds_experts_per_token else 2  # times that calibration reads its tokens
        passes += (calibration_tokens or texts.CALIBRATION_TOKENS) * gone_through * flops["converted"]
        passes += texts.VERIFICATION_TOKENS * (flops["dense"] + flops["converted"])
    nbytes = plan.nbytes * (_DRAWN if plan.settings.init in ("noise", "drop") else 1)
    return seconds_of(nbytes, passes, machine, plan.dtype, config.hidden_size, config.moe_intermediate_size)


def _training_bytes(plan: Plan, counted: dict[str, int]) -> dict[str, dict[str, int]]:
    sizes = {"dense": counted["dense"], "converted": counted["total"]}
    found = {dtype: {name: size * n for name, n in sizes.items()} for dtype, size in TRAINING_BYTES.items()}
    adapters = _lora_parameters(plan)
    stored, trained = plan.dtype.itemsize, TRAINING_BYTES["float32"]
    lora = {name: stored * sizes[name] + trained * adapters[name] for name in sizes}
    saved = {name: round((stored - BYTES_IN_4BIT) * small) for name, small in _in_4bit(plan).items()}
    return found | {"lora": lora, "qlora": {name: lora[name] - saved[name] for name in sizes}}


def _in_4bit(plan: Plan) -> dict[str, int]:
    """How many numbers bitsandbytes takes: of linear layers but the head, and of our stacked experts; the stacks of
    other mixtures it leaves as they are."""
    headers = plan.sources[0].headers
    dense = [
        math.prod(header.shape)
        for name, header in headers.items()
        if name.startswith(f"{plan.layers}.") and len(header.shape) == 2
        if ".experts." not in name and not name.endswith(".gate.weight")
    ]
    modules = [module for name, module in plan.model.named_modules() if "lm_head" not in name]
    linear = [module.weight.numel() for module in modules if isinstance(module, torch.nn.Linear)]
    stacks = [tensor.numel for tensor in plan.tensors if ".mlp.experts." in tensor.name and len(tensor.shape) == 3]
    return {"dense": sum(dense), "converted": sum(linear + stacks)}


def _lora_parameters(plan: Plan) -> dict[str, int]:
    """What the fine-tuner trains with lora={}: of the dense model adapters on every linear layer; of the converted one
    on attention and on each expert's matrices, and the router whole."""

    def adapter(shape: tuple[int, ...]) -> int:
        return LORA_RANK * (shape[-1] + shape[-2]) * math.prod(shape[:-2])

    layers = f"{plan.layers}."

    def attention(name: str) -> bool:
        marks = (".self_attn.", ".self_attention.", ".attention.", ".attn.")
        return name.startswith(layers) and any(mark in name for mark in marks)

    headers = plan.sources[0].headers
    dense = {n: h.shape for n, h in headers.items() if n.startswith(layers) and len(h.shape) == 2}
    converted = 0
    for tensor in plan.tensors:
        if ".mlp.gate.weight" in tensor.name:
            converted += tensor.numel
        elif (attention(tensor.name) and len(tensor.shape) == 2) or (
            ".mlp.experts." in tensor.name and len(tensor.shape) == 3
        ):
            converted += adapter(tensor.shape)
    return {"dense": sum(map(adapter, dense.values())), "converted": converted}
