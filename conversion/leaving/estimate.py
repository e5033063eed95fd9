"""What it takes to write a checkpoint as a plain one: disk, memory, time."""

import math
import shutil
from pathlib import Path
from typing import Any

from .. import texts
from ..checkpoints.places import existing_parent
from ..machine import Machine, logits_bytes, seconds_of
from .plain import PlainPlan


def estimate(plan: PlainPlan, target: Path, machine: Machine, verify: bool) -> dict[str, Any]:
    """Bytes of the output and what is free where it will be, bytes of memory that the models take that are run and what
    is free for them, and about how many seconds it takes."""
    return {
        "output_bytes": plan.nbytes,
        "free_disk_bytes": shutil.disk_usage(existing_parent(target)).free,
        "running_bytes": (plan.source.bytes_to_load + plan.nbytes + logits_bytes(plan.source_config)) * verify,
        "free_bytes": machine.free,
        "device": machine.name,
        "seconds": seconds_to_export(plan, machine, verify),
    }


def seconds_to_export(plan: PlainPlan, machine: Machine, verify: bool) -> float:
    """About how long it takes: bytes to write, and passes of the models, of which `fit` needs up to two."""
    counted, config = plan.parameters, plan.source_config
    experts = sum(math.prod(h.shape) for name, h in plan.source.headers.items() if ".mlp.experts." in name)
    active = counted["source"] - experts * (1 - config.capacity_factor / config.num_experts)
    flops = 0.0
    if verify:
        flops += 2 * active * texts.CALIBRATION_TOKENS * (plan.form.is_scaled + plan.form.is_shifted)
        flops += 2 * (active + counted["active"]) * texts.VERIFICATION_TOKENS
    return seconds_of(plan.nbytes, flops, machine, plan.source.dtype, config.hidden_size, config.moe_intermediate_size)
