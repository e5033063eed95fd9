"""What a rank of test_plans.py runs: a checkpoint loaded under a parallel plan against the same one whole."""

from pathlib import Path
from typing import Any

import torch
from conftest import random_tokens
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import modeling_ecmoe

PLANS: dict[str, dict[str, Any]] = {
    "tensor": {"tp_size": 2},
    "expert": {"fsdp_size": 2, "ep_size": 2},
    "tensor and expert": {"tp_size": 2, "ep_size": 2},
    "pipeline": {"pp_size": 2},
}
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def compare(folders: list[Path], plan: str) -> dict[str, dict[str, Any]]:
    """For each folder: how far logits, loss and the routers' gradients are from the whole model's, relative to the
    largest; whether the greedy text is the same; and how many of the experts' numbers this rank holds."""
    found = {}
    for folder in folders:
        whole = AutoModelForCausalLM.from_pretrained(folder)
        spread = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**PLANS[plan]))
        expected, got = results(whole, trains=plan != "pipeline"), results(spread, trains=plan != "pipeline")
        found[folder.name] = {
            "apart": {name: apart(got[name], expected[name]) for name in expected if name != "greedy"},
            "greedy_same": torch.equal(got["greedy"], expected["greedy"]),
            "held": expert_numbers(spread) / expert_numbers(whole),
        }
    return found


def pipeline_refusal(folder: Path) -> str:
    """What a model says that Transformers' pipeline would compute wrongly."""
    try:
        AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(pp_size=2))
    except ValueError as error:
        return str(error)
    return "nothing"


def results(model: Any, trains: bool) -> dict[str, torch.Tensor]:
    ids = random_tokens(2, 14)
    with torch.no_grad():
        found = {"logits": model.eval()(ids).logits, "greedy": model.generate(ids, **GREEDY)}
    if trains:
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        found["loss"] = loss.detach()
        for name, block in modeling_ecmoe.sparse_blocks(model).items():
            learned = {"gate.weight": block.gate.weight, **dict(block.experts.act_fn.named_parameters())}
            for part, parameter in learned.items():
                grad = parameter.grad
                found[f"{name}.{part}"] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def expert_numbers(model: Any) -> int:
    named = model.named_parameters()
    parameters = [parameter for name, parameter in named if ".experts." in name and ".act_fn." not in name]
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)
