"""What a run measures and writes down, the learning rates of its parts, and what it says before it cannot go on."""

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import contents
from matplotlib import image
from runs import prepared
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

import ecmoe.finetune.curves
import ecmoe.finetune.train
from ecmoe.finetune import RecipeError, load_recipe, run
from ecmoe.finetune.adapters import group_of
from ecmoe.finetune.callbacks import StepTimer
from ecmoe.finetune.cli import _report_dry_run, main
from ecmoe.finetune.curves import draw_curves
from ecmoe.finetune.data import Collator
from ecmoe.finetune.folder import last_whole_checkpoint
from ecmoe.finetune.losses import standard_error
from ecmoe.finetune.train import make_trainer
from modeling_ecmoe import routing_report, sparse_blocks, use_inference_routing

ROUTING = {"load_min", "load_max", "uncovered", "experts_per_token"}


class Seen(TrainerCallback):
    """A peer's callback: every line of the log, and the thresholds of that moment."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.thresholds: list[torch.Tensor] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        self.lines.append({"step": state.global_step, **logs})
        self.thresholds.append(thresholds_of(model))


def thresholds_of(model: Any) -> torch.Tensor:
    return torch.stack([block.gate.threshold.clone() for block in sparse_blocks(model).values()])


@pytest.fixture(scope="module")
def logged(place: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of 6 steps, logged every 2 and evaluated every 3, with a checkpoint at each evaluation."""
    out = tmp_path_factory.mktemp("metrics") / "out"
    fields = {"model": place / "ecmoe", "output_dir": out, "max_steps": 6, "logging_steps": 2}
    fields |= {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "seed": 5}
    fields |= {"per_device_eval_batch_size": 16}
    recipe = load_recipe(place / "recipe.yaml", [f"{name}={value}" for name, value in fields.items()])
    seen = Seen()

    def watched(*args: Any, **kwargs: Any) -> Any:
        trainer = make_trainer(*args, **kwargs)
        trainer.add_callback(seen)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ecmoe.finetune.train.make_trainer", watched)
        results = run(recipe)
    _, held_out = prepared(recipe, AutoTokenizer.from_pretrained(out), 300)
    batch = Collator(0)(list(held_out))
    return SimpleNamespace(recipe=recipe, results=results, out=out, seen=seen, batch=batch, base=place / "ecmoe")


def test_what_is_logged(logged: SimpleNamespace) -> None:
    """At every evaluation and every line of training, to callbacks and to trainer_state.json alike."""
    lines = logged.seen.lines
    evaluations = [line for line in lines if "eval_loss" in line]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6, 6]
    assert [line["step"] for line in training] == [2, 3, 4, 6]  # and one before the checkpoint of step 3
    for line in evaluations:
        assert {f"eval_{name}" for name in ROUTING} <= line.keys()
        assert line["eval_loss_gap"] == pytest.approx(line["eval_loss"] - line["eval_loss_top_k"], abs=1e-12)
        assert 0 <= line["eval_load_min"] <= 1 <= line["eval_load_max"] <= 4
        assert 0 <= line["eval_uncovered"] < 1 and 0 < line["eval_experts_per_token"] <= 4
    assert all(line["train_tokens_per_second"] > 0 for line in training)
    during, after = evaluations[-2:]  # the same weights with the same calibrated thresholds
    assert all(during[f"eval_{name}"] == after[f"eval_{name}"] for name in ("loss", "loss_top_k", *ROUTING))
    state = json.loads((logged.out / "trainer_state.json").read_text())
    others = ("epoch", "total_flos")  # that Trainer puts into one of them alone
    for line, kept in zip(lines, state["log_history"], strict=True):
        one, other = ({name: v for name, v in row.items() if name not in others} for row in (line, kept))
        assert one == other
    assert state["num_input_tokens_seen"] == 6 * 8 * 64


