"""Recalibration in place: thresholds alone change, whole or not at all, and what was there is kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import all_tensors, contents, write_dense, write_text
from filelock import FileLock
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import ecmoe
from ecmoe.analysis import AnalysisError, calibrate
from ecmoe.analysis.cli import main
from ecmoe.analysis.recalibration import load_warning
from ecmoe.conversion import convert
from modeling_ecmoe import calibrate_thresholds, record_routing, sparse_blocks

RECORD = "ecmoe_calibration.json"
KINDS = {"one file": {}, "many shards": {"max_shard_size": "20KB"}}


def make(folder: Path, **options: Any) -> Path:
    """A converted checkpoint in <folder>/ecmoe whose thresholds are estimates, and a text in <folder>/text.txt."""
    fields = {"dtype": options.pop("dtype")} if "dtype" in options else {}
    model = write_dense(folder / "dense", "Llama", num_hidden_layers=3)
    if fields:
        model.to(fields["dtype"]).save_pretrained(folder / "dense")
    write_text(folder / "text.txt", documents=30)
    defaults = {"num_experts": 4, "init": "noise", "ratio": 0.3, "verify": False}
    convert(str(folder / "dense"), str(folder / "ecmoe"), **defaults | options)
    return folder / "ecmoe"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    make(folder)
    return folder


@pytest.fixture
def checkpoint(place: Path, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    for name, content in contents(place / "ecmoe").items():
        (tmp_path / "ecmoe" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ecmoe" / name).write_bytes(content)
    return tmp_path / "ecmoe"


def is_threshold(name: str) -> bool:
    return ".mlp.gate.threshold" in name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_alone_change(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = make(tmp_path, dtype=dtype, **KINDS[kind])
    before, files = all_tensors(folder), contents(folder)
    headers = {path: safe_open(path, "pt").metadata() for path in folder.glob("*.safetensors")}
    assert (
        len(headers) == 1 or len({path for path in headers if any(map(is_threshold, safe_open(path, "pt").keys()))}) > 1
    )
    found = ecmoe.calibrate(str(folder), text=str(tmp_path / "text.txt"), tokens=3_000)
    after = all_tensors(folder)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]) != is_threshold(name), name
        assert not name.endswith("threshold") or tensor.dtype == torch.float32
    for path, metadata in headers.items():
        assert safe_open(path, "pt").metadata() == metadata == {"format": "pt"}
    changed = {name for name, content in contents(folder).items() if files.get(name) != content}
    assert {name for name in changed if not name.endswith(".safetensors")} == {RECORD, "config.json", "README.md"}
    assert found["tokens"] == 3_000 and found["held_out_tokens"] == 750
    assert found["before"]["load_max"] > found["after"]["load_max"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, block in sparse_blocks(loaded).items():
        assert torch.equal(block.gate.threshold, after[f"{name}.gate.threshold"])
        assert block.gate.threshold_updates == 10


def test_the_record_the_config_and_the_card_say_so(checkpoint: Path, place: Path) -> None:
    """Each calibration with what it replaced, so that the first thresholds can be had again."""
    before = all_tensors(checkpoint)
    fields = json.loads((checkpoint / "config.json").read_text())
    results = [calibrate(checkpoint, place / "text.txt", tokens=size) for size in (2_000, 3_000)]
    entries = json.loads((checkpoint / RECORD).read_text())["calibrations"]
    assert len(entries) == 2
    for entry, result in zip(entries, results, strict=True):
        assert {name: entry[name] for name in ("tokens", "held_out_tokens", "date", "before", "after")} == {
            name: result[name] for name in ("tokens", "held_out_tokens", "date", "before", "after")
        }
        assert entry["text"] == "text.txt"
    first, second = (entry["replaced"] for entry in entries)
    for name, tensor in before.items():
        if is_threshold(name):
            assert torch.tensor(first[name.removeprefix("model.")]).equal(tensor)
    assert first["thresholds_from"] == fields["thresholds_from"]
    assert second["thresholds_from"] == "2,000 tokens of text.txt"
    now = json.loads((checkpoint / "config.json").read_text())
    assert now == fields | {"thresholds_from": "3,000 tokens of text.txt"}
    card = (checkpoint / "README.md").read_text()
    assert (
        card.count("Thresholds from: ") == 1 and "Thresholds from: 3,000 tokens of text.txt, calibrated anew on" in card
    )
    assert str(place) not in card + (checkpoint / RECORD).read_text()
    evaluated = ecmoe.evaluate(str(checkpoint), data=str(place / "text.txt"), max_tokens=500)
    assert evaluated["thresholds_from"] == "3,000 tokens of text.txt"


def test_the_figures_are_those_of_the_held_out_part(checkpoint: Path, place: Path) -> None:
    """One document in five, which the thresholds were not measured on; the loss is the model's own."""
    documents = [f"{word} " * 60 for word in ("alpha", "beta", "gamma", "delta", "epsilon")]
    (checkpoint.parent / "five.txt").write_text("<|endoftext|>".join(documents))
    found = calibrate(checkpoint, checkpoint.parent / "five.txt")
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = AutoTokenizer.from_pretrained(checkpoint)(documents[4].strip())["input_ids"]
    windows = [torch.tensor([ids[start : start + 128]]) for start in range(0, len(ids), 128)]
    total = predicted = 0.0
    with record_routing(model) as record, torch.no_grad():
        for window in windows:
            total += model(window, labels=window).loss.item() * (window.numel() - 1)
            predicted += window.numel() - 1
    assert found["held_out_tokens"] == len(ids)
    assert found["after"]["loss"] == pytest.approx(total / predicted, abs=1e-5)
    for name, value in record.summary().items():
        assert found["after"][name] == pytest.approx(value, abs=1e-6)
    assert (load_warning(found) is None) == (record.summary()["load_min"] >= 0.5 and record.summary()["load_max"] <= 2)


