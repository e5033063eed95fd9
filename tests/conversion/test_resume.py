"""Killed at any moment, a conversion goes on and ends with the same bytes, and nothing half made ever loads."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import contents, write_dense
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ecmoe import conversion
from ecmoe.conversion import convert
from ecmoe.conversion.checkpoints.writer import _write_shard
from ecmoe.conversion.cli import main

REPOSITORY = Path(__file__).parents[2]
WORK = ".out.partial"
INDEX, RECORD = "model.safetensors.index.json", "ecmoe_conversion.json"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_dense(folder, "Llama", max_shard_size="20KB")
    return folder


def assert_nothing_half_made_loads(place: Path, reference: dict[str, bytes]) -> None:
    """Of all folders, hidden ones too, those that load are complete to the byte."""
    for folder in [place, *(path for path in place.rglob("*") if path.is_dir())]:
        loaded = False
        for auto_class in (AutoConfig, AutoModelForCausalLM):
            try:
                auto_class.from_pretrained(folder)
            except (OSError, ValueError):
                continue
            loaded = True
        assert not loaded or contents(folder) == reference, folder


# Real processes and SIGKILL.


def start(source: Path, target: Path, *options: object) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "ecmoe.conversion",
        str(source),
        str(target),
        "--num-experts=4",
        *map(str, options),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--max-shard-size=20KB"], cwd=REPOSITORY, env=environment, **pipes)


def complete(source: Path, target: Path, *options: object) -> dict[str, bytes]:
    """Runs the command to its end, quietly, and returns what it wrote."""
    process = start(source, target, *options)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, ours(errors)) == (0, "")
    return contents(target)


def stop_when(process: subprocess.Popen, there: Callable[[], bool], signal_number: int = signal.SIGKILL) -> bool:
    """Sends the signal, 0 for none, as soon as that is so; False where the process ended before."""
    while not there():
        if process.poll() is not None:
            return False
    process.send_signal(signal_number)
    if signal_number:
        process.wait(timeout=60)
    return True


def ours(errors: str) -> str:
    """Without what torchao says on a CPU when Transformers imports it, where it is installed."""
    lines = errors.splitlines(keepends=True)
    return "".join(line for line in lines if "/torchao/" not in line and "torch/utils/_pytree.py" not in line)


def test_two_kills(tmp_path: Path, dense: Path, text: Path) -> None:
    options = {"num_experts": 4, "max_shard_size": "20KB", "text": str(text)}
    convert(str(dense), str(tmp_path / "reference"), **options)
    reference, place = contents(tmp_path / "reference"), tmp_path / "place"
    for stage in ("model-00003-of-*.safetensors", "thresholds.safetensors"):
        process = start(dense, place / "out", f"--text={text}")
        assert stop_when(process, lambda stage=stage: any(place.rglob(stage)))
        assert_nothing_half_made_loads(place, reference)
        assert sorted(path.name for path in place.iterdir()) == [WORK]
    assert complete(dense, place / "out", f"--text={text}") == reference
    assert sorted(path.name for path in place.iterdir()) == ["out"]


@pytest.mark.slow
def test_a_real_ctrl_c(tmp_path: Path, dense: Path, text: Path) -> None:
    process = start(dense, tmp_path / "out", f"--text={text}")
    assert stop_when(process, lambda: any(tmp_path.rglob(INDEX)), signal.SIGINT)
    assert process.returncode == 130
    assert ours(process.stderr.read()) == "ecmoe-convert: interrupted; the same command goes on from here\n"
    interrupted = complete(dense, tmp_path / "out", f"--text={text}")
    assert interrupted == complete(dense, tmp_path / "reference", f"--text={text}")


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path, text: Path) -> None:
    """At twelve stages that show in the folder and eight random moments, before the work begins and within it."""
    write_dense(tmp_path / "dense", "Llama", num_hidden_layers=4, max_shard_size="20KB")
    stages = {  # the files whose appearance is waited for, hidden or under the final name
        "plain": ["purpose.json", "model-00001-of-*", "model-00007-of-*", "thresholds.safetensors", "README.md", "out"],
        "centroid": ["lock", "router.safetensors", "model-00012-of-*", INDEX, "tokenizer.json", RECORD],
    }
    place, kills = tmp_path / "place", 0
    generator = random.Random(0)
    for name, options in {"plain": (), "centroid": ("--router=centroid",)}.items():
        arguments = (tmp_path / "dense", place / "out", f"--text={text}", *options)
        began = time.monotonic()
        process = start(tmp_path / "dense", tmp_path / name / "out", *arguments[2:])
        while not (tmp_path / name / WORK).exists():
            assert process.poll() is None
        preparation = time.monotonic() - began
        assert process.wait(timeout=300) == 0
        work_seconds = time.monotonic() - began - preparation
        reference = contents(tmp_path / name / "out")
        for moment in [*stages[name], -generator.random(), *((i + generator.random()) / 3 for i in range(3))]:
            for share in (0.9, 0.5, 0.1):  # of the measured time, should the machine be faster now
                process = start(*arguments)
                if isinstance(moment, str):
                    assert stop_when(process, lambda moment=moment: any(place.rglob(moment)))
                else:  # before the folder is there, or that part of the work later
                    assert moment < 0 or stop_when(process, place.exists, signal_number=0)
                    time.sleep(share * (-moment * preparation if moment < 0 else moment * work_seconds))
                    process.kill()
                    process.wait(timeout=60)
                if process.returncode == -signal.SIGKILL:
                    break
                shutil.rmtree(place)
            assert process.returncode == -signal.SIGKILL, f"{name} was through before {moment}"
            kills += 1
            left = [path for path in place.rglob("*") if path.is_file()]
            newest = max(left, key=lambda path: path.stat().st_mtime_ns).name if left else "nothing"
            print(f"{name} killed at {moment}: {len(left)} files, the last one {newest}")
            assert_nothing_half_made_loads(place, reference)
            if not (place / "out").exists():
                assert complete(*arguments) == reference
                assert sorted(path.name for path in place.iterdir()) == ["out"]
            shutil.rmtree(place)
    assert kills == 20


# Every single step of the writing, in this process.


class Killed(BaseException):
    """Stops a conversion where a kill would: nothing that catches exceptions catches it."""


def kill_at(patch: pytest.MonkeyPatch, step: float) -> list[str]:
    """Stops the conversion before that step, the n-th piece, sync, rename, new folder, copy or removal; later ones
    do not happen either. Returns the list of steps, which grows."""
    steps: list[str] = []

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def act(*args: Any, **kwargs: Any) -> Any:
            if not isinstance(args[0], (str, Path)) or WORK in str(args[0]) or WORK in str(args[-1]):
                steps.append(name)
                if len(steps) >= step:
                    raise Killed(name)
            return real(*args, **kwargs)

        patch.setattr(owner, name, act)

    for owner, name in ((conversion.checkpoints.writer, "_bytes"), (conversion.checkpoints.writer, "_to_disk")):
        counted(owner, name)
    for owner, name in ((Path, "rename"), (Path, "mkdir"), (Path, "unlink"), (shutil, "copyfile"), (shutil, "rmtree")):
        counted(owner, name)
    return steps


SIMULATED: dict[str, tuple[dict[str, Any], int]] = {
    "unverified": ({"verify": False, "max_shard_size": "40KB"}, 1),
    "centroid": ({"router": "centroid", "max_shard_size": "40KB"}, 6),
    "drop": ({"init": "drop"}, 6),
}


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("name", SIMULATED)
def test_killed_at_every_step(
    tmp_path: Path, dense: Path, text: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step, or every sixth or eighth where models are run; each third conversion is killed a second time."""
    options, every = SIMULATED[name]
    source, options = str(dense), {"num_experts": 2, "text": str(text)} | options
    with monkeypatch.context() as patch:
        steps = kill_at(patch, float("inf"))
        convert(source, str(tmp_path / "reference" / "out"), **options)
    reference = contents(tmp_path / "reference" / "out")
    assert {"_bytes", "_to_disk", "rename", "mkdir", "copyfile", "rmtree"} == set(steps)
    place, generator = tmp_path / "place", random.Random(0)
    chosen = [number for number, kind in enumerate(steps, 1) if kind != "_bytes" or number % 4 == 0][::every]
    for step in chosen:
        later = [generator.randint(1, len(steps))] if step % 3 == 0 else []
        for number in [step, *later]:
            with monkeypatch.context() as patch:
                kill_at(patch, number)
                # A ConversionError where the checkpoint is complete already.
                with contextlib.suppress(Killed, conversion.ConversionError):
                    convert(source, str(place / "out"), **options)
            assert_nothing_half_made_loads(place, reference)
        if not (place / "out").exists():
            convert(source, str(place / "out"), **options)
            assert [path.name for path in place.iterdir()] == ["out"]
        assert contents(place / "out") == reference, f"killed before step {step}, a {steps[step - 1]}"
        shutil.rmtree(place)


