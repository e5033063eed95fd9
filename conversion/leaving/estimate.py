"""What it takes to write a checkpoint as a plain one: disk, memory, time."""

import math
import shutil
from pathlib import Path
from typing import Any

from .. import texts
from ..checkpoints.places import existing_parent
from ..machine import Machine, logits_bytes, seconds_of
from .plain import PlainPlan

# For each number of a router's constant direction, which has as many as a token's hidden state; 4,096 at least.
_TOKENS_PER_NUMBER = 8
_LEAST_TOKENS = 4_096


def tokens_to_fit(config: Any) -> int:
    """What a source of this config is measured on, unless the user says otherwise."""
    return min(texts.CALIBRATION_TOKENS, max(_LEAST_TOKENS, _TOKENS_PER_NUMBER * config.hidden_size))


def estimate(plan: PlainPlan, target: Path, machine: Machine, num_tokens: int, verify: bool) -> dict[str, Any]:
    """Bytes of the output and what is free where it will be, bytes of memory that the models take that are run and what
    is free for them, and about how many seconds it takes.

    num_tokens: what is measured on, where the form needs it and experts are not alike, which the weights alone show.
    """
    num_tokens *= plan.form.is_scaled or plan.form.is_shifted
    return {
        "output_bytes": plan.nbytes,
        "free_disk_bytes": shutil.disk_usage(existing_parent(target)).free,
        "running_bytes": (plan.source.bytes_to_load + plan.nbytes + logits_bytes(plan.source_config)) * verify,
        "free_bytes": machine.free,
        "device": machine.name,
        "seconds": seconds_to_export(plan, machine, num_tokens, verify),
    }


def seconds_to_export(plan: PlainPlan, machine: Machine, num_tokens: int, verify: bool) -> float:
    """About how long it takes: bytes to write, and passes of the models; in that of `fit` tokens meet further experts,
    by its rows and where these were moved by those too."""
    counted, config = plan.parameters, plan.source_config
    experts = sum(math.prod(h.shape) for name, h in plan.source.headers.items() if ".mlp.experts." in name)
    active = counted["source"] - experts * (1 - config.capacity_factor / config.num_experts)
    flops = 0.0
    if verify:
        further = experts * plan.form.top_k / config.num_experts * (1 + plan.form.is_shifted)
        flops += 2 * (active + further) * num_tokens
        flops += 2 * (active + counted["active"]) * texts.VERIFICATION_TOKENS
    return seconds_of(plan.nbytes, flops, machine, plan.source.dtype, config.hidden_size, config.moe_intermediate_size)
