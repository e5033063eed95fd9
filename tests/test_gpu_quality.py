"""`python -m benchmarks gpu-quality` at sizes that show that it runs: the pack, the parent, the arms in turns."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_text
from safetensors.torch import load_file, save_file

from benchmarks import gpu_quality
from benchmarks.quality import data

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A little English in place of every domain, and short windows."""
    documents = write_text(tmp_path / "text.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    monkeypatch.setattr(gpu_quality, "read_domain", lambda domain, _: data.split(documents))
    monkeypatch.setattr(gpu_quality, "files", list)
    for name, value in {"LENGTH": 32, "CHUNK": 3, "HELD_OUT": 4, "CALIBRATION": 2, "PARENT_SHARE": 0.01}.items():
        monkeypatch.setattr(gpu_quality, name, value)
    gpu_quality.main(["--make-pack", str(tmp_path / "pack" / "tokens.safetensors"), "--data", str(tmp_path)])
    return tmp_path / "pack" / "tokens.safetensors"


def test_every_arm_goes_on_from_the_parent_with_the_same_tokens(pack: Path, tmp_path: Path) -> None:
    gpu_quality.main(["--tiny", "--minutes", "0.3", "--pack", str(pack), "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "gpu_quality.json").read_text())
    assert found["machine"]["versions"]["torch"] and found["parent"]["loss"] < 8.4  # of 4,096 tokens
    curves = {name: arm["curve"] for name, arm in found["arms"].items()}
    assert curves.keys() == set(gpu_quality.ARM_NAMES)
    for name, curve in curves.items():
        assert [point["tokens"] for point in curve] == [point["tokens"] for point in curves["dense"]]
        assert curve[0]["loss"] == pytest.approx(found["parent"]["loss"], abs=1e-4), name  # exact at step 0
        assert curve[-1]["loss"] < curve[0]["loss"] and curve[-1]["steps"] >= 3
        assert curve[-1]["losses"].keys() == set(data.DOMAINS)
    assert found["arms"]["tcq-copy2"]["parameters"] > found["arms"]["dense"]["parameters"]


def test_the_pack_holds_whole_windows_of_ids(pack: Path) -> None:
    tensors = load_file(pack)
    assert tensors.keys() == {f"{domain} {part}" for domain in data.DOMAINS for part in ("train", "held_out")}
    assert all(each.dtype == torch.uint16 and each.shape[1] == 32 for each in tensors.values())
    ids = tensors["prose train"].to(torch.int64)
    assert 0 < ids.max() < gpu_quality.VOCABULARY and (ids == 0).any()  # documents end


def test_refusals(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(pack.read_bytes()[:-1])
    for arguments, line in (
        (["--pack", str(tmp_path / "none")], "is no file; make it with --make-pack"),
        (["--make-pack", str(tmp_path / "x")], "make-pack wants --data"),
        (["--pack", str(pack)], "no GPU is here"),
        (["--tiny", "--pack", str(other)], "is none of --make-pack"),
        (["--tiny", "--pack", str(cut)], "or is cut off; make it again"),
        (["--tiny", "--pack", str(tmp_path / "text.txt")], "is none of --make-pack"),
    ):
        with pytest.raises(SystemExit) as stop:
            gpu_quality.main([*arguments, "--output", str(tmp_path / "out")])
        assert stop.value.code == 2 and line in capsys.readouterr().err
    monkeypatch.setattr(gpu_quality, "files", lambda: ["prose.parquet"])
    with pytest.raises(SystemExit) as stop:
        gpu_quality.main(["--make-pack", str(tmp_path / "big"), "--data", str(tmp_path)])
    assert stop.value.code == 2 and "lacks prose.parquet; name the folder" in capsys.readouterr().err
    monkeypatch.setattr(gpu_quality, "files", list)
    monkeypatch.setattr(gpu_quality, "MOST_BYTES", 10)
    with pytest.raises(SystemExit) as stop:
        gpu_quality.main(["--make-pack", str(tmp_path / "big"), "--data", str(tmp_path)])
    assert stop.value.code == 2 and "more than 10" in capsys.readouterr().err and not (tmp_path / "big").exists()


def test_a_bare_image_is_enough() -> None:
    """torch and Transformers, and nothing else that this project asks for: the module and its upcycling."""
    missing = ["accelerate", "datasets", "matplotlib", "pandas", "peft", "psutil", "pyarrow", "trl"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({missing}))
import benchmarks.gpu, benchmarks.gpu_quality, ecmoe
from transformers import LlamaForCausalLM
dense = LlamaForCausalLM(benchmarks.gpu_quality.TINY.config())
print(type(ecmoe.upcycle(dense, init="copy", capacity_factor=2.0)).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "EcMoeLlamaForCausalLM", done.stderr[-2000:]