@pytest.fixture
def killed(tmp_path: Path, dense: Path, text: Path, few_tokens: None, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The arguments of a conversion that was killed when shards and thresholds were there; its source is a copy."""
    shutil.copytree(dense, tmp_path / "source")
    arguments = {"source": str(tmp_path / "source"), "destination": str(tmp_path / "out"), "num_experts": 2}
    arguments |= {"text": str(text), "max_shard_size": "40KB"}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill_before_the_record(Path.rename))
        with pytest.raises(Killed):
            convert(**arguments)
    assert (tmp_path / WORK / "thresholds.safetensors").is_file()
    return arguments


def kill_before_the_record(rename: Callable[..., Any]) -> Callable[..., Any]:
    def act(path: Path, target: Path) -> Path:
        if target.name == RECORD:
            raise Killed
        return rename(path, target)

    return act


def count_shards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are written from here on."""
    written: list[str] = []

    def act(path: Path, *args: Any) -> None:
        written.append(path.name)
        _write_shard(path, *args)

    monkeypatch.setattr(conversion.checkpoints.writer, "_write_shard", act)
    return written


def test_complete_shards_are_not_written_again(killed: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Path(killed["destination"]).parent / WORK / "checkpoint"
    (checkpoint / "model-00002-of-00006.safetensors").unlink()
    written = count_shards(monkeypatch)
    convert(**killed)
    assert written == ["model-00002-of-00006.safetensors"]


def edit_config(source: Path) -> None:
    path = source / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))