def test_conversations_go_through_the_chat_template(checkpoint: Path, place: Path) -> None:
    chats = [
        [{"role": "user", "content": f"{number} and {number + 1}?"}, {"role": "assistant", "content": "Yes. " * 20}]
        for number in range(40)
    ]
    rows = "\n".join(json.dumps({"messages": messages, "id": 1}) for messages in chats)
    (checkpoint.parent / "chats.jsonl").write_text(rows)
    calibrate(checkpoint, checkpoint.parent / "chats.jsonl", tokens=10_000)
    found = {name: tensor for name, tensor in all_tensors(checkpoint).items() if name.endswith("threshold")}
    model = AutoModelForCausalLM.from_pretrained(place / "ecmoe")
    tokenizer = AutoTokenizer.from_pretrained(place / "ecmoe")
    rest = [messages for number, messages in enumerate(chats) if number % 5 != 4]
    calibrate_thresholds(model, rest, tokenizer)
    for name, block in sparse_blocks(model).items():
        torch.testing.assert_close(found[f"{name}.gate.threshold"], block.gate.threshold)
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rest]
    other = AutoModelForCausalLM.from_pretrained(place / "ecmoe")
    calibrate_thresholds(other, [{"messages": messages} for messages in rest], tokenizer)
    calibrate_thresholds(model, texts, tokenizer)
    for name, block in sparse_blocks(model).items():
        assert torch.equal(sparse_blocks(other)[name].gate.threshold, block.gate.threshold)


def test_shards_of_one_replica_keep_one_threshold(tmp_path: Path) -> None:
    folder = make(tmp_path, init="granular", ratio=None)
    calibrate(folder, tmp_path / "text.txt", tokens=2_000)
    thresholds = [tensor for name, tensor in all_tensors(folder).items() if name.endswith("gate.threshold")]
    assert all(torch.equal(tensor[::2], tensor[1::2]) for tensor in thresholds) and len(thresholds) == 3
    assert any(tensor[0] != tensor[2] for tensor in thresholds)


