"""The parts of `python -m benchmarks quality` that decide what is run, compared and printed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_dense, write_text
from safetensors.torch import load_file

from benchmarks.quality import (
    command,
    data,
    execute,
    grid,
    measure,
    plots,
    pretrain,
    report,
    store,
    tables,
    timing,
    train,
)
from benchmarks.quality.grid import ARMS, Run
from modeling_ecmoe import sparse_blocks


def result(run: Run, losses: list[float], final: float | None = None, **more: Any) -> dict[str, Any]:
    """A run's file, with a curve of 100 tokens for each checkpoint."""
    curve = [{"step": i, "tokens": 100 * i, "losses": {"a": x}} for i, x in enumerate(losses)]
    found = {"loss": losses[-1] if final is None else final, "losses": {"a": losses[-1]}, "losses_elsewhere": {}}
    machine = {"processor": "one", "versions": {"torch": "2", "transformers": "5"}}
    return {
        "name": run.name,
        "recipe": run.recipe(),
        "steps": run.steps,
        "commit": "c",
        "machine": machine,
        "threads": 1,
        "parameters": {"total": 2, "active": 1},
        "curve": curve,
        "final": found | more,
    }


def test_names_are_unique_and_quick_runs_are_main_runs() -> None:
    names = [run.name for run in grid.all_runs()]
    assert len(names) == len(set(names)) > 100
    quick = grid.quick_runs()
    assert {run.name for run in quick} <= set(names)  # apart by their folder
    assert {run.arm for run in quick} == set(grid.MAIN[: grid.NUM_CORE])


def test_every_stored_run_is_one_of_the_grid() -> None:
    """With the recipe that the grid has: no figure stands that no command makes."""
    folder = Path(command.machine.RESULTS) / "quality"
    runs = {store.path_of(folder, run).name: run for run in grid.all_runs()}
    stored = sorted(folder.glob("*.json"))
    assert len(stored) > 100
    assert [path.name for path in stored if path.name not in runs] == []
    assert [path.name for path in stored if not store.finished(folder, runs[path.name])] == []


def test_arms_of_equal_flops() -> None:
    """FFNs per token: routed ones, and the shared expert that `blend` and `shared` keep."""
    for name, arm in ARMS.items():
        if arm.init is not None:
            granularity = arm.conversion.get("granularity", 1)
            assert arm.ffns == arm.routed / granularity + (arm.init in ("blend", "shared")), name
    assert {ARMS[name].ffns for name in grid.MAIN} == {1, 2} == set(grid.TOKEN_CHOICE)


def test_the_core_of_the_grid_comes_first_with_every_seed() -> None:
    runs = grid.main_runs()
    core = runs[: 3 * grid.NUM_CORE]
    assert {(run.arm, run.seed) for run in core} == {(a, s) for a in grid.MAIN[: grid.NUM_CORE] for s in range(3)}
    assert len({run.arm for run in core[: grid.NUM_CORE]}) == grid.NUM_CORE  # whole comparisons, seed by seed


def test_documents_are_held_out_and_none_is_lost() -> None:
    documents = [str(number) for number in range(50)]
    train_part, held_out = data.split(documents)
    assert len(held_out) == 5 and sorted(train_part + held_out) == sorted(documents)
    assert data.split(documents) == (train_part, held_out)


def test_windows_are_the_documents_end_to_end() -> None:
    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(int, text)]}

    found = data.windows(tokenizer, ["23", "4567", "8"], length=3)
    assert found.tolist() == [[1, 2, 3], [1, 4, 5], [6, 7, 1]]
    assert data.windows(tokenizer, ["23", "4567", "8"], most=2, length=3).tolist() == [[1, 2, 3], [1, 4, 5]]


def test_training_batches_share_out_domains_and_go_through_all() -> None:
    pools = {"a": torch.arange(6)[:, None], "b": torch.arange(100, 104)[:, None]}
    batches = [batch.flatten().tolist() for batch in data.training_batches(pools, rows=4, steps=3, seed=0)]
    assert all([row >= 100 for row in batch] == [False, True, False, True] for batch in batches)
    assert sorted(row for batch in batches for row in batch if row < 100) == list(range(6))
    of_b = [row for batch in batches for row in batch if row >= 100]
    assert sorted(of_b[:4]) == [100, 101, 102, 103]  # then it begins again
    again = data.training_batches(pools, rows=4, steps=3, seed=0)
    assert [batch.flatten().tolist() for batch in again] == batches
    other = data.training_batches(pools, rows=4, steps=3, seed=1)
    assert [batch.flatten().tolist() for batch in other] != batches
    with pytest.raises(ValueError, match="rows=3"):
        next(data.training_batches(pools, rows=3, steps=1, seed=0))


