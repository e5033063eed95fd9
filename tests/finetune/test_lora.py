"""LoRA on the stacked experts: what trains, what the adapter's file holds, and what comes back from it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from checkpoints import DATA, all_tensors
from runs import QUICK_END, assert_same_run, prepared
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl

import ecmoe.finetune.train
from ecmoe.finetune import RecipeError, run
from ecmoe.finetune.adapters import add_lora, trained_parameters
from ecmoe.finetune.data import Collator
from ecmoe.finetune.recipe import make_recipe
from modeling_ecmoe import sparse_blocks

GSM8K = DATA / "gsm8k" / "train.jsonl"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
NOTHING = {"model": "", "output_dir": "", "dataset": ""}
FEW = {"max_steps": 4, "max_eval_sequences": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def learned(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The default adapters of stories260K after 20 steps on GSM8K: recipe, results, the trained model, what it said."""
    if not GSM8K.is_file():
        pytest.skip("GSM8K is not beside the repository (ECMOE_TEST_DATA)")
    folder = tmp_path_factory.mktemp("lora")
    rows = [line for line in GSM8K.read_text(encoding="utf-8").splitlines() if len(line) < 330][:200]
    (folder / "gsm8k.jsonl").write_text("\n".join(rows), encoding="utf-8")
    recipe = make_recipe(
        {
            "model": str(stories),
            "output_dir": str(folder / "out"),
            "dataset": str(folder / "gsm8k.jsonl"),
            "prompt_column": "question",
            "completion_column": "answer",
            "max_length": 160,
            "too_long": "drop",
            "validation_fraction": 0.1,
            "max_eval_sequences": 12,
            "per_device_train_batch_size": 4,
            "max_steps": 20,
            "learning_rate": 2e-3,
            "lora": {},
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
    )
    trainers: list[Any] = []
    tables: list[Any] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        trainers.append(make_trainer(*args, **kwargs))
        return trainers[-1]

    make_trainer = ecmoe.finetune.train.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ecmoe.finetune.train.make_trainer", keep)
        patch.setattr("ecmoe.finetune.train.Console", lambda: SimpleNamespace(print=tables.append))
        for name, value in QUICK_END.items():
            patch.setattr(name, value)
        results = run(recipe)
    out = Path(recipe.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(out)
    _, held_out = prepared(recipe, tokenizer, 512)
    batch = Collator(0)(list(held_out)[:12])
    model = trainers[0].model.eval()
    return SimpleNamespace(base=stories, out=out, results=results, model=model, batch=batch, tables=tables)


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Of the tokens that are no padding."""
    return model.eval()(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


def thresholds_of(model: Any) -> list[Tensor]:
    return [block.gate.threshold.clone() for block in sparse_blocks(model).values()]


def test_learns(learned: SimpleNamespace) -> None:
    """The held-out causal loss of answers falls by nats, and is the loss of the model that was trained."""
    assert learned.results["loss_after"] < learned.results["loss_before"] - 2
    with torch.no_grad():
        found = learned.model(**learned.batch, use_cache=False).loss.item()
    assert found == pytest.approx(learned.results["loss_after"], abs=0.05)  # the mean of batches of 8 and 4


@pytest.mark.parametrize("way", ["PeftModel", "AutoModel"])
def test_loads_again(learned: SimpleNamespace, way: str) -> None:
    if way == "PeftModel":
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(learned.base), learned.out)
    else:
        model = AutoModelForCausalLM.from_pretrained(learned.out)
    assert torch.equal(logits_of(model, learned.batch), logits_of(learned.model, learned.batch))
    base = AutoModelForCausalLM.from_pretrained(learned.base)
    assert (logits_of(base, learned.batch) - logits_of(learned.model, learned.batch)).abs().max() > 1


def test_merges(learned: SimpleNamespace, tmp_path: Path) -> None:
    """Merged, it is a plain checkpoint with the same losses, logits and thresholds, which loads without PEFT."""
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        base = AutoModelForCausalLM.from_pretrained(learned.base)
        model = peft.PeftModel.from_pretrained(base, learned.out).to(dtype)
        expected = logits_of(model, learned.batch)
        merged = model.merge_and_unload()
        found = logits_of(merged, learned.batch)
        assert (found - expected).abs().max() / expected.abs().max() < tolerance
        losses = [logits.log_softmax(-1) for logits in (found, expected)]
        print(dtype, "largest difference of a log-probability", (losses[0] - losses[1]).abs().max().item())
        assert (losses[0].exp() - losses[1].exp()).abs().max() < 1e-5
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "modules_to_save" in name]
    merged.save_pretrained(tmp_path / "merged")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits_of(loaded, learned.batch), logits_of(merged, learned.batch))
    assert all(map(torch.equal, thresholds_of(loaded), thresholds_of(learned.model)))


def test_the_file_holds_the_thresholds(learned: SimpleNamespace) -> None:
    """Of every layer, as trained and calibrated, with the router's weight; and no frozen weight."""
    tensors = all_tensors(learned.out)
    base = thresholds_of(AutoModelForCausalLM.from_pretrained(learned.base))
    for layer, (threshold, old) in enumerate(zip(thresholds_of(learned.model), base, strict=True)):
        prefix = f"base_model.model.model.layers.{layer}.mlp.gate."
        assert torch.equal(tensors[prefix + "threshold"], threshold)
        assert tensors[prefix + "threshold_updates"] > 0
        assert tensors[prefix + "weight"].shape == (8, 64)
        assert not torch.equal(threshold, old)
    others = [name for name in tensors if "lora_" not in name and ".mlp.gate." not in name]
    assert others == []
    (config,) = learned.model.peft_config.values()
    assert json.loads((learned.out / "adapter_config.json").read_text())["target_parameters"] == EXPERTS
    assert config.modules_to_save == ["gate"]


def test_what_trains(learned: SimpleNamespace) -> None:
    """Adapters of attention and routed experts and the router, as the printed table says; all else keeps its bits."""
    rank, layers, experts, hidden, intermediate = 16, 5, 8, 64, 172
    expected = {
        "attention": layers * rank * (2 * (hidden + hidden) + 2 * (hidden + hidden // 2)),
        "router": layers * experts * hidden,
        "routed experts": layers * experts * rank * ((hidden + 2 * intermediate) + (intermediate + hidden)),
    }
    counts = trained_parameters(learned.model)
    assert {part: trained for part, (trained, _) in counts.items() if trained} == expected
    assert learned.results["trained_parameters"] == sum(expected.values())
    (table,) = learned.tables
    columns = [list(column.cells) for column in table.columns]
    for part, trained, total in zip(*columns, strict=True):
        assert trained == f"{expected.get(part, 0):,}" and total == f"{counts[part][1]:,}"
    assert set(columns[0]) == set(counts) > set(expected)
    plain = AutoModelForCausalLM.from_pretrained(learned.base)
    assert {part: total for part, (_, total) in counts.items()} == {
        part: total for part, (_, total) in trained_parameters(plain).items()
    }
    for name in ("parameters", "active_parameters"):  # adapters and the router's copy are no part of the model
        assert learned.results[name] == ecmoe.finetune.train.describe(plain, make_recipe(NOTHING))[name]
    old = plain.state_dict()
    new = {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): parameter
        for name, parameter in learned.model.named_parameters()
        if "lora_" not in name and "modules_to_save" not in name
    }
    new = {name.replace("original_module.", ""): parameter for name, parameter in new.items()}
    assert len(new) == 5 * 12 + 2
    assert all(torch.equal(parameter, old[name]) for name, parameter in new.items())
    moved = {name: p for name, p in learned.model.named_parameters() if "lora_B" in name}
    assert len(moved) == layers * (4 + 2) and all(p.abs().sum() > 0 for p in moved.values())


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"lora_dropout": 0.1}, "lora.lora_dropout=0.1 is not possible on stacked experts"),
    "dora": ({"use_dora": True}, "set use_dora=False, or leave the experts out of lora.target_parameters"),
    "bias": ({"bias": "all"}, "lora.bias='all' is not possible on stacked experts"),
    "transposed": ({"fan_in_fan_out": True}, "lora.fan_in_fan_out=True is not possible on stacked experts"),
    "dropout on bare names": ({"lora_dropout": 0.1, "target_parameters": ["gate_up_proj"]}, "is not possible on"),
    "as a module": ({"target_modules": ["q_proj", "gate_up_proj"]}, "names the stacked experts, which are no linear"),
    "as a module's pattern": (
        {"target_modules": r".*\.experts\..*"},
        "target_parameters names ['mlp.experts.gate_up_pr",
    ),
    "excluded as a module": ({"exclude_modules": ["experts"]}, "lora.exclude_modules=['experts'] names the stacked"),
    "all linear layers": ({"target_modules": "all-linear"}, "leaves the routed experts frozen"),
    "a bias of the adapter": ({"lora_bias": True}, "lora.lora_bias=True is not possible on stacked experts"),
    "first values": ({"init_lora_weights": "pissa"}, "lora.init_lora_weights='pissa' is not possible on stacked"),
    "some layers": ({"layers_to_transform": [0]}, "lora.layers_to_transform=[0] is not possible on stacked experts"),
    "another method": ({"peft_type": "IA3"}, "lora.peft_type='IA3' is another method than LoRA; leave it out"),
    "the router": ({"target_parameters": [*EXPERTS, "mlp.gate.weight"]}, "names the router, which is trained whole"),
    "unknown": ({"lora_alfa": 8}, "lora_alfa=8 is no field of lora (peft.LoraConfig); did you mean lora_alpha?"),
    "nothing": ({"target_parameters": ["mlp.experts.w1"]}, "names 'mlp.experts.w1', which is no parameter"),
    "one of two": ({"target_parameters": [EXPERTS[0], "down"]}, "names 'down', which is no parameter of the model"),
    "no list": ({"target_parameters": EXPERTS[0]}, "lora.target_parameters='mlp.experts.gate_up_proj' must be a list"),
    "no list to save": ({"modules_to_save": "lm_head"}, "lora.modules_to_save='lm_head' must be a list of names"),
    "no module": ({"target_modules": ["wq"]}, "PEFT refuses it: No modules were targeted for adaptation"),
    "rank 0": ({"r": 0}, "PEFT refuses it: `r` should be a positive integer"),
    "rank of letters": ({"r": "many"}, "PEFT refuses it"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(recipe_of: Callable, what: str) -> None:
    """In one line, before the folder is made."""
    lora, line = REFUSALS[what]
    recipe = recipe_of(lora=lora)
    with pytest.raises(RecipeError) as refusal:
        run(recipe)
    assert line in str(refusal.value) and "\n" not in str(refusal.value)
    assert not Path(recipe.output_dir).exists()


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": []},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "lora_dropout": 0.1},
        {"target_parameters": EXPERTS[:1]},
    ],
    ids=str,
)
def test_the_router_is_always_saved(place: Path, lora: dict[str, Any]) -> None:
    """Whatever a recipe names: without the gate, an adapter would load with the thresholds of its base."""
    model = add_lora(AutoModelForCausalLM.from_pretrained(place / "ecmoe"), lora)
    saved = peft.get_peft_model_state_dict(model)
    assert sum(name.endswith(".gate.threshold") for name in saved) == 2
    counts = trained_parameters(model)
    assert counts["router"][0] > 0
    assert (counts.get("head", (0, 0))[0] > 0) == ("lm_head" in lora.get("modules_to_save", []))
    assert (counts["routed experts"][0] > 0) == (not lora.get("target_modules"))