def edit_weights(source: Path) -> None:
    path = max(source.glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


CHANGES: dict[str, Callable[[dict], object]] = {
    "seed": lambda arguments: arguments.update(seed=1),
    "experts": lambda arguments: arguments.update(num_experts=4),
    "initialisation": lambda arguments: arguments.update(init="copy"),
    "unverified": lambda arguments: arguments.update(verify=False),
    "shards": lambda arguments: arguments.update(max_shard_size="20KB"),
    "no text": lambda arguments: arguments.pop("text"),
    "touched": lambda arguments: os.utime(min(Path(arguments["source"]).glob("*.safetensors"))),
    "weights": lambda arguments: edit_weights(Path(arguments["source"])),
    "config": lambda arguments: edit_config(Path(arguments["source"])),
    "companion": lambda arguments: (Path(arguments["source"]) / "chat_template.jinja").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_conversion_begins_anew(killed: dict, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other options for the same destination, or another source under the same name: nothing of the old one stays."""
    CHANGES[change](killed)
    written = count_shards(monkeypatch)
    convert(**killed)
    shards = len(written)
    found = contents(Path(killed["destination"]))
    convert(**killed | {"destination": killed["destination"] + "_reference"})
    assert found == contents(Path(killed["destination"] + "_reference"))
    assert shards == len(written) - shards > 0


def test_two_processes_at_once(killed: dict, tmp_path: Path, refuse) -> None:
    """The second is refused and leaves the first its work."""
    before = contents(tmp_path / WORK)
    command = [killed["source"], killed["destination"], "--no-verify"]
    with FileLock(tmp_path / WORK / "lock"):
        refuse(command, "is being written by another process; wait for it", left=[WORK, "source"])
    assert contents(tmp_path / WORK) == before
    main(command)


def test_ctrl_c(killed: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    command = [killed["source"], killed["destination"], "--no-verify"]
    with monkeypatch.context() as patch:
        patch.setitem(convert.__globals__, "overwrite_tensors", interrupt)
        with pytest.raises(SystemExit) as stop:
            main(command)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "ecmoe-convert: interrupted; the same command goes on from here\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [WORK, "source"]
    written = count_shards(monkeypatch)
    main(command)
    assert written == []
