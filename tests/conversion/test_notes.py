"""What is said of a conversion before it is done: a router that cannot learn, and ways out that are closed."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_dense
from first_answers import answered_without_torch
from transformers import AutoModelForCausalLM

import ecmoe
from ecmoe.conversion import ConversionError, convert, export
from ecmoe.conversion.arguments import _OF_SETTINGS, _ONLY_IN, _ONLY_OUT, WAYS_OUT, check_arguments
from ecmoe.conversion.cli import main
from ecmoe.conversion.targets import DESTINATIONS, ways_out
from modeling_ecmoe import sparse_blocks

NO_GRADIENT = "so the router has no gradient and learns nothing; give capacity_factor=2"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_dense(folder, "Llama")
    return folder


LEARNS: dict[str, tuple[dict[str, Any], bool]] = {
    "shared": ({}, True),
    "blend": ({"init": "blend"}, True),
    "copy": ({"init": "copy"}, False),
    "copy, more than one": ({"init": "copy", "capacity_factor": 1.5}, True),
    "noise": ({"init": "noise", "ratio": 0.3}, False),
    "drop": ({"init": "drop"}, False),
    "split": ({"init": "split"}, False),
    "granular": ({"init": "granular"}, True),
    "granular, uncut": ({"init": "granular", "granularity": 1}, False),
    "one expert": ({"init": "copy", "num_experts": 1}, False),
}


@pytest.mark.parametrize("case", LEARNS)
def test_a_router_without_a_gradient_is_said(dense: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    """In memory and in the plan, and it is so: the gradients are measured, once the experts differ."""
    options, learns = LEARNS[case]
    options = {"num_experts": 4} | options
    with caplog.at_level(logging.WARNING, "ecmoe"):
        model = ecmoe.upcycle(AutoModelForCausalLM.from_pretrained(dense), **options).train()
    assert ("learns nothing" in caplog.text) == (not learns)
    with torch.no_grad():
        for block in sparse_blocks(model).values():
            block.experts.down_proj.normal_(std=0.1)
    ids = torch.arange(3, 67).view(2, 32)  # a multiple of the experts: each token has exactly its share
    model(input_ids=ids, labels=ids).loss.backward()
    largest = max(block.gate.weight.grad.abs().max().item() for block in sparse_blocks(model).values())
    assert largest > 1e-4 if learns else largest < 1e-7
    plan = convert(str(dense), "nowhere", dry_run=True, **options)
    assert any("learns nothing" in note for note in plan["notes"]) == (not learns)


def test_the_command_says_it_in_one_line(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(dense), str(tmp_path / "out"), "--init=copy", "--no-verify"]
    for arguments in (command, [*command[:1], str(tmp_path / "other"), *command[2:], "--dry-run"]):
        main(arguments)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and NO_GRADIENT in said[0]
        assert said[0].startswith("ecmoe-convert: warning: init=copy at capacity_factor=1: ")


LAYERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "all": ("Llama", {}, {}, {"token-choice": "Mixtral", "glm4-moe": "GLM-4-MoE"}),
    "last half": ("Llama", {}, {"layers": "last-half"}, {"token-choice": "Qwen2-MoE", "glm4-moe": "GLM-4-MoE"}),
    "every second": ("Mistral", {}, {"layers": "every-second"}, {"token-choice": "Qwen2-MoE", "glm4-moe": "GLM-4-MoE"}),
    "the first": ("Qwen2", {}, {"layers": "0"}, {"token-choice": "Qwen2-MoE"}),
    "Qwen3": ("Qwen3", {}, {"layers": [0]}, {"token-choice": "Qwen3-MoE"}),
    "softmax": ("Llama", {}, {"layers": "last-half", "init": "copy"}, {"token-choice": "Qwen2-MoE"}),
    "wide heads": ("Llama", {"head_dim": 16}, {"layers": [0], "init": "copy"}, {}),
    "a family that stays": ("Gemma2", {}, {"layers": [0]}, {}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_the_plan_says_how_the_result_can_leave(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    family, fields, options, ways = LAYERS[case]
    write_dense(tmp_path / "dense", family, **fields)
    plan = convert(str(tmp_path / "dense"), str(tmp_path / "out"), dry_run=True, **options)
    assert plan["ways_out"] == ways
    closed = "layers=[0] leaves dense layers, with which the model cannot be written as Mixtral (--to token-choice)"
    assert (closed in caplog.text) == (case == "wide heads")
    if case == "softmax":
        main([str(tmp_path / "dense"), str(tmp_path / "out"), "--dry-run", "--layers=last-half", "--init=copy"])
        assert "Other tools can have it as Qwen2-MoE (--to token-choice)." in capsys.readouterr().out


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("init", ["shared", "copy", "blend"])
@pytest.mark.parametrize(("family", "fields"), [("Llama", {}), ("Mistral", {"sliding_window": 8}), ("Mistral", {})])
def test_dense_layers_leave_as_qwen2_moe(
    tmp_path: Path, family: str, fields: dict[str, Any], init: str, text: Path, make_tokens: Any
) -> None:
    """Before training whatever the routes are: the plain model is the dense one, biases and windows included."""
    model = write_dense(tmp_path / "dense", family, num_hidden_layers=3, **fields)
    options = {"num_experts": 4, "init": init, "layers": "every-second", "capacity_factor": 2, "text": str(text)}
    convert(str(tmp_path / "dense"), str(tmp_path / "sparse"), **options)
    record = export(str(tmp_path / "sparse"), str(tmp_path / "plain"), text=str(text))
    assert record["architecture"] == "Qwen2MoeForCausalLM"
    plain, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(loading.values())
    assert plain.config.mlp_only_layers == [0, 2] and not plain.config.qkv_bias
    ids = make_tokens(3, 40)
    with torch.no_grad():
        assert (plain.eval()(ids).logits - model(ids).logits).abs().max() < 5e-5


# Arguments, before there is a model.


def test_the_options_of_each_direction_are_those_of_its_function() -> None:
    import inspect

    inwards, outwards = (set(inspect.signature(function).parameters) for function in (convert, export))
    assert inwards - outwards == _ONLY_IN | {"tokenizer"}
    assert outwards - inwards == _ONLY_OUT | {"to"}
    assert set(_OF_SETTINGS) <= inwards
    assert tuple(DESTINATIONS) == WAYS_OUT
    assert ways_out(type("Config", (), {"model_type": "ecmoe_gemma2"})()) == {}


WRONG = [
    ["{tmp}/no", "{tmp}/out"],
    ["{dense}", "{dense}"],
    ["{dense}/config.json", "{tmp}/out"],
    ["{dense}", "{tmp}/out", "--init=clone"],
    ["{dense}", "{tmp}/out", "--num-experts=0"],
    ["{dense}", "{tmp}/out", "--capacity-factor=9"],
    ["{dense}", "{tmp}/out", "--init=granular", "--capacity-factor=1"],
    ["{dense}", "{tmp}/out", "--layers=banana"],
    ["{dense}", "{tmp}/out", "--text={tmp}/no.txt"],
    ["{dense}", "{tmp}/out", "--max-shard-size=5"],
    ["{dense}", "{tmp}/out", "--num-gpus=0"],
    ["{dense}", "{tmp}/out", "--to=mixtral"],
    ["{dense}", "{tmp}/out", "--to=token-choice", "--init=copy"],
    ["{dense}", "{tmp}/out", "--to=token-choice", "--num-experts-per-tok=0"],
    ["{dense}", "{tmp}/out", "--init=mix", "--mix-with", "{tmp}/no"],
]


def test_a_mistyped_argument_does_not_wait_for_torch(tmp_path: Path, dense: Path) -> None:
    commands = [[word.format(tmp=tmp_path, dense=dense) for word in command] for command in WRONG]
    lines = answered_without_torch("conversion", commands)
    assert all(line.startswith("ecmoe-convert: error: ") for line in lines)


def test_functions_check_the_same(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(ConversionError, match="init=granular needs at least its granularity, 4, for a token takes"):
        ecmoe.upcycle(AutoModelForCausalLM.from_pretrained(dense), init="granular", granularity=4, capacity_factor=2)
    with pytest.raises(ConversionError, match="needs at least its granularity, 2"):
        convert(str(dense), str(tmp_path / "out"), init="granular", capacity_factor=1.5, dry_run=True)
    with pytest.raises(ConversionError, match="num_experts_per_tok=0 must be at least 1"):
        export(str(dense), str(tmp_path / "out"), num_experts_per_tok=0)
    check_arguments({"source": str(dense), "destination": str(tmp_path / "out"), "init": "mix", "mix_with": [dense]})


def test_one_copy_of_each_shard_is_said(dense: Path, tmp_path: Path) -> None:
    """Every token has all of them, whatever its scores are."""
    options: dict[str, Any] = {"init": "granular", "granularity": 2, "dry_run": True}
    (note,) = convert(str(dense), str(tmp_path / "out"), num_experts=2, **options)["notes"]
    assert note.startswith(
        "num_experts=2 are one copy of each of the 2 shards: there is nothing to choose among; give 4"
    )
    assert convert(str(dense), str(tmp_path / "out"), num_experts=4, **options)["notes"] == []
