"""What a user can get wrong: one line that names it, exit code 2, nothing written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import write_dense, write_text

from conversion.cli import main


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_dense(folder, "Llama", max_shard_size="30KB")
    return folder


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def lose_tensor(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop("model.layers.0.mlp.up_proj.weight")
    path.write_text(json.dumps(index))


def point_outside(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    path.write_text(json.dumps(index))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "unsupported family": (lambda folder: edit_config(folder, model_type="gpt2"), "model_type=gpt2 is not supported"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    "wrong width": (lambda folder: edit_config(folder, intermediate_size=64), "config.json promises"),
    "biases": (lambda folder: edit_config(folder, mlp_bias=True), "mlp_bias=True is not supported"),
    "quantised": (lambda folder: edit_config(folder, quantization_config={"quant_method": "x"}), "is quantised"),
    "missing shard": (lambda folder: first_shard(folder).unlink(), "is missing"),
    "truncated shard": (lambda folder: os.truncate(first_shard(folder), 2000), "damaged or truncated"),
    "empty shard": (lambda folder: os.truncate(first_shard(folder), 0), "damaged or truncated"),
    "missing tensor": (lose_tensor, "lacks the tensor model.layers.0.mlp.up_proj.weight"),
    "index points outside": (point_outside, "is no safetensors file name"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "has no tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_source(tmp_path: Path, dense: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copytree(dense, tmp_path / "source")
    act, message = DAMAGE[damage]
    act(source)
    refuse([str(source), str(tmp_path / "out")], message, tmp_path, capsys, left=["source"])


OPTIONS = {
    "--num-experts=0": "num_experts=0 must be at least 1",
    "--num-experts=-2": "num_experts=-2 must be at least 1",
    "--capacity-factor=0": "capacity_factor=0.0 must be above 0",
    "--capacity-factor=9": "at most num_experts=8",
    "--init=clone": "init=clone is unknown; choose one of blend, shared, copy, noise",
    "--max-shard-size=5": "max_shard_size=5 is no size",
    "--text=missing.txt": "text=missing.txt cannot be read",
    "--device=warp": "device=warp",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_wrong_option(tmp_path: Path, dense: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    refuse([str(dense), str(tmp_path / "out"), option], OPTIONS[option], tmp_path, capsys, left=[])


def test_places(tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where from and where to."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").touch()
    refuse([str(dense), str(tmp_path / "taken")], "exists; name a folder", tmp_path, capsys, left=["taken"])
    refuse([str(tmp_path / "no"), str(tmp_path / "out")], "does not exist", tmp_path, capsys, left=["taken"])
    refuse([str(tmp_path / "taken"), str(tmp_path / "out")], "no safetensors", tmp_path, capsys, left=["taken"])
    (tmp_path / "taken" / "pytorch_model.bin").write_bytes(b"")
    refuse([str(tmp_path / "taken"), str(tmp_path / "out")], "pickled", tmp_path, capsys, left=["taken"])
    (tmp_path / "taken" / "file").touch()
    refuse([str(dense), str(tmp_path / "taken" / "file" / "x")], "cannot be made", tmp_path, capsys, left=["taken"])
    empty = tmp_path / "taken" / "empty.txt"
    empty.write_text(" ")
    refuse([str(dense), str(tmp_path / "out"), f"--text={empty}"], "is empty", tmp_path, capsys, left=["taken"])
    short = tmp_path / "taken" / "short.txt"
    short.write_text("Too little.")
    refuse([str(dense), str(tmp_path / "out"), f"--text={short}"], "need at least", tmp_path, capsys, left=["taken"])


def test_a_converted_checkpoint_is_not_converted_again(
    tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.txt")
    main([str(dense), str(tmp_path / "once"), "--num-experts=2", f"--text={text}"])
    assert "Greedy text: the same." in capsys.readouterr().out
    refuse(
        [str(tmp_path / "once"), str(tmp_path / "twice")],
        "is an expert-choice checkpoint already",
        tmp_path,
        capsys,
        left=["once", "text.txt"],
    )


def refuse(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str], left: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ecmoe-convert: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in lines[0]
    assert sorted(path.name for path in folder.iterdir()) == left