def test_library_modules_are_found() -> None:
    train_part, held_out = data.read_domain("code", Path())
    assert len(train_part) > 100 and held_out and not set(train_part) & set(held_out)


def test_learning_rate_warms_up_and_falls() -> None:
    factors = [train.learning_rate_factor(step, 200) for step in range(200)]
    peak = factors.index(max(factors))
    assert factors[:peak] == sorted(factors[:peak]) and factors[peak:] == sorted(factors[peak:], reverse=True)
    assert max(factors) == 1 and 0 < factors[0] < 0.1 and 0 <= factors[-1] < 0.001
    assert train.learning_rate_factor(0, 1) == 1  # too short to warm up


def test_checkpoints_begin_and_end() -> None:
    steps = train.checkpoint_steps(100)
    assert {0, 100} <= steps and len(steps) == train.CHECKPOINTS + 1


def test_parameter_groups_hold_every_parameter_once() -> None:
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"gate": torch.nn.Linear(2, 2, bias=False)})})
    model["mlp"]["experts"] = torch.nn.Linear(2, 3, bias=False)
    model["head"] = torch.nn.Linear(2, 4, bias=False)
    groups = train.parameter_groups(model, Run("ec-blend", learning_rate=0.5, experts_rate=2.0, router_rate=0.0))
    assert [(group["lr"], group["params"][0].numel()) for group in groups] == [(0.0, 4), (1.0, 6), (0.5, 8)]


def test_movement() -> None:
    """By part, relative to what it was; a SwiGLU's own gate_proj is no router."""
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"gate": torch.nn.Linear(2, 1, bias=False)})})
    model["mlp"]["experts"] = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2, 3))])  # two experts
    model["mlp"]["gate_proj"] = torch.nn.Linear(2, 2, bias=False)
    layers = torch.nn.ModuleDict({"layer": model})
    before = measure.copied_weights(layers)
    with torch.no_grad():
        model["mlp"]["gate"].weight *= 1.5
        model["mlp"]["experts"][0][0] *= 3
    found = measure.movement(layers, before)
    expected = {"router": 0.5, "experts": math.sqrt(12 / 6), "rest": 0, "experts_apart": 0.5}
    assert found == pytest.approx(expected)
    model["mlp"]["experts"][0].data[0] /= 3
    assert measure.movement(layers, before)["experts_apart"] == 0


def test_mutual_information() -> None:
    assert measure.mutual_information(torch.tensor([[2, 2], [6, 6]])) == pytest.approx(0, abs=1e-12)
    assert measure.mutual_information(torch.eye(4)) == pytest.approx(math.log(4))
    assert measure.mutual_information(torch.tensor([[3, 0], [0, 1]])) == pytest.approx(0.5623, abs=1e-4)


def test_a_finished_run_is_kept_until_its_recipe_changes(tmp_path: Path) -> None:
    run = Run("ec-blend", 1, conversion={"num_experts": 4})
    assert not store.finished(tmp_path, run)
    store.save(tmp_path, run, result(run, [3.0, 2.123456789]))
    assert store.finished(tmp_path, run) and not list(tmp_path.glob("*.unfinished"))
    assert store.read(tmp_path, run)["final"]["loss"] == 2.123457
    assert not store.finished(tmp_path, Run("ec-blend", 1, conversion={"num_experts": 8}))
    assert not store.finished(tmp_path, Run("ec-blend", 2, conversion={"num_experts": 4}))


def test_a_killed_grid_goes_on(tmp_path: Path) -> None:
    runs = grid.main_runs((0,), ("dense", "tc-copy2", "ec-blend"))
    done: list[str] = []

    class Bench:
        def execute(self, run: Run) -> dict[str, Any]:
            if len(done) == 2 and run.arm == "ec-blend":
                done.append("killed")
                raise KeyboardInterrupt
            done.append(run.arm)
            return result(run, [2.0])

    with pytest.raises(KeyboardInterrupt):
        command.run_missing(Bench(), runs, tmp_path)  # type: ignore[arg-type]
    command.run_missing(Bench(), runs, tmp_path)  # type: ignore[arg-type]
    assert done == ["dense", "tc-copy2", "killed", "ec-blend"]
    assert all(store.finished(tmp_path, run) for run in runs)


