"""A mixture whose tokens chose, fine-tuned by the recipe that is made for it, in every way that the recipe names."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_tokenizer
from families import fill_zeros
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from ecmoe.conversion import convert
from ecmoe.finetune import load_recipe, run
from ecmoe.finetune.recipe import make_recipe
from ecmoe.finetune.train import describe
from modeling_ecmoe import sparse_blocks

ROOT = Path(__file__).resolve().parents[2]
BY_EXPERTS, BY_TOKENS = (
    [shlex.split(line) for line in re.findall(r"^#   [^:]+:\s+(.+)$", part, re.MULTILINE)]
    for part in (ROOT / "recipes" / "moe.yaml").read_text(encoding="utf-8").split("and of a conversion with --routing")
)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral with a balance loss, converted so that its experts choose, and so that its tokens do."""
    folder = tmp_path_factory.mktemp("mixtures")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, vocab_size=300, num_hidden_layers=2, num_local_experts=4, router_aux_loss_coef=0.02)
    )
    fill_zeros(model)
    model.save_pretrained(folder / "source")
    tiny_tokenizer().save_pretrained(folder / "source")
    convert(str(folder / "source"), str(folder / "experts"), verify=False)
    convert(str(folder / "source"), str(folder / "tokens"), verify=False, routing="token_choice")
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n} " * 9}]}
        for n in range(60)
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_the_recipe_names_four_other_ways() -> None:
    assert (len(BY_EXPERTS), len(BY_TOKENS)) == (2, 2)


def test_what_a_token_meets_of_a_plain_mixture(mixtures: Path) -> None:
    """Two of four experts, before and after conversion."""
    recipe = make_recipe({"model": "m", "output_dir": "out", "dataset": "rows.jsonl"})
    models = [AutoModelForCausalLM.from_pretrained(mixtures / name) for name in ("source", "experts", "tokens")]
    active = [describe(model, recipe)["active_parameters"] for model in models]
    assert active == [models[0].num_parameters() - 2 * 2 * 3 * 32 * 48] * 3


WAYS = [("experts", []), *(("experts", way) for way in BY_EXPERTS), *(("tokens", way) for way in BY_TOKENS)]


@pytest.mark.parametrize(("model", "way"), WAYS, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_every_way_trains(mixtures: Path, tmp_path: Path, model: str, way: list[str], quick_end: None) -> None:
    """The loss falls, the router moves, the load is logged, and what a way promises of it is so."""
    own = [f"model={mixtures / model}", f"output_dir={tmp_path / 'out'}", f"dataset={mixtures / 'chat.jsonl'}"]
    small = ["use_cpu=true", "learning_rate=3e-3", "router_learning_rate=3e-3", "warmup_steps=0"]
    small += ["max_steps=6", "save_strategy=no", "eval_strategy=no", "chat_template_path=chatml", "max_length=128"]
    results = run(load_recipe("moe", [*own, *small, *way]))
    assert results["loss_after"] < results["loss_before"] - 0.05
    before = AutoModelForCausalLM.from_pretrained(mixtures / model)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for field, _, value in (change.partition("=") for change in way):
        assert getattr(after.config, field) == (float(value) if value[0].isdigit() else value)
    for old, new in zip(sparse_blocks(before).values(), sparse_blocks(after).values(), strict=True):
        assert not torch.equal(old.gate.weight, new.gate.weight)
        nudged = "token_choice_bias_update_rate=0.001" in way
        assert bool(new.gate.threshold.any()) == (model == "experts" or nudged)
        if nudged:  # six steps of 0.001 up or down
            assert 0 < new.gate.threshold.abs().max() <= 0.006 + 1e-7
    if "max_experts_per_token=2" in way or model == "tokens":
        assert results["routing"]["experts_per_token"] == 2


def test_that_the_balance_loss_is_off_is_said(mixtures: Path) -> None:
    """Where there was one, and where it is off."""
    said = "router_aux_loss_coef=0.02 of the source is switched off"
    for model, is_off in (("experts", True), ("tokens", False)):
        notes = json.loads((mixtures / model / "ecmoe_conversion.json").read_text())["notes"]
        assert any(said in note for note in notes) == is_off
        config = json.loads((mixtures / model / "config.json").read_text())
        assert config["router_aux_loss_coef"] == (0.0 if is_off else 0.02)
