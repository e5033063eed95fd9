"""Stopped at any moment, the same command goes on and ends with the bits of a run that was not stopped."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import contents
from runs import assert_same_run, comparable, start
from safetensors.torch import load_file

from ecmoe.finetune import Recipe, RecipeError, load_recipe, run
from ecmoe.finetune.callbacks import StepTimer
from ecmoe.finetune.cli import main
from ecmoe.finetune.folder import after_a_stop, as_yaml, begin, last_whole_checkpoint, resume_point, when_saved
from ecmoe.finetune.train import _resume, make_trainer

pytestmark = pytest.mark.usefixtures("quick_end")

# Logging does not divide saving, and evaluation falls between both.
STEPS = {
    "save_strategy": "steps",
    "save_steps": 4,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 14,
    "max_eval_sequences": 4,
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"router_learning_rate": 1e-3},
    # Its second checkpoint from the end is in the second reading of the rows.
    "a stream": {
        "streaming": True,
        "shuffle_buffer": 7,
        "validation_fraction": 0.95,
        "gradient_accumulation_steps": 3,
    },
    "epochs": {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch", "gradient_accumulation_steps": 8},
    "a part of an epoch": {"lr_scheduler_type": "constant", "gradient_accumulation_steps": 3},
    "lora": {"lora": {"r": 4}, "max_length": 32},
    "padded": {"packing": False, "too_long": "truncate"},
    "packed by TRL": {"packing_strategy": "bfd_split"},
}
FEW_SEQUENCES = {"validation_fraction": 0.9}  # about a hundred, so that epochs are short


def fields_of(way: str) -> dict[str, Any]:
    return STEPS | (FEW_SEQUENCES if "epoch" in way else {}) | WAYS[way]


def write_recipe(place: Path, path: Path, output: Path, **fields: Any) -> Path:
    """A recipe file of its own for a command line."""
    overrides = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
    recipe = load_recipe(place / "recipe.yaml", [f"model={place / 'ecmoe'}", f"output_dir={output}", *overrides])
    path.write_text(as_yaml(recipe))
    return path


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that was not stopped, made once for each way."""
    folder = tmp_path_factory.mktemp("whole")

    def make(way: str) -> Path:
        if not (folder / way).exists():  # within a test, with its `quick_end`
            run(load_recipe(write_recipe(place, folder / f"{way}.yaml", folder / way, **fields_of(way))))
        return folder / way

    return make


def stopped_after(checkpoints: list[Path], recipe: Recipe) -> Path:
    """The output folder of a run that had written these checkpoints when it was stopped."""
    folder = Path(recipe.output_dir)
    for checkpoint in checkpoints:
        shutil.copytree(checkpoint, folder / checkpoint.name)
    (folder / "finetune_recipe.yaml").write_text(as_yaml(recipe))
    return folder


def test_killed_and_run_again(recipe_of: Callable, whole: Callable, tmp_path: Path) -> None:
    """kill -9 at a random moment after the second checkpoint is begun; the slow test does it five times."""
    recipe = recipe_of(**fields_of("plain"), save_total_limit=1)
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe))
    process = start([str(tmp_path / "recipe.yaml")], tmp_path / "log")
    out = Path(recipe.output_dir)
    wait_for(out / "checkpoint-8", lambda: process.exitcode is not None)
    time.sleep(random.uniform(0, 0.2))
    process.kill()
    process.join()
    assert process.exitcode == -9
    assert not (out / "finetune_results.json").exists()
    assert last_whole_checkpoint(out) in (out / "checkpoint-4", out / "checkpoint-8", out / "checkpoint-12")
    run(recipe)
    assert_same_run(whole("plain"), out)
    with pytest.raises(RecipeError, match="is finished; name a new folder"):
        run(recipe)


