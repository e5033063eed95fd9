"""The plan for the machine at hand: what fits, what it takes, how long, and the line before long work."""

import copy
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from checkpoints import write_dense
from packaging.version import Version
from transformers import AutoModelForCausalLM

import ecmoe
from ecmoe import conversion
from ecmoe.conversion import ConversionError, convert, export
from ecmoe.conversion.cli import main
from ecmoe.conversion.machine import Machine, flops_per_second, machine_at_hand
from ecmoe.conversion.upcycling import estimate
from ecmoe.finetune.adapters import add_lora
from ecmoe.finetune.memory import _BYTES_IN_4BIT, TRAINING_BYTES, kept_bytes
from ecmoe.finetune.recipe import OLDEST_TRANSFORMERS, recipe_of


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_dense(folder, "Llama")
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    folder = tmp_path_factory.mktemp("sparse") / "out"
    convert(str(dense), str(folder), num_experts=4, verify=False)
    return folder


def plan_of(source: Path, **options: Any) -> dict[str, Any]:
    return convert(str(source), "nowhere", dry_run=True, **options)


def test_the_plan_is_for_this_machine(dense: Path) -> None:
    plan = plan_of(dense, num_experts=4, init="copy", capacity_factor=2)
    assert plan["experts_per_token"] == {"mean": 2, "least": 1, "most": 4}
    assert plan["num_gpus"] == max(1, torch.cuda.device_count())
    conversion_ = plan["conversion"]
    dense_bytes = 4 * plan["parameters"]["dense"]
    logits = 4 * 4 * (4 * 128) * 300  # of both models and their softmax, float32, 4 windows of the model's context
    assert conversion_["running_bytes"] == dense_bytes + plan["output_bytes"] + logits
    assert plan_of(dense, verify=False)["conversion"]["running_bytes"] == 0
    assert 0 < conversion_["writing_bytes"] < 2**27
    assert conversion_["free_bytes"] > 2**20 and plan["free_disk_bytes"] == pytest.approx(
        shutil.disk_usage(Path.cwd()).free, rel=0.2
    )


@pytest.mark.skipif(
    Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS), reason="recipes want a newer Transformers"
)
@pytest.mark.parametrize("init", ["shared", "split"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPTNeoX"])
def test_fine_tuning_takes_what_the_fine_tuner_counts(tmp_path: Path, family: str, init: str) -> None:
    write_dense(tmp_path / "dense", family)
    plan = plan_of(tmp_path / "dense", num_experts=4, init=init, capacity_factor=2)
    assert estimate.TRAINING_BYTES == TRAINING_BYTES
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    converted = ecmoe.upcycle(model, num_experts=4, init=init, capacity_factor=2)
    assert estimate.BYTES_IN_4BIT == _BYTES_IN_4BIT
    qlora = recipe_of(model="m", output_dir="o", dataset="d", lora={}, quantization="4bit")
    for name, held in (("converted", converted), ("dense", model)):
        counted = kept_bytes(qlora, copy.deepcopy(held))["adapters"]
        assert plan["training_bytes"]["qlora"][name] == pytest.approx(counted, abs=1), name
        parameters = held.num_parameters()
        for dtype, size in TRAINING_BYTES.items():
            assert plan["training_bytes"][dtype][name] == size * parameters
        adapted = add_lora(held, {})
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        assert plan["training_bytes"]["lora"][name] == 4 * parameters + 16 * trained, name


def test_several_gpus_are_those_that_are_here(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        conversion.upcycling.convert, "machine_at_hand", lambda _: Machine("cuda", "a GPU", 4, 80 * 10**9)
    )
    plan = plan_of(dense, num_experts=4)
    assert (plan["num_gpus"], plan["conversion"]["device"], plan["conversion"]["free_bytes"]) == (
        4,
        "a GPU",
        80 * 10**9,
    )
    assert plan_of(dense, num_experts=4, num_gpus=2)["num_gpus"] == 2


def test_a_device_that_is_not_there() -> None:
    assert machine_at_hand("cpu").device == "cpu"
    with pytest.raises(ConversionError, match=r"device=warp cannot be used here .*; leave it out, or name cpu"):
        machine_at_hand("warp")


def test_the_rate_is_measured() -> None:
    """Larger products take longer in proportion, within what a busy machine allows."""
    assert 1e7 < flops_per_second("cpu", torch.float32, 256, 512) < 1e14


def test_what_does_not_fit_is_a_line_of_the_plan(
    tmp_path: Path, dense: Path, sparse: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan is made to see it; the real command refuses."""
    for room in (conversion.upcycling.convert, conversion.leaving.export):
        monkeypatch.setattr(room, "machine_at_hand", lambda _: Machine("cpu", "this CPU", 1, 1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    for command in ([str(dense)], ["--to=token-choice", str(sparse)]):
        main([*command, str(tmp_path / "out"), "--dry-run"])
        said = capsys.readouterr()
        disk, memory = said.err.splitlines()
        assert disk.startswith("ecmoe-convert: warning: the output does not fit on the disk of the destination; free")
        assert "do not fit into the memory; say --no-verify, or --device auto" in memory
        assert "Nothing was written." in said.out and "time on this CPU" in said.out


@pytest.mark.parametrize("verify", [True, False])
def test_long_work_says_first_how_long(
    tmp_path: Path,
    dense: Path,
    sparse: Path,
    verify: bool,
    few_tokens: None,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(conversion.machine, "_BYTES_PER_SECOND", 1000)
    options = [] if verify else ["--no-verify"]
    main([str(dense), str(tmp_path / "out"), f"--text={text}", *options])
    line, *warning = capsys.readouterr().err.splitlines()
    assert all("of their share of held-out text" in said for said in warning)  # of few tokens
    what = ", then calibrates and verifies on this CPU" * verify
    assert re.match(rf"ecmoe-convert: writes [0-9]\S* [kM]B{what}: about .* minutes$", line)
    if verify:
        main(["--to=token-choice", str(sparse), str(tmp_path / "plain"), f"--text={text}"])
        first = capsys.readouterr().err.splitlines()[0]
        assert re.match(r"ecmoe-convert: writes [0-9]\S* [kM]B and runs both models on this CPU: about ", first)


def test_a_dry_run_of_an_export_refuses_what_it_would(tmp_path: Path, sparse: Path, text: Path) -> None:
    options: dict[str, Any] = {"source": str(sparse), "destination": str(tmp_path / "out"), "dry_run": True}
    empty = tmp_path / "empty.txt"
    empty.write_text(" ")
    for wrong, message in (
        ({"text": str(empty)}, "is empty"),
        ({"device": "warp"}, "device=warp cannot be used"),
        ({"verify": False}, "the scales that stand for the combine weights are measured on text"),
    ):
        with pytest.raises(ConversionError, match=message):
            export(**(options | wrong))
    plan = export(**options, text=str(text))
    assert plan["seconds"] > 0 and plan["running_bytes"] > plan["output_bytes"]
    assert not (tmp_path / "out").exists()