def test_reach_is_where_the_curve_first_comes_down() -> None:
    curve = result(Run("dense"), [4.0, 3.0, 3.5, 2.0])["curve"]
    assert tables.reach(curve, 3.5) == 50
    assert tables.reach(curve, 2.5) == pytest.approx(200 + 200 / 3)
    assert tables.reach(curve, 1.9) is None
    assert tables.reach(curve, 4.0) == 0


def test_differences_are_of_the_same_seed() -> None:
    ours = {seed: result(Run("ec-blend", seed), [2.0 + seed]) for seed in (0, 1, 2)}
    theirs = {seed: result(Run("tc-copy2", seed), [1.5 + seed]) for seed in (1, 2, 3)}
    assert tables.differences(ours, theirs) == [0.5, 0.5]
    assert tables.signed([0.5, -0.1]) == "+0.2000 (-0.1000 to +0.5000)"
    assert tables.signed([]) == "" and tables.mean_and_spread([1.0]) == "1.0000"
    assert tables.mean_and_spread([1.0, 2.0, 1.5]) == "1.5000 ± 0.5000"


def test_the_card_says_where_expert_choice_loses(tmp_path: Path) -> None:
    """And not where it wins; both follow from the figures."""
    losses = {"dense": 2.5, "tcq-copy2": 2.0, "ec-blend": 2.25, "ec-copy2": 1.75}
    results = [result(Run(arm, seed), [3.0, loss]) for arm, loss in losses.items() for seed in (0, 1)]
    groups = tables.grouped(results)
    seconds = {"tcq-copy2": 0.5, "ec-copy2": 1.0}
    missing = ["main.mixture.ec-shared.seed0", "main.mixture.ec-shared.seed2", "pool.mixture.ec-copy2.8k.seed0"]
    card = report.render(groups, "plot.png", "python -m benchmarks quality", seconds, missing)
    assert "expert choice, blend (2 FFNs) by 0.2500" in card and "copy (2 FFNs) by" not in card
    assert "main.mixture.ec-shared (seed 0, 2); pool.mixture.ec-copy2.8k (seed 0)" in card
    (row,) = [line for line in card.splitlines() if line.startswith("| expert choice, copy |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[4:7] == ["1.7500 ± 0.0000", "-0.7500 (-0.7500 to -0.7500)", "-0.2500 (-0.2500 to -0.2500)"]
    assert cells[7:] == ["1.25", "1000", "0.62"]  # 1.25 times fewer tokens, at twice the time
    (plot,) = plots.draw(groups, tmp_path / "plot.png", seconds)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plots.draw({key: found for key, found in groups.items() if key[2] != "dense"}, plot, seconds) == []


def test_arms_of_equal_flops_are_drawn_beside_each_other(tmp_path: Path) -> None:
    arms = ("dense", "tcq-copy1", "tcq-halves", "tcq-copy2", "ec-copy2", "ec-shared")
    runs = [Run(arm, 0, part) for arm in arms for part in ("main", "gentle")]
    (plot,) = plots.draw_equal_flops(tables.grouped([result(run, [2.0, 1.5]) for run in runs]), tmp_path / "plot.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plots.draw_equal_flops(tables.grouped([result(run, [2.0]) for run in runs[1:]]), plot) == []


def test_the_card_shows_domains_and_shorter_runs(tmp_path: Path) -> None:
    routes = {"domain_shares": [[[0.25] * 4] * 8] * 2, "load_min": 0.9, "load_max": 1.1}
    pairs = {"accuracy": 0.5, "pairs": 60}
    results = [result(Run(arm), [2.0], routes=routes) for arm in ("ec-copy2", "tcq-copy2")]
    results += [
        result(Run("dense"), [2.5], pairs_before=pairs),
        result(Run("ec-copy2", 0, "shorter", "125-steps", steps=125), [1.9]),
    ]
    groups = tables.grouped(results)
    assert "| expert choice, copy (2) | 125-steps | 1.60 | 1.9000 | -0.1000 |" in tables.shorter_table(groups)
    card = report.render(groups, "quality.png", "command", {}, [])
    assert "BLiMP of the parent: 0.500 of 60 pairs; half is chance, and the standard error is 0.065." in card
    (plot,) = plots.draw_domains(groups, tmp_path / "domains.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plots.draw_domains(tables.grouped(results[1:]), plot) == []


def test_an_unchanged_arm_of_another_recipe_is_no_comparison() -> None:
    base, change = Run("ec-blend"), Run("ec-blend", part="rates", label="x", experts_rate=2.0)
    longer = Run("ec-blend", part="longer", label="y", steps=2 * base.steps)
    groups = tables.grouped([result(base, [2.0]), result(change, [1.5]), result(longer, [1.5])])
    assert "| -0.5000 |" in tables.ablation_table(groups, "rates")
    assert "-0.5000" not in tables.ablation_table(groups, "longer")
    gentle = Run("ec-blend", part="gentle", learning_rate=1e-3)
    softmax = Run("ec-blend", part="scores", label="z", learning_rate=1e-3)
    groups |= tables.grouped([result(gentle, [3.0]), result(softmax, [2.75])])
    assert "| -0.2500 |" in tables.ablation_table(groups, "scores")  # at its own learning rate
    wide = result(Run("ec-blend", part="capacity", label="c2"), [1.5])
    wide["parameters"] = {"total": 2, "active": 2}
    groups |= tables.grouped([wide])
    assert "-0.5000" not in tables.ablation_table(groups, "capacity")  # more active parameters


def test_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, expected in (
        (["--parts", "mian"], "parts=mian"),
        (["--seeds", "9"], "seeds=9"),
        (["--data", str(tmp_path / "nowhere")], "parent-folder="),
        (["--parent", "5M"], "parent-folder=None holds no config.json of 5M"),
        (["--train-parent"], "train-parent=True is for --parent 5M"),
        (["--parent", "5M", "--train-parent", "--parent-folder", str(tmp_path), "--data", str(tmp_path)], "data="),
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and expected in line


def test_a_part_leaves_the_rest_of_the_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = [Run("dense"), Run("ec-copy2", part="shorter", label="125-steps", steps=125)]
    for run in runs:
        store.save(tmp_path / "quality", run, result(run, [2.0]))
    given: list[Any] = []
    monkeypatch.setattr(command.machine, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "write", lambda *arguments, quick: given.extend(arguments) or [])
    command.main(["--parts", "shorter", "--report"])
    results, missing, seconds, parent = given
    assert parent == "stories260K"
    assert [found["name"] for found in results] == [run.name for run in runs]
    assert "main.mixture.dense.seed1" in missing and seconds == {}


def test_recipes_are_json() -> None:
    for run in grid.all_runs():
        assert json.loads(json.dumps(run.recipe()))["arm"] in ARMS


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> execute.Bench:
    """A tiny random parent, and a little English in place of every domain."""
    folder = tmp_path_factory.mktemp("data")
    write_dense(folder / "stories260K" / "hf", "Llama")
    documents = write_text(folder / "text.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "read_domain", lambda domain, _: data.split(documents))
        patch.setattr(data, "HELD_OUT_WINDOWS", 4)
        patch.setattr(data, "CALIBRATION_WINDOWS", 8)
        return execute.Bench(folder, train_windows=16, pairs_per_file=0)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs_and_is_measured(arm: str, bench: execute.Bench, tmp_path: Path) -> None:
    run = Run(arm, steps=2, rows=8, pool_rows=4)
    store.save(tmp_path, run, bench.execute(run))
    found = store.read(tmp_path, run)
    assert found["curve"][0]["tokens"] == 0
    assert found["curve"][-1]["tokens"] == found["steps"] * 8 * data.LENGTH
    assert set(found["final"]["losses"]) == set(data.MIXTURE) and set(found["final"]["losses_elsewhere"]) == {"stories"}
    assert tables.curve_loss(found["curve"][-1]) < tables.curve_loss(found["curve"][0])
    routed = ARMS[arm].init is not None
    assert ("routes" in found["final"]) == routed == ("experts" in found["movement"])
    by_threshold = routed and not arm.startswith(("tc-", "tcb-"))
    assert ("gap" in found["final"]) == by_threshold
    assert ("loss_averaged_thresholds" in found["final"]) == (by_threshold and not arm.startswith("th"))
    if routed:
        shares = torch.tensor(found["final"]["routes"]["domain_shares"])
        assert shares.shape == (2, ARMS[arm].conversion.get("num_experts", 8), 4)
    if arm.startswith("tc"):
        assert found["final"]["routes"]["experts_per_token"] == ARMS[arm].routed


def _changes() -> list[Run]:
    """A run for each arm, conversion and config of the grid, and no more."""
    found = {json.dumps([run.arm, run.conversion, run.config]): run for run in grid.all_runs()}
    return list(found.values())


@pytest.mark.parametrize("run", _changes(), ids=lambda run: run.name)
def test_every_change_of_the_grid_builds(run: Run, bench: execute.Bench) -> None:
    model, parameters = bench.build(run)
    for field, value in run.config.items():
        assert getattr(model.config, field) == value
    if run.part in ("one", "one-gentle"):
        routers = sum(block.gate.weight.numel() for block in sparse_blocks(model).values())
        assert parameters["active"] - routers == bench.build(Run("dense"))[1]["active"]
    if run.conversion.get("num_experts") == 1:  # the dense model of twice the width: every token takes the one expert
        measure.calibrate(model, {"prose": bench.windows["prose"].calibration}, 4)
        routes = measure.losses_and_routes(model, {"prose": bench.windows["prose"].held_out})[1]
        assert routes["uncovered"] == 0


def test_steps_are_timed(bench: execute.Bench) -> None:
    found = timing.step_seconds(bench, [Run("dense"), Run("dense-matched"), Run("th-copy2")], rounds=1)
    assert found["seconds"].keys() == {"dense", "th-copy2"} and min(found["seconds"].values()) > 0


def test_equal_active_parameters_where_flops_are_equal(bench: execute.Bench) -> None:
    """Within the router, of arms with as many FFNs per token; and dense-matched's steps make up for one FFN."""
    active = {arm: bench.build(Run(arm))[1] for arm in ("dense", "tc-copy2", "ec-blend", "ec-shared", "tcq-copy1")}
    assert active["tc-copy2"]["active"] == active["ec-blend"]["active"] == active["ec-shared"]["active"]
    routers = active["tcq-copy1"]["active"] - active["dense"]["active"]
    assert active["tc-copy2"]["active"] == active["dense"]["active"] + active["dense"]["ffn"] + routers
    steps = bench.steps_of(Run("dense-matched", steps=100), active["dense"])
    assert steps * active["dense"]["active"] == pytest.approx(100 * (active["tc-copy2"]["active"] - routers), rel=0.01)


@pytest.mark.parametrize("arm", [name for name in ARMS if name.startswith(("ec-", "tc-copy", "tcb", "tcq"))])
def test_arms_begin_where_the_parent_is(arm: str, bench: execute.Bench) -> None:
    rows = bench.windows["prose"].held_out
    expected = measure.row_losses(bench.build(Run("dense"))[0], rows)
    assert torch.allclose(measure.row_losses(bench.build(Run(arm))[0], rows), expected, atol=1e-5)


def test_training_thresholds_survive_a_checkpoint(bench: execute.Bench) -> None:
    model = bench.build(Run("th-blend"))[0]
    gate = model.model.layers[0].mlp.gate
    before = gate.threshold.clone(), gate.threshold_updates.clone()
    with measure.kept_thresholds(model):
        measure.calibrate(model, {"prose": bench.windows["prose"].calibration}, 4)
        assert not torch.equal(gate.threshold, before[0])
    assert torch.equal(gate.threshold, before[0]) and torch.equal(gate.threshold_updates, before[1])


def test_windows_of_all_parts_are_apart(bench: execute.Bench) -> None:
    for windows in bench.windows.values():
        parts = [
            {tuple(row) for row in part.tolist()} for part in (windows.train, windows.calibration, windows.held_out)
        ]
        assert len(windows.train) == 16 and not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]


def test_the_parent_is_trained_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stopped after its second checkpoint, the same call ends with the weights of a run that was not stopped."""
    documents = write_text(tmp_path / "text.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    monkeypatch.setattr(data, "read_domain", lambda domain, _: data.split(documents))
    monkeypatch.setattr(pretrain, "read_domain", lambda domain, _: data.split(documents))
    monkeypatch.setattr(data, "CALIBRATION_WINDOWS", 2)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(pretrain, "SIZES", {**sizes, "num_key_value_heads": 1, "tie_word_embeddings": True})
    for name, value in {"VOCABULARY": 300, "ROWS": 6, "SAVE_EVERY": 2}.items():
        monkeypatch.setattr(pretrain, name, value)
    monkeypatch.setattr(pretrain, "save", lambda name, found: store.save(tmp_path, Run("dense"), found))
    monkeypatch.setattr(store, "rounded", lambda value: value)
    found = json.loads(pretrain.train_parent(tmp_path, tmp_path / "whole", steps=6).read_text())
    assert found["losses"].keys() == set(data.DOMAINS) and found["losses"]["prose"] < 5.7  # of 300 tokens
    one_step, taken = pretrain._step, []

    def dies(*arguments: Any) -> float:
        taken.append(1)
        if len(taken) == 5:
            raise KeyboardInterrupt
        return one_step(*arguments)

    monkeypatch.setattr(pretrain, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train_parent(tmp_path, tmp_path / "stopped", steps=6)
    pretrain.train_parent(tmp_path, tmp_path / "stopped", steps=6)
    assert len(taken) == 5 + 2  # from step 4
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not list((tmp_path / "stopped").glob("unfinished*"))
