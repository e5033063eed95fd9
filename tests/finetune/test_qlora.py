"""`quantization: 4bit` in a recipe: what is refused, what it takes, and a run to its end."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import ecmoe.finetune.loading
from ecmoe.finetune import RecipeError, dry_run, run
from ecmoe.finetune.loading import load_config
from ecmoe.finetune.memory import empty_model, kept_bytes
from ecmoe.finetune.recipe import make_recipe
from ecmoe.finetune.train import make_trainer
from modeling_ecmoe.quantized_ecmoe import Stacked4bit

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

NOTHING = {"model": "m", "output_dir": "o", "dataset": "d"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization": "8bit", "lora": {}}, "quantization=8bit is unknown; choose 4bit"),
        ({"quantization": "4bit"}, r"quantization=4bit is for adapters \(lora={}\)"),
        ({"quantization": "4bit", "lora": {}, "distributed": {"fsdp_size": 2}}, "nor divided among devices"),
        (
            {
                "quantization": "4bit",
                "lora": {},
                "model_init_kwargs": {"quantization_config": {"load_in_8bit": True}},
            },
            "leave one of them out",
        ),
    ],
)
def test_refused_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(NOTHING | fields)


def test_refused_before_weights_are_read(
    recipe_of: Callable, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is missing, several processes, and a model that is quantised already; of a dense model too."""
    with monkeypatch.context() as patch:
        patch.setattr(ecmoe.finetune.loading.importlib.util, "find_spec", lambda name: None)
        for model in ("ecmoe", "dense"):
            with pytest.raises(RecipeError, match=r"needs bitsandbytes.*pip install bitsandbytes"):
                load_config(recipe_of(quantization="4bit", lora={}, model=place / model))
    with monkeypatch.context() as patch:
        patch.setattr(ecmoe.finetune.loading, "PartialState", lambda: SimpleNamespace(num_processes=2))
        with pytest.raises(RecipeError, match="is for one process, and 2 were started"):
            load_config(recipe_of(quantization="4bit", lora={}))
    config = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(place / "ecmoe", quantization_config=config).save_pretrained(tmp_path / "4")
    with pytest.raises(RecipeError, match="is quantised already; leave quantization out"):
        load_config(recipe_of(quantization="4bit", lora={}, model=tmp_path / "4"))


@pytest.mark.parametrize("model", ["ecmoe", "dense"])
def test_bytes_that_are_kept(recipe_of: Callable, place: Path, model: str) -> None:
    """Counted before weights are read: what the loaded model takes, and 12 bytes more of what is trained."""
    recipe = recipe_of(quantization="4bit", lora={"r": 2}, model=place / model)
    counted = kept_bytes(recipe, empty_model(load_config(recipe)))["adapters"]
    adapted = make_trainer(recipe).model
    parameters = dict(adapted.named_parameters())
    held = sum(p.numel() * p.element_size() for p in parameters.values() if not isinstance(p, Stacked4bit))
    held += sum(p.nbytes for p in parameters.values() if isinstance(p, Stacked4bit))
    for p in parameters.values():  # the scales of linear layers
        state = getattr(p, "quant_state", None)
        held += 0 if state is None else state.absmax.nbytes + state.state2.absmax.nbytes
    trained = [p for p in parameters.values() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert counted == pytest.approx(held + 12 * sum(p.numel() for p in trained), rel=0.03)
    whole = kept_bytes(recipe_of(lora={"r": 2}, model=place / model), empty_model(load_config(recipe)))["adapters"]
    assert counted < whole


def test_a_run(recipe_of: Callable, tmp_path: Path, quick_end: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss falls, adapters come back on a model in 4 bits, and the merged model is what they were trained on."""
    fields = {"quantization": "4bit", "lora": {"r": 4}, "merge": True, "learning_rate": 1e-2, "max_steps": 8}
    measured = dry_run(recipe_of(**fields))
    assert measured["loss"] > 0 and measured["precision"]["needed"]["adapters"] > 0
    said = capsys.readouterr()
    assert "linear layers and experts in 4 bits, adapters and router in float32" in said.out + said.err
    results = run(recipe_of(**fields))
    assert results["loss_after"] < results["loss_before"] - 0.05
    recipe = recipe_of(**fields)
    base = ecmoe.finetune.loading.load_model(recipe)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert not hasattr(merged.config, "quantization_config")
    assert all(type(p) is torch.nn.Parameter for p in merged.parameters())
    ids = torch.arange(3, 67).view(2, 32)
    with torch.no_grad():
        expected, found = (one(ids).logits.softmax(-1) for one in (adapted, merged))
    assert (expected - found).abs().sum(-1).median() < 1e-3