def test_threshold_change(logged: SimpleNamespace) -> None:
    """The mean distance that the thresholds moved since the last line, whose evaluation may have calibrated them."""
    old = thresholds_of(AutoModelForCausalLM.from_pretrained(logged.base))
    changes = 0
    for line, new in zip(logged.seen.lines, logged.seen.thresholds, strict=True):
        if "loss" in line:
            assert line["threshold_change"] == pytest.approx((new - old).abs().mean().item(), rel=1e-5)
            assert line["threshold_change"] > 0
            changes += 1
        old = new
    assert changes == 4


@pytest.mark.parametrize("name", ["checkpoint-3", "checkpoint-6", "."])
@torch.no_grad()
def test_the_figures_are_those_of_the_saved_model(logged: SimpleNamespace, name: str) -> None:
    """Causal loss, top-k loss and routes, measured again by hand from the folder."""
    model = AutoModelForCausalLM.from_pretrained(logged.out / name).eval()
    step = 6 if name == "." else int(name[-1])
    lines = [line for line in logged.seen.lines if "eval_loss" in line and line["step"] == step]
    line = lines[-1 if name == "." else 0]
    assert model(**logged.batch, use_cache=False).loss.item() == pytest.approx(line["eval_loss"], abs=1e-5)
    with use_inference_routing(model, "expert_choice"):
        assert model(**logged.batch, use_cache=False).loss.item() == pytest.approx(line["eval_loss_top_k"], abs=1e-5)
    inputs = {key: value for key, value in logged.batch.items() if key != "labels"}
    for key, value in routing_report(model, [inputs])["summary"].items():
        assert line[f"eval_{key}"] == pytest.approx(value, abs=2e-3), key