def wait_for(folder: Path, has_ended: Callable[[], bool]) -> None:
    while not folder.exists() and not has_ended():
        time.sleep(0.001)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow) if way == "a part of an epoch" else way for way in WAYS]
)
def test_from_any_checkpoint(recipe_of: Callable, whole: Callable, tmp_path: Path, way: str) -> None:
    """In a folder with the recipe and a checkpoint the run ends as if it had not been stopped.

    Also from the checkpoint of the last step, from which nothing is left to train.
    """
    checkpoints = sorted(whole(way).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert len(checkpoints) >= 3
    for checkpoint in checkpoints[-2:]:
        recipe = recipe_of(**fields_of(way), output_dir=tmp_path / checkpoint.name)
        folder = stopped_after([checkpoint], recipe)
        run(recipe)
        assert_same_run(whole(way), folder)
        learned = [row for row in comparable(folder)[1] if "loss" in row]
        assert len(learned) >= 3 and all("threshold_change" in row for row in learned)
        # It did not begin again.
        left = [path.name for path in checkpoints if checkpoints.index(path) >= checkpoints.index(checkpoint)]
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == sorted(left)


HARMS = {
    "truncated": "trainer_state.json",
    "empty": "trainer_state.json",
    "no state": "trainer_state.json",
    "no weights": "model.safetensors",
    "no optimiser": "optimizer.pt",
    "save_only_model": "rng_state.pth",
}


def test_a_checkpoint_cut_off_is_not_resumed_from(recipe_of: Callable, whole: Callable, tmp_path: Path) -> None:
    """The one before it is, and what was cut off is cleared away."""
    both = [whole("plain") / f"checkpoint-{step}" for step in (4, 8)]
    for harm, name in HARMS.items():
        folder = stopped_after(both, recipe_of(**fields_of("plain"), output_dir=tmp_path / harm))
        assert last_whole_checkpoint(folder) == folder / "checkpoint-8"
        path = folder / "checkpoint-8" / name
        kept = {"truncated": path.read_bytes()[:-20], "empty": b""}.get(harm)
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
        assert last_whole_checkpoint(folder) == folder / "checkpoint-4", harm
    run(recipe_of(**fields_of("plain"), output_dir=tmp_path / "truncated"))
    assert_same_run(whole("plain"), tmp_path / "truncated")
    assert last_whole_checkpoint(tmp_path / "truncated") == tmp_path / "truncated" / "checkpoint-14"


def test_the_state_is_written_last(recipe_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every rank has written its random state: so a checkpoint with a state is whole."""
    trainer = make_trainer(recipe_of())
    trainer.create_optimizer_and_scheduler(1)
    order: list[str] = []
    monkeypatch.setattr("transformers.Trainer._save_rng_state", lambda *_: order.append("random state"))
    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: order.append("all ranks"))
    monkeypatch.setattr("transformers.TrainerState.save_to_json", lambda *_: order.append("state"))
    trainer._save_checkpoint(trainer.model, None)
    assert order[-3:] == ["random state", "all ranks", "state"]


def test_folders(recipe_of: Callable, tmp_path: Path) -> None:
    """Another recipe's folder and a stranger's are refused; one that was stopped before its first mark is not."""
    out, words = tmp_path / "out", tmp_path / "words.jsonl"
    words.write_text('{"text": "a word"}\n' * 9)
    first = recipe_of(max_steps=2, save_strategy="steps", save_steps=1)
    out.mkdir()
    (out / "finetune_recipe.yaml.unfinished").write_text("model:")
    run(first)
    (out / "finetune_results.json").unlink()  # stopped just before the end
    with pytest.raises(
        RecipeError, match=r"holds another run \(max_steps=3 \(was 2\)\); .* go on there with resume_from"
    ):
        run(recipe_of(max_steps=3, save_strategy="steps", save_steps=1))
    with pytest.raises(RecipeError, match="dataset_text_field=story is not in"):  # not hidden behind the folder
        run(recipe_of(max_steps=3, dataset_text_field="story", dataset=words))
    results = run(recipe_of(max_steps=3, save_strategy="steps", save_steps=1, resume_from_checkpoint=True))
    assert results["steps"] == 3
    with pytest.raises(RecipeError, match="max_steps=3 was reached already"):
        run(recipe_of(max_steps=3, resume_from_checkpoint=str(out / "checkpoint-3")))
    with pytest.raises(RecipeError, match="finds no checkpoint"):
        run(recipe_of(max_steps=9, resume_from_checkpoint=str(tmp_path / "checkpoint-1")))
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "file").touch()
    with pytest.raises(RecipeError, match=r"is not empty and holds other files; name a new folder$"):
        run(recipe_of(output_dir=stranger))
    (stranger / "config.json").touch()
    with pytest.raises(RecipeError, match=r"is not empty and holds a model; name a new folder$"):
        run(recipe_of(output_dir=stranger))
    assert (stranger / "file").exists()


def test_a_run_that_wrote_no_checkpoint_begins_again(recipe_of: Callable, tmp_path: Path) -> None:
    """Also with another recipe: nothing of it is worth going on from."""
    first = recipe_of(max_steps=2)
    begin(first, None)
    assert resume_point(first) is None
    assert run(recipe_of(max_steps=1))["steps"] == 1


def test_checkpoints_of_the_model_alone_are_not_written_over(recipe_of: Callable) -> None:
    """Nothing can go on from them, and they are another run's all the same."""
    fields = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    run(recipe_of(**fields, max_steps=2))
    out = Path(recipe_of().output_dir)
    (out / "finetune_results.json").unlink()  # stopped just before the end
    for path in ("model.safetensors", None):
        before = sorted(each.name for each in out.iterdir())
        with pytest.raises(RecipeError, match="is not empty and holds another run"):
            run(recipe_of(**fields, max_steps=1))
        assert sorted(each.name for each in out.iterdir()) == before
        if path:
            (out / path).unlink()


def test_what_is_said_of_going_on(
    recipe_of: Callable, whole: Callable, tmp_path: Path, capsys: Any, caplog: Any, monkeypatch: Any
) -> None:
    """From which checkpoint; and nothing of a head that is tied to the embedding."""
    recipe = recipe_of(**fields_of("plain"))
    stopped_after([whole("plain") / "checkpoint-8"], recipe)
    run(recipe)
    assert f"goes on from {Path(recipe.output_dir) / 'checkpoint-8'}" in capsys.readouterr().out.splitlines()
    trainer = make_trainer(recipe_of(output_dir=tmp_path / "tied"))
    trainer.model.all_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    missing = SimpleNamespace(missing_keys=["lm_head.weight"], unexpected_keys=[])
    trainer._issue_warnings_after_load(missing)
    assert missing.missing_keys == [] and "missing keys" not in caplog.text


# Changes of the plain way that its checkpoints do not survive, and what the line says of each.
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "fewer groups": ({"router_learning_rate": None}, "router_learning_rate left out (was 0.001)"),
    "frozen experts": ({"experts_learning_rate": 0}, "experts_learning_rate=0 (was left out)"),
    "adapters": ({"lora": {"r": 4}}, "lora={'r': 4} (was left out)"),
    "another optimiser": ({"optim": "sgd", "max_steps": 20}, "max_steps=20 (was 14), optim=sgd (was left out)"),
}


def test_another_recipe_that_does_not_fit_the_checkpoint(
    place: Path, whole: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names what was changed; the folder stays the first run's, which goes on to the same bits."""
    file = write_recipe(place, tmp_path / "recipe.yaml", tmp_path / "out", **fields_of("plain"))
    recipe = load_recipe(file)
    folder = stopped_after([whole("plain") / "checkpoint-4"], recipe)
    before = contents(folder)
    for fields, changes in MISFITS.values():
        overrides = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
        with pytest.raises(SystemExit) as stop:
            main([str(file), *overrides, "resume_from_checkpoint=true"])
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
        assert stop.value.code == 2
        assert line.startswith(f"ecmoe-finetune: error: {folder / 'checkpoint-4'} does not fit this recipe (")
        assert f"); changed since: {changes}; " in line
        assert contents(folder) == before
    run(recipe)
    assert_same_run(whole("plain"), folder)


def test_a_checkpoint_of_adapters_of_another_size(recipe_of: Callable, whole: Callable, tmp_path: Path) -> None:
    recipe = recipe_of(**fields_of("lora"))
    stopped_after([whole("lora") / "checkpoint-4"], recipe)
    with pytest.raises(RecipeError, match=r"does not fit this recipe .* lora=\{'r': 2\} \(was \{'r': 4\}\)"):
        run(recipe_of(**fields_of("lora") | {"lora": {"r": 2}}, resume_from_checkpoint=True))
    damaged = recipe_of(**fields_of("lora"), output_dir=tmp_path / "damaged")
    optimizer = stopped_after([whole("lora") / "checkpoint-4"], damaged) / "checkpoint-4" / "optimizer.pt"
    torch.save({"state": {}, "param_groups": []}, optimizer)
    with pytest.raises(ValueError, match="parameter groups") as stop:  # nothing was changed, so nobody foresaw it
        run(damaged)
    assert not isinstance(stop.value, RecipeError)


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """As in a shell, also where the tests were started in its background, which ignores Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends the process a signal when this step begins, once."""

    def on_step_begin(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        usual(self, args, state, *rest, **kwargs)
        if state.global_step == step and not sent:
            sent.append(number)
            signal.raise_signal(number)

    sent: list[int] = []
    usual = StepTimer.on_step_begin
    monkeypatch.setattr(StepTimer, "on_step_begin", on_step_begin)


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize(("step", "number"), [(5, signal.SIGTERM), (9, signal.SIGINT)])
def test_interrupted_and_run_again(
    step: int, number: int, place: Path, whole: Callable, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """In a step, and in one that is followed by an evaluation: ends with a checkpoint, says what the same command does,
    and that command ends with the same bits; the log has one line more, for the steps before the checkpoint."""
    out, checkpoint = tmp_path / "out", tmp_path / "out" / f"checkpoint-{step + 1}"
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    file = write_recipe(place, tmp_path / "recipe.yaml", out, **fields_of("plain"))
    interrupt_at(step, number, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        main([str(file)])
    word = f"ecmoe-finetune: interrupted; the same command goes on from {checkpoint}"
    assert stop.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == word
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    main([str(file)])
    assert f"goes on from {checkpoint}" in capsys.readouterr().out.splitlines()
    (weights, log, results), (expected, expected_log, expected_results) = comparable(out), comparable(whole("plain"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert results == expected_results
    assert [row for row in log if "loss" not in row] == [row for row in expected_log if "loss" not in row]


@pytest.mark.usefixtures("usual_signals")
def test_interrupted_before_the_first_checkpoint(
    place: Path, recipe_of: Callable, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """At once before any step, and where no checkpoint is kept; nothing is said to go on."""
    for step, fields, when in (
        (0, STEPS, "checkpoints come every save_steps=4 steps"),
        (2, {"save_strategy": "no"}, "save_strategy=no writes no checkpoints"),
    ):
        out = tmp_path / str(step)
        file = write_recipe(place, tmp_path / "recipe.yaml", out, **fields)
        interrupt_at(step, signal.SIGINT, monkeypatch)
        with pytest.raises(SystemExit):
            main([str(file)])
        word = f"ecmoe-finetune: interrupted; no checkpoint yet: the same command begins again; {when}"
        assert capsys.readouterr().err.splitlines()[-1] == word
        assert not list(out.glob("checkpoint-*"))
        assert _resume(load_recipe(file)) is None
        assert f"output_dir={out} holds a run without a checkpoint: begins again; {when}\n" in capsys.readouterr().out
    alone = recipe_of(save_strategy="steps", save_only_model=True)
    assert after_a_stop(alone).endswith("its checkpoints hold the model alone, and no run goes on from these")
    assert when_saved(recipe_of(save_strategy="steps", save_steps=0.1)).endswith("every save_steps=0.1 of all steps")


def test_runs_differ_by_their_seed(recipe_of: Callable, tmp_path: Path) -> None:
    """So the comparison of two runs can fail."""
    for seed in (1, 2):
        run(recipe_of(seed=seed, max_steps=2, output_dir=tmp_path / str(seed)))
    weights = [load_file(tmp_path / str(seed) / "model.safetensors") for seed in (1, 2)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert comparable(tmp_path / "1")[1] != comparable(tmp_path / "2")[1]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["padded", "plain", "a stream", "lora"])
def test_five_kills(place: Path, tmp_path: Path, way: str) -> None:
    """`python -m ecmoe.finetune` killed again and again, first while it writes a checkpoint, then at random moments."""
    commands = {}
    for name in ("whole", "killed"):
        fields = fields_of(way) | {"max_steps": 110, "save_total_limit": 2}
        recipe = write_recipe(place, tmp_path / f"{name}.yaml", tmp_path / name, **fields)
        commands[name] = [sys.executable, "-m", "ecmoe.finetune", str(recipe)]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": Path(__file__).parents[2]}
    subprocess.run(commands["whole"], check=True, **quiet)
    moments = []
    for number in range(5):
        process = subprocess.Popen(commands["killed"], **quiet)
        step = 4 * random.randint(5 * number + 1, 5 * number + 5)
        wait_for(tmp_path / "killed" / f"checkpoint-{step}", lambda process=process: process.poll() is not None)
        seconds = 0 if number == 0 else random.uniform(0, 0.5)
        time.sleep(seconds)
        process.kill()
        process.wait()
        assert process.returncode == -9
        moments.append((f"{seconds:.3f} s after checkpoint-{step}", last_whole_checkpoint(tmp_path / "killed")))
    subprocess.run(commands["killed"], check=True, **quiet)
    print(way, [(moment, path and path.name) for moment, path in moments])
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
