"""What is wrong with a recipe by itself is said before torch and TRL are loaded."""

from pathlib import Path

import pytest
from first_answers import answered_without_torch

from ecmoe.finetune import RecipeError, recipe
from ecmoe.finetune.arguments import check_arguments, declared_fields, read_recipe
from ecmoe.finetune.cli import main

GIVEN = ["model={tmp}", "output_dir={tmp}/out", "dataset=me/rows"]
WRONG: dict[str, tuple[list[str], str]] = {
    "no recipe": (["fulll"], "recipe=fulll does not exist; give a YAML file, or one of"),
    "no field": (["full", *GIVEN, "lrr=3"], "lrr=3 is no field of a recipe; did you mean "),
    "short name": (["full", *GIVEN, "lr=3"], "lr=3 is no field of a recipe; did you mean learning_rate?"),
    "experts": (["full", *GIVEN, "num_experts=3"], "the number of experts is fixed at conversion"),
    "no equals": (["full", "packing"], "must be written as field=value"),
    "no model": (["full", "model={tmp}/no", *GIVEN[1:]], "model={tmp}/no does not exist; give a checkpoint folder"),
    "missing": (["full", *GIVEN[:1]], "output_dir is missing from the recipe"),
    "no data": (["full", *GIVEN[:2], "dataset={tmp}/no.jsonl"], "dataset={tmp}/no.jsonl does not exist"),
}


# What a shell hands over of a mapping without quotes, or YAML reads of one without spaces; and the whole remedy.
UNQUOTED: dict[str, tuple[list[str], str]] = {
    "no space": (["lora={r:8}"], "lora has no field 'r:8'; {}'lora={{r: 8}}'"),
    "one without": (["lora={r:8, lora_alpha: 16}"], "lora has no field 'r:8'; {}'lora={{r: 8, lora_alpha: 16}}'"),
    "braces of bash": (
        ["lora=r:8", "lora=lora_alpha:16"],
        "lora=r:8 lora=lora_alpha:16 is no mapping; {}'lora={{r: 8, lora_alpha: 16}}'",
    ),
    "words": (
        ["lora={r:", "8,", "lora_alpha:", "16}", "max_steps=3"],
        "override 'lora={{r:': the value is not valid YAML; {}'lora={{r: 8, lora_alpha: 16}}'",
    ),
    "kwargs": (
        ["model_init_kwargs=attn_implementation:sdpa"],
        "model_init_kwargs=attn_implementation:sdpa is no mapping; {}'model_init_kwargs={{attn_implementation: sdpa}}'",
    ),
}


@pytest.mark.parametrize("words", UNQUOTED)
def test_a_mapping_without_quotes(words: str, tmp_path: Path) -> None:
    given, message = UNQUOTED[words]
    with pytest.raises(RecipeError) as refusal:
        check_arguments("full", [*(word.format(tmp=tmp_path) for word in GIVEN), *given])
    assert str(refusal.value) == message.format("quote it, with a space after each colon: ")


def test_a_mapping_with_quotes() -> None:
    given = ["lora={r: 8, lora_alpha: 16}", 'distributed={"fsdp_size":2}', "logging_dir=a:b"]
    held = read_recipe("full", given)
    assert held["lora"] == {"r": 8, "lora_alpha": 16} and held["distributed"] == {"fsdp_size": 2}
    assert held["logging_dir"] == "a:b"


def test_a_mistyped_argument_does_not_wait_for_torch(tmp_path: Path) -> None:
    commands = [[word.format(tmp=tmp_path) for word in words] for words, _ in WRONG.values()]
    lines = answered_without_torch("finetune", commands)
    for line, (_, message) in zip(lines, WRONG.values(), strict=True):
        assert line.startswith("ecmoe-finetune: error: ") and message.format(tmp=tmp_path) in line


def test_the_names_are_those_of_the_classes() -> None:
    assert declared_fields() == recipe._OWN | recipe._TRAINING | recipe._ROUTING


def test_a_good_recipe_passes(tmp_path: Path) -> None:
    check_arguments("chat", [word.format(tmp=tmp_path) for word in GIVEN])


def test_a_name_that_the_hub_does_not_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stop:
        main(["full", "model=qwen3-8xx", f"output_dir={tmp_path}/out", "dataset=me/rows"])
    assert stop.value.code == 2
    said = "model=qwen3-8xx is no local folder and could not be fetched from the Hub: it is not in the cache, and HF"
    assert said in capsys.readouterr().err
