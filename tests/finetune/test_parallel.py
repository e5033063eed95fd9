"""Two ranks over gloo against one process: data parallel, FSDP2, expert parallel, one pool for all ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import comparable, finish, start_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import run
from finetune.folder import as_yaml
from modeling_ecmoe import calibrate_thresholds, sparse_blocks

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.usefixtures("quick_end"),
]

CODE = {"configuration_ecmoe.py", "modeling_ecmoe.py", "block_ecmoe.py", "router_ecmoe.py", "routing_ecmoe.py"}
ONE_BATCH = {
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "per_device_eval_batch_size": 16,
    "learning_rate": 5e-4,
    "adam_epsilon": 1e-4,  # or the sign of gradients that are nothing but rounding errors decides
}
PADDED = {"packing": False, "too_long": "drop"}
# What two ranks run, and the process that they follow.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ddp": ({}, {"gradient_accumulation_steps": 2}),
    "fsdp": ({"distributed": {"fsdp_size": 2}}, {"gradient_accumulation_steps": 2}),
    "expert parallel": ({"distributed": {"fsdp_size": 2, "ep_size": 2}}, {"gradient_accumulation_steps": 2}),
    "global pool": ({"routing_pool": "global"}, {"routing_pool": "global", "per_device_train_batch_size": 8}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 4}),
    "streamed": ({"streaming": True}, {"streaming": True, "gradient_accumulation_steps": 2}),
    "padded stream": (PADDED | {"streaming": True}, PADDED | {"streaming": True, "gradient_accumulation_steps": 2}),
}


@pytest.fixture(scope="module")
def decided(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted model with routers that tell tokens apart, so that rounding errors move no token elsewhere."""
    folder = tmp_path_factory.mktemp("decided")
    model = AutoModelForCausalLM.from_pretrained(place / "ecmoe")
    tokenizer = AutoTokenizer.from_pretrained(place / "ecmoe")
    with torch.no_grad():
        for block in sparse_blocks(model).values():
            block.gate.weight.mul_(5)
    ids = tokenizer((place / "text.txt").read_text()[:6000], return_tensors="pt")["input_ids"]
    calibrate_thresholds(model, [{"input_ids": ids[:, : len(ids[0]) // 64 * 64].view(-1, 64)}])
    model.double().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def on_two_ranks(recipe: Any, tmp_path: Path) -> list[str]:
    """Runs the recipe on two ranks to its end; what they print."""
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe))
    codes = finish(start_ranks([str(tmp_path / "recipe.yaml")], tmp_path / "logs"))
    logs = [(tmp_path / "logs" / f"rank{rank}.log").read_text() for rank in range(2)]
    assert codes == [0, 0], logs[0][-3000:] + logs[1][-3000:]
    return logs


def follow(recipe_of: Callable, model: Path, tmp_path: Path, way: str, **fields: Any) -> dict[str, float]:
    """Largest differences of two ranks from one process: of losses, weights, thresholds, and reloaded logits."""
    ranks, alone = WAYS[way]
    fields = ONE_BATCH | fields | {"model": model}
    if "packing" in ranks:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": "word " * (1 + number % 13)}) + "\n" for number in range(90)))
        fields |= {"dataset": rows}
    two = recipe_of(**fields | ranks, output_dir=tmp_path / "two")
    logs = on_two_ranks(two, tmp_path)
    assert logs[0].count("causal loss after") == 1 and "causal loss after" not in logs[1]
    run(recipe_of(**fields | alone, output_dir=tmp_path / "one"))
    found, expected = comparable(tmp_path / "two"), comparable(tmp_path / "one")
    differences: dict[str, float] = {"loss": 0.0, "weights": 0.0, "thresholds": 0.0}
    assert len(found[1]) == len(expected[1]) > fields["max_steps"]
    for row, other in zip(found[1], expected[1], strict=True):
        for name in ("loss", "eval_loss"):
            assert (name in row) == (name in other)
            differences["loss"] = max(differences["loss"], abs(row.get(name, 0) - other.get(name, 0)))
    assert found[0].keys() == expected[0].keys()
    for name, tensor in found[0].items():
        what = "thresholds" if "threshold" in name else "weights"
        differences[what] = max(differences[what], (tensor - expected[0][name]).abs().max().item())
    assert found[2]["tokens"] == expected[2]["tokens"]
    assert {path.name for path in (tmp_path / "two").iterdir()} >= CODE
    ids = torch.randint(3, 300, (2, 50))
    with torch.no_grad():
        models = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("two", "one"))
        logits = [model(ids).logits for model in models]
    differences["logits"] = (logits[0] - logits[1]).abs().max().item()
    print(way, fields["max_steps"], "steps:", {name: f"{value:.1e}" for name, value in differences.items()})
    return differences


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_follow_one_process(recipe_of: Callable, decided: Path, tmp_path: Path, way: str) -> None:
    """Four steps, with an evaluation in between; the slow test goes on to thirty."""
    differences = follow(recipe_of, decided, tmp_path, way, max_steps=4, eval_strategy="steps", eval_steps=2)
    assert max(differences.values()) < 1e-4, differences


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp", "expert parallel", "global pool"])
def test_thirty_steps(recipe_of: Callable, decided: Path, tmp_path: Path, way: str) -> None:
    differences = follow(recipe_of, decided, tmp_path, way, max_steps=30, eval_strategy="steps", eval_steps=10)
    assert max(differences.values()) < 1e-4, differences


def test_a_pool_of_each_rank_is_told_apart(recipe_of: Callable, decided: Path, tmp_path: Path) -> None:
    """Negative control: one process with the whole batch is not what two ranks with a pool each follow."""
    WAYS["each its pool"] = ({}, {"per_device_train_batch_size": 8})
    differences = follow(recipe_of, decided, tmp_path, "each its pool", max_steps=4)
    assert differences["weights"] > 1e-3