@pytest.mark.usefixtures("quick_end")
def test_a_dense_model(place: Path, recipe_of: Callable) -> None:
    """Adapters on every linear layer but the head; the result loads and has the loss that was reported."""
    recipe = recipe_of(model=place / "dense", lora={}, max_steps=6, learning_rate=1e-2, max_eval_sequences=4)
    results = run(recipe)
    assert results["loss_after"] < results["loss_before"] - 0.02
    assert "routing" not in results
    adapters = {name.split(".")[-3] for name in all_tensors(Path(recipe.output_dir))}
    names = {name.split(".")[-2] for name in all_tensors(Path(recipe.output_dir)) if "lora_" in name}
    assert names == {"lora_A", "lora_B"}
    assert adapters == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    _, held_out = prepared(recipe, AutoTokenizer.from_pretrained(recipe.output_dir), 300)
    model = AutoModelForCausalLM.from_pretrained(recipe.output_dir).eval()
    with torch.no_grad():
        found = model(**Collator(0)(list(held_out)), use_cache=False).loss.item()
    assert found == pytest.approx(results["loss_after"], abs=1e-5)


@pytest.mark.usefixtures("quick_end")
def test_a_frozen_router(recipe_of: Callable) -> None:
    """router_learning_rate=0 under LoRA: its weight keeps its bits, its thresholds move."""
    recipe = recipe_of(**FEW, lora={"r": 4}, router_learning_rate=0)
    run(recipe)
    tensors = all_tensors(Path(recipe.output_dir))
    base = AutoModelForCausalLM.from_pretrained(recipe.model)
    for layer, block in enumerate(sparse_blocks(base).values()):
        prefix = f"base_model.model.model.layers.{layer}.mlp.gate."
        assert torch.equal(tensors[prefix + "weight"], block.gate.weight)
        assert not torch.equal(tensors[prefix + "threshold"], block.gate.threshold)


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("quick_end")
def test_stopped_and_run_again(recipe_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after step 3 and run again from checkpoint-2: the bits of a run of 4 steps that was not stopped."""
    fields = {**FEW, "lora": {"r": 4}, "save_strategy": "steps", "save_steps": 2}
    whole, stopped = recipe_of(**fields, output_dir=tmp_path / "whole"), recipe_of(**fields)
    run(whole)
    torch.manual_seed(1)  # the adapters begin as the recipe's seed says, whatever was drawn before
    out = Path(stopped.output_dir)
    make_trainer = ecmoe.finetune.train.make_trainer

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        trainer = make_trainer(*args, **kwargs)
        trainer.add_callback(StopAfter(3))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr("ecmoe.finetune.train.make_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(stopped)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (out / "adapter_model.safetensors").exists()
    run(stopped)
    assert_same_run(out, tmp_path / "whole")
    first, last = (all_tensors(out / name) for name in ("checkpoint-2", "checkpoint-4"))
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_the_default_adapters_of_every_family(family: str, make_model: Callable, make_tokens: Callable) -> None:
    """On every linear layer of attention and both stacks of every expert, whatever the family calls them; they learn,
    and the merged model computes what the adapted one does."""
    model = add_lora(make_model(family), {"r": 2})
    ids = make_tokens(2, 9)
    before = model(ids).logits
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    attention = {name.partition(".lora_")[0] for name in names if "attn" in name or ".attention." in name}
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(".base_layer") and "mlp" not in name
    }
    assert attention == {name.removesuffix(".base_layer") for name in linear} and len(attention) >= 2 * 2, linear
    assert sum(".experts." in name for name in names) == 2 * 2 * 2  # A and B of two stacks in two layers
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    for _ in range(2):  # B starts at zero, so A learns from the second step on
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted = model.eval()(ids).logits
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, adapted, atol=1e-4, rtol=1e-4)