def test_the_results(logged: SimpleNamespace) -> None:
    results, lines = logged.results, [line for line in logged.seen.lines if "eval_loss" in line]
    assert results == json.loads((logged.out / "finetune_results.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(logged.out)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    assert results.keys() == {
        *("model", "model_type", "parameters", "active_parameters", "trained_parameters", "loss_before", "steps"),
        *("tokens", "tokens_per_second", "seed", "loss_after", "loss_after_top_k", "loss_gap", "routing"),
        *("loss_before_stderr", "loss_after_stderr", "loss_change", "loss_change_stderr"),
        *("held_out_rows", "held_out_tokens"),
    }
    assert results["model"] == str(logged.base) and results["model_type"] == "ecmoe_llama"
    assert results["parameters"] == results["trained_parameters"] == sum(p.numel() for p in model.parameters())
    capacity = model.config.capacity_factor / model.config.num_experts
    assert results["active_parameters"] == results["parameters"] - round(experts * (1 - capacity))
    assert (results["loss_before"], results["loss_after"]) == (lines[0]["eval_loss"], lines[-1]["eval_loss"])
    assert results["loss_gap"] == lines[-1]["eval_loss_gap"]
    assert results["routing"] == {name: lines[-1][f"eval_{name}"] for name in ROUTING}
    assert (results["steps"], results["tokens"], results["seed"]) == (6, 6 * 8 * 64, 5)


def jackknife(totals: torch.Tensor, counts: torch.Tensor) -> float:
    """The standard error of sum / count by leaving out one row after the other: another way than the run's."""
    left = (totals.sum() - totals) / (counts.sum() - counts)
    return ((len(left) - 1) * (left - left.mean()).square().mean()).sqrt().item()


@torch.no_grad()
def test_how_sure_the_losses_are(logged: SimpleNamespace) -> None:
    """Standard errors over held-out rows, of each loss and of the change row by row; kept in the checkpoints."""
    labels = logged.batch["labels"][:, 1:]
    counts, rows = (labels != -100).sum(1).double(), []
    for folder in (logged.base, logged.out):
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(**logged.batch, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        rows.append(losses.double().sum(1))
    before, after = rows
    results = logged.results
    assert results["loss_before_stderr"] == pytest.approx(jackknife(before, counts), rel=0.05)
    assert results["loss_after_stderr"] == pytest.approx(jackknife(after, counts), rel=0.05)
    assert results["loss_change"] == pytest.approx(((after - before).sum() / counts.sum()).item(), abs=1e-5)
    assert results["loss_change_stderr"] == pytest.approx(jackknife(after - before, counts), rel=0.05)
    assert (results["held_out_rows"], results["held_out_tokens"]) == (len(counts), int(counts.sum()))
    state = json.loads((logged.out / "checkpoint-3" / "trainer_state.json").read_text())
    assert len(state["stateful_callbacks"]["ecmoe_losses_before"]) == len(counts)
    evaluation = next(line for line in logged.seen.lines if "eval_loss" in line)
    assert evaluation["eval_loss_stderr"] == results["loss_before_stderr"]


def test_the_standard_error_of_rows_of_unlike_length() -> None:
    """Of simulated data sets, whose losses by token scatter as it says; of one row it is not known."""
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(2000):
        counts = torch.randint(5, 50, (40,), generator=generator)
        totals = counts * (2 + 0.5 * torch.randn(40, generator=generator, dtype=torch.float64))
        rows = list(zip(totals.tolist(), counts.tolist(), strict=True))
        means.append(totals.sum().item() / counts.sum().item())
        errors.append(standard_error(rows))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.05)
    assert standard_error([(3.0, 4)]) is None and standard_error([]) is None


@pytest.mark.usefixtures("quick_end")
def test_tokens_per_second_are_those_that_went_through(
    place: Path, recipe_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of unlike length, padded, logged and evaluated at other steps: their tokens by the seconds of steps."""
    rows = place / "unlike.jsonl"
    rows.write_text("".join(json.dumps({"text": "word " * (2 + 7 * n % 23)}) + "\n" for n in range(60)))
    fields = {"dataset": rows, "packing": False, "max_length": 128, "per_device_train_batch_size": 2, "max_steps": 6}
    fields |= {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "seed": 3}
    trainer = make_trainer(recipe_of(**fields))
    tokens: list[int] = []
    step = Trainer.training_step

    def count(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens.append(int(inputs["attention_mask"].sum()))
        trainer.timer._seconds.append(float(len(tokens)))  # in place of the clock's
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", count)
    monkeypatch.setattr(StepTimer, "on_step_end", lambda *args, **kwargs: None)
    trainer.train()
    lines = [row for row in trainer.state.log_history if "train_tokens_per_second" in row]
    assert len(set(tokens)) > 3
    expected = [sum(tokens[i : i + 2]) / (2 * i + 3) for i in (0, 2, 4)]
    assert [line["train_tokens_per_second"] for line in lines] == pytest.approx(expected)
    assert trainer.timed_tokens == sum(tokens)


def test_the_curves(logged: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four panels side by side for expert choice, two for a dense model, each with every point of its lines."""
    path = logged.out / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = image.imread(path)
    height, width = picture.shape[:2]
    assert (height, width) == (round(3.2 * 120), round(4 * 4.2 * 120))
    for panel in np.split(picture[:, : width // 4 * 4], 4, axis=1):
        colours = np.unique((panel[..., :3].reshape(-1, 3) * 255).round().astype(int), axis=0)
        assert any(np.array_equal(colour, (31, 119, 180)) for colour in colours)  # a line of the first colour
    figures: list[Any] = []
    monkeypatch.setattr(ecmoe.finetune.curves.plt, "close", figures.append)
    history = json.loads((logged.out / "trainer_state.json").read_text())["log_history"]
    draw_curves(history, tmp_path / "again.png")
    dense = [{name: v for name, v in row.items() if name.removeprefix("eval_") not in ROUTING} for row in history]
    draw_curves(dense, tmp_path / "dense.png")
    draw_curves([{"step": 0}], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
    expert_choice, dense_figure = figures
    assert [len(axis.lines) for axis in expert_choice.axes] == [3, 1, 2, 1]
    assert [axis.get_title() for axis in dense_figure.axes] == ["loss, nats per token", "learning rate"]
    causal = next(line for line in expert_choice.axes[0].lines if line.get_label() == "held out, causal")
    evaluations = [row for row in history if "eval_loss" in row]
    assert causal.get_xdata().tolist() == [row["step"] for row in evaluations]
    assert causal.get_ydata().tolist() == [row["eval_loss"] for row in evaluations]
    monkeypatch.undo()
    for figure in figures:
        ecmoe.finetune.curves.plt.close(figure)


@pytest.mark.usefixtures("quick_end")
@pytest.mark.parametrize("counted", ["no", "all", "non_padding"])
def test_no_token_counts_twice(recipe_of: Callable, counted: str) -> None:
    """Whoever counts them, Trainer or ours; packed text has no padding."""
    recipe = recipe_of(max_steps=2, logging_steps=1, include_num_input_tokens_seen=counted)
    assert run(recipe)["tokens"] == 2 * 8 * 64
    state = json.loads((Path(recipe.output_dir) / "trainer_state.json").read_text())
    assert state["num_input_tokens_seen"] == 2 * 8 * 64


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_groups_of_the_optimiser(recipe_of: Callable, lora: dict[str, Any] | None) -> None:
    """Each part at its own rate under a schedule, nothing twice, nothing left out; decay as Trainer would have it."""
    fields = {"router_learning_rate": 5e-4, "experts_learning_rate": 2e-3, "weight_decay": 0.1, "lora": lora}
    trainer = make_trainer(recipe_of(**{name: value for name, value in fields.items() if value is not None}))
    optimizer = trainer.create_optimizer()
    trainer.create_scheduler(num_training_steps=10, optimizer=optimizer)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["initial_lr"], group["weight_decay"])
    assert found.keys() == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    rates = {"router": 5e-4, "routed experts": 2e-3}
    assert all(rate == rates.get(group_of(name), 3e-3) for name, (rate, _) in found.items())
    assert {group_of(name) for name in found} >= {"router", "routed experts", "attention"}
    assert {decay for name, (_, decay) in found.items() if group_of(name) in rates} == {0.1}


@pytest.mark.usefixtures("quick_end")
def test_frozen_experts(place: Path, recipe_of: Callable) -> None:
    """experts_learning_rate=0: they keep their bits and take no room in the optimiser; the rest learns."""
    recipe = recipe_of(experts_learning_rate=0, max_steps=2, save_strategy="steps", save_steps=2, weight_decay=0.1)
    results = run(recipe)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (place / "ecmoe", recipe.output_dir))
    frozen = 0
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new) == (".mlp.experts." in name), name
        frozen += old.numel() if ".mlp.experts." in name else 0
    assert results["trained_parameters"] == results["parameters"] - frozen
    optimizer = torch.load(Path(recipe.output_dir) / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert sum(state["exp_avg"].numel() for state in optimizer["state"].values()) == results["trained_parameters"]


def test_dry_run_on_the_command_line(
    place: Path, recipe_of: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Says what one step takes; a run that stands in the folder is left as it is, and one there may be dry-run."""
    recipe = recipe_of(max_steps=50, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    out = Path(recipe.output_dir)
    command = [str(place / "recipe.yaml"), f"model={recipe.model}", f"output_dir={out}", "--dry-run"]
    command += ["max_steps=50", "save_strategy=steps", "save_steps=1", "eval_strategy=steps", "eval_steps=1"]
    before = contents(place)
    main(command)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"One step of {8 * 64} tokens, loss 5." in printed
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(recipe.model).parameters()) * 4 / 1e9
    assert float(printed.split(" GB in use")[0].split()[-1]) >= weights
    assert printed.endswith("Nothing was written.")
    assert "This run: float32." in printed and "50 steps of 512 tokens, " in printed  # packed, so without padding
    assert not out.exists() and contents(place) == before
    out.mkdir()
    (out / "other.txt").write_text("of another run")
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and "is not empty and holds other files" in capsys.readouterr().err
    assert contents(out) == {"other.txt": b"of another run"}


def test_what_is_said_of_adapters_and_of_padding(capsys: pytest.CaptureFixture[str]) -> None:
    """Adapters have one way alone; sizes of small models are no zero."""
    about = {"steps": 1, "tokens_per_step": 512, "has_padding": True, "seconds_per_step": 1, "evaluations": 2}
    results = {"precision": {"needed": {"adapters": 4_200_000}, "dtype": "auto"}, "tokens": 512, "loss": 5.0}
    results |= {"seconds": 1.0, "peak_bytes": 2e9, "free_bytes": 3e9, "estimate": about | {"seconds_per_evaluation": 1}}
    _report_dry_run(results)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("Weights, gradients and moments take on each device: 4.2 MB for adapters alone. One step")
    assert "about 1 step of 512 tokens with padding, 1.00 s each" in printed


@pytest.mark.usefixtures("quick_end")
@pytest.mark.parametrize("name", ["dense", "ecmoe"])
def test_a_gradient_that_is_no_number(
    place: Path, recipe_of: Callable, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Alone, in the third step: the run ends there, with the checkpoint of the second whole."""
    recipe = recipe_of(model=place / name, max_steps=6, logging_steps=1, save_strategy="steps", save_steps=1)
    training_step = Trainer.training_step

    def spoilt(self: Any, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = training_step(self, model, *args, **kwargs)
        if self.state.global_step == 2:
            next(iter(model.parameters())).grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(Trainer, "training_step", spoilt)
    with pytest.raises(RecipeError, match=r"grad_norm=nan at step 3: training has diverged; lower learning_rate") as no:
        run(recipe)
    checkpoint = Path(recipe.output_dir) / "checkpoint-2"
    assert str(no.value).endswith(f"the last checkpoint is {checkpoint}") and "\n" not in str(no.value)
    assert last_whole_checkpoint(Path(recipe.output_dir)) == checkpoint
    assert all(tensor.isfinite().all() for tensor in AutoModelForCausalLM.from_pretrained(checkpoint).parameters())


@pytest.mark.usefixtures("quick_end")
def test_no_room_for_the_final_model(recipe_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when training is over: one line, the checkpoint whole, and the same command ends the run."""
    recipe = recipe_of(max_steps=4, save_strategy="steps", save_steps=2)
    out = Path(recipe.output_dir)
    save_model = Trainer.save_model

    def full(self: Any, output_dir: Any = None, **kwargs: Any) -> None:
        if output_dir is None or Path(output_dir) == out:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_model(self, output_dir, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_model", full)
        with pytest.raises(RecipeError, match=r"No space left on device; free some space; the same command") as stop:
            run(recipe)
    assert "\n" not in str(stop.value) and not (out / "finetune_results.json").exists()
    assert last_whole_checkpoint(out) == out / "checkpoint-4"
    assert run(recipe)["steps"] == 4
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("routing", ["expert_choice", "threshold"])
def test_checkpoints_are_calibrated(
    routing: str, recipe_of: Callable, quick_end: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate that leaves the averages behind, no expert is idle in an evaluation and in its checkpoint.

    Threshold training keeps the averages that it trains with.
    """
    fields = {"routing": routing, "threshold_decay": 0.99, "learning_rate": 1e-2, "max_steps": 6}
    fields |= {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    kept, loads = [], []
    for calibrates in (True, False):
        if not calibrates:
            monkeypatch.setattr("ecmoe.finetune.calibration.Calibration.refresh", lambda _: None)
        out = tmp_path / f"out-{calibrates}"
        run(recipe_of(**fields, output_dir=out))
        kept.append(thresholds_of(AutoModelForCausalLM.from_pretrained(out / "checkpoint-3")))
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        line = next(row for row in history if row["step"] == 3 and "eval_loss" in row)
        loads.append(line["eval_load_min"])
    if routing == "threshold":
        assert torch.equal(*kept)
    else:
        assert not torch.equal(*kept)
        assert loads[0] > 0.3 and loads[1] < 0.1


def test_steps_of_a_gpu_are_timed_in_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is ahead of it: an event at both ends of a step, read when the seconds are asked for."""
    clock = iter(range(100))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.waited = False

        def record(self) -> None:
            self.at = next(clock)

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, end: "Event") -> float:
            assert end.waited
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.Event", Event)
    timer = StepTimer()
    for _ in range(2):
        timer.on_step_begin()
        timer.on_step_end()
    assert timer.seconds == timer.seconds == [1.0, 1.0]