@pytest.mark.parametrize("step", range(4))
def test_an_error_at_any_step_leaves_whole_files(
    checkpoint: Path, place: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is the old one or the new one, none is left beside them, and the same call goes through."""
    before, replace = contents(checkpoint), os.replace
    done = []

    def stop(source: Any, target: Any) -> None:
        if len(done) == step:
            raise KeyboardInterrupt
        done.append(Path(target).name)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        calibrate(checkpoint, place / "text.txt", tokens=2_000)
    now = contents(checkpoint)
    assert {name for name in now if now[name] != before.get(name)} == set(done)
    AutoModelForCausalLM.from_pretrained(checkpoint)
    calibrate(checkpoint, place / "text.txt", tokens=2_000)
    assert contents(checkpoint).keys() == before.keys() | {RECORD}


def test_a_real_kill_leaves_the_checkpoint_as_it_was(checkpoint: Path, place: Path) -> None:
    """While the new files lie beside the old ones, which is where nearly all of the writing is."""
    before = contents(checkpoint)
    script = (
        "import os, signal, sys; from ecmoe.analysis import calibrate\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "calibrate(*sys.argv[1:], tokens=500)"
    )
    command = [sys.executable, "-c", script, str(checkpoint), str(place / "text.txt")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    now = contents(checkpoint)
    left = now.keys() - before.keys()
    assert "model.safetensors.unfinished" in left
    assert all(now[name] == content for name, content in before.items())
    AutoModelForCausalLM.from_pretrained(checkpoint)
    calibrate(checkpoint, place / "text.txt", tokens=500)
    assert contents(checkpoint).keys() == before.keys() | {RECORD}


@pytest.mark.parametrize("index", [False, True], ids=["another file", "an index beside it"])
def test_the_file_that_is_loaded_is_the_one_that_changes(checkpoint: Path, place: Path, index: bool) -> None:
    """Whatever else lies in the folder: what an earlier save or a download left there is not looked at."""
    other = checkpoint / "old.safetensors"
    shutil.copy(checkpoint / "model.safetensors", other)
    if index:
        weight_map = dict.fromkeys(all_tensors(checkpoint), other.name)
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = other.read_bytes()
    calibrate(checkpoint, place / "text.txt", tokens=500)
    assert other.read_bytes() == before
    entry = json.loads((checkpoint / RECORD).read_text())["calibrations"][0]
    blocks = sparse_blocks(AutoModelForCausalLM.from_pretrained(checkpoint)).values()
    replaced = entry["replaced"]["layers.0.mlp.gate.threshold"]
    assert next(iter(blocks)).gate.threshold.tolist() != replaced


def test_a_full_disk_changes_nothing(checkpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(checkpoint)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(AnalysisError, match=r"cannot be written: .*No space left"):
            calibrate(checkpoint, place / "text.txt", tokens=500)
    assert contents(checkpoint) == before
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(AnalysisError, match=r" MB are written beside the old files .* 0\.0 kB are free; free some"):
        calibrate(checkpoint, place / "text.txt", tokens=500)
    assert contents(checkpoint) == before


def test_the_command_prints_before_and_after(checkpoint: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["calibrate", str(checkpoint), "--text", str(place / "text.txt"), "--tokens", "2000"])
    printed = capsys.readouterr()
    entry = json.loads((checkpoint / RECORD).read_text())["calibrations"][0]
    for when in ("before", "after"):
        assert f"{entry[when]['loss']:.4f}" in printed.out and f"{entry[when]['load_max']:.2f}" in printed.out
    assert "Thresholds from: 2,000 tokens of text.txt" in printed.out
    assert "on 2,000 tokens of" in printed.err and "500 others are looked at before and after" in printed.err
    main(["evaluate", str(checkpoint), "--data", str(place / "text.txt"), "--max-tokens", "500"])
    assert "2,000 tokens of text.txt" in capsys.readouterr().out
    main(["calibrate", str(checkpoint), "--text", str(place / "text.txt"), "--tokens", "500", "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] == 500


def test_one_line_for_what_cannot_be(checkpoint: Path, place: Path, tmp_path: Path) -> None:
    text, before = place / "text.txt", contents(checkpoint)
    (tmp_path / "tiny.txt").write_text("a")
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"messages": 3}\n')
    (tmp_path / "no.jsonl").write_text('{"messages": \n')
    for arguments, message in (
        (("someone/model", text), "is no local folder, and thresholds are replaced in place; download it first"),
        ((checkpoint, tmp_path / "none.txt"), r"text=.*none.txt does not exist"),
        ((checkpoint, tmp_path / "tiny.txt"), "holds too few tokens"),
        ((checkpoint, tmp_path / "bad.jsonl"), "line 2: messages holds int, not messages"),
        ((checkpoint, tmp_path / "no.jsonl"), r"cannot be read as a \.jsonl file"),
        ((checkpoint, text, 0), "tokens=0 must be at least 1"),
        ((place / "dense", text), "holds no thresholds in safetensors files"),
        ((tmp_path, text), "holds no thresholds in safetensors files"),
    ):
        with pytest.raises(AnalysisError, match=message):
            calibrate(*arguments)
    assert contents(checkpoint) == before
    with (
        FileLock(checkpoint / ".ecmoe_calibration.lock"),
        pytest.raises(AnalysisError, match="is being calibrated by another process; wait for it"),
    ):
        calibrate(checkpoint, text)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.config.routing = model.config.inference_routing = "token_choice"
    model.config.min_experts_per_token = 0
    model.save_pretrained(tmp_path / "token-choice")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "token-choice")
    with pytest.raises(AnalysisError, match="inference_routing=token_choice: its tokens choose"):
        calibrate(tmp_path / "token-choice", text)
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(AnalysisError, match="is an adapter; merge it"):
        calibrate(checkpoint, text)
    (checkpoint / "adapter_config.json").unlink()
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(AnalysisError, match=r"model\.safetensors is damaged"):
        calibrate(checkpoint, text)
