"""The benchmarks run and write what they measured; and bounds on a few ratios, generous because machines are noisy."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_dense

from benchmarks import block, decode, evaluation, gpu, machine, model, operations, rejected, router, scaling
from benchmarks.gpu.parts import PARTS
from benchmarks.harness import interleaved, interleaved_laps, summarize
from benchmarks.peers import Sizes
from modeling_ecmoe import bounded_ecmoe, experts_ecmoe

TINY = Sizes(32, 48, 4, 2, layers=1, heads=4, vocabulary=64)
ATTEMPTS = 3


@pytest.fixture(autouse=True)
def no_filling() -> None:
    """The other tests fill torch.empty with NaN, which costs time."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results go, and sizes that take no time; everything on the CPU."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    for module in (decode, model, router, scaling):
        monkeypatch.setattr(module, "device", lambda: "cpu")
    monkeypatch.setitem(model.SIZES, "cpu", (TINY, (2, 8)))
    monkeypatch.setitem(decode.SIZES, "cpu", TINY)
    monkeypatch.setitem(scaling.SIZES, "cpu", TINY)
    monkeypatch.setattr(scaling, "TOKENS", 64)
    monkeypatch.setitem(router.SIZES, "small", (TINY, 64))
    monkeypatch.setitem(block.SIZES, "small", (32, 48, 4, 64, 2))
    return tmp_path


def read(path: Path) -> dict[str, Any]:
    """The figures, which name the machine and the commit and hold no number that is not one."""
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in {path.name}"))
    assert found["machine"]["versions"]["torch"] and found["commit"]
    return found


def test_model(results: Path) -> None:
    model.main(["--rounds", "1"])
    rows = read(results / "model-cpu.json")["rows"]
    assert set(rows) == {"forward + backward", "optimiser", "whole step"}
    names = {"expert choice", "dense", "Mixtral grouped_mm", "Mixtral eager"}
    assert all(set(row) == names and row["dense"]["ratio"] == 1 for row in rows.values())


def test_one_compilation_serves_all_batches_of_a_shape() -> None:
    torch._dynamo.reset()
    compared = model.models(TINY, torch.float32, "cpu")["expert choice"].train()
    compared.config.use_cache = False
    forward = torch.compile(compared, fullgraph=True, backend="aot_eager")
    same = [torch.randint(TINY.vocabulary, (2, 8)) for _ in range(3)]
    assert model.count_compilations(forward, same) == {"graphs": 1, "breaks": 0}
    other = [torch.randint(TINY.vocabulary, (3, 5))]
    assert model.count_compilations(forward, other)["graphs"] > 0  # the count sees a compilation
    torch._dynamo.reset()


def test_decode(results: Path) -> None:
    decode.main(["--batches", "1", "3", "64", "--new-tokens", "2", "--prompt", "4", "--rounds", "1"])
    found = read(results / "decode-cpu.json")
    assert set(found["rows"]) == {"1", "3", "64"}
    assert "Mixtral batched_mm" in found["rows"]["3"] and "Mixtral batched_mm" not in found["rows"]["64"]
    assert found["rows"]["1"][decode.REFERENCE]["over Mixtral"] == 1
    assert 1.5 < found["experts per token"]["64"] < 2.5  # the thresholds were calibrated to c = 2


def test_compiled_decoding_is_plain_decoding() -> None:
    """Static shapes and cache: the same next tokens as with a growing cache, by one graph."""
    torch._dynamo.reset()
    ours = decode.models(TINY, torch.float32, "cpu")["expert choice"].eval()
    tokens = torch.randint(TINY.vocabulary, (2, 7), generator=torch.Generator().manual_seed(3))
    decode.calibrate_thresholds(ours, [{"input_ids": tokens}])
    cache = decode.StaticCache(config=ours.config, max_cache_len=7)
    with torch.no_grad():
        plain = ours(tokens).logits.argmax(-1)[:, 4:]
        ours(tokens[:, :4], cache=cache)
        step = decode.compiled_step(ours, cache, backend="aot_eager")
        torch._dynamo.utils.counters.clear()
        found = torch.stack([step(token.clone()) for token in tokens[:, 4:].split(1, dim=1)], dim=1)
    assert torch.equal(found, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_scaling(results: Path) -> None:
    plot = results / "scaling.png"
    scaling.main(
        ["--tokens", "32", "64", "--experts", "4", "8", "--capacities", "1", "2", "--rounds", "1", "--plot", str(plot)]
    )
    found = read(results / "scaling-cpu.json")
    assert {axis: list(panel) for axis, panel in found["panels"].items()} == {
        "T": ["32", "64"],
        "E": ["4", "8"],
        "c": ["1.0", "2.0"],
    }
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size < 100_000


def test_scaling_says_what_it_left_out(results: Path) -> None:
    arguments = ["--tokens", "32", "64", "--experts", "4", "--capacities", "1", "--rounds", "1", "--longest", "0"]
    options = ["--plot", str(results / "scaling.png")]
    with pytest.raises(SystemExit, match="longest"):
        scaling.main(arguments + options)


def test_exponent() -> None:
    panel = {x: {"seconds": 0.3 * x**1.5} for x in (1, 2, 8)}
    assert scaling.exponent(panel) == 1.5
    assert scaling.exponent({1: {"seconds": 0.3}}) is None


def test_router(results: Path) -> None:
    router.main(["--sizes", "small", "--rounds", "1", "--selections", "1"])
    found = read(results / "router-cpu.json")["small"]
    assert set(found["selection"]) == {"plain", "[0, 3]", "[1, 4]", "[1, 2]"}
    assert found["parts"]["block"]["ratio"] == 1 and len(found["parts"]) == 5


def test_block(results: Path) -> None:
    block.main(["--sizes", "small", "--dtypes", "float32", "--rounds", "1"])
    rows = read(results / f"block-{block.device()}.json")["small float32"]["rows"]
    assert rows[block.LIMIT]["ratio"] == 1
    assert 0 < rows["expert choice"]["kept_bytes"] < rows["Mixtral eager"]["kept_bytes"]


def test_rejected(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rejected.PRODUCTS, "small", (32, 48, 4, 64, 2))
    monkeypatch.setattr(rejected, "POOLS", ((2048, 8, 1),))
    before = experts_ecmoe._PART_BYTES, bounded_ecmoe.Prices.of
    rejected.main(["--products", "small", "--rounds", "1", "--selections", "1"])
    found = read(results / "rejected.json")
    assert set(found["products, small"]) >= set(rejected.PARTS)
    rows = found["choice within [0, 3], 2048 tokens, 8 experts, skew 1"]
    assert rows[rejected.BEST]["score"] == 1 and 0.99 < rows[rejected.OURS]["score"] < 1.001
    projections = rows["50 projections of 1,024 tokens"]
    assert 0.9 < projections["score"] < 1.001 and rows[rejected.OURS]["load"] < projections["load"]
    assert before == (experts_ecmoe._PART_BYTES, bounded_ecmoe.Prices.of)


def test_laps_are_taken_in_order_and_apart() -> None:
    calls: list[str] = []
    parts: dict[str, list[Callable[[], object]]] = {
        name: [lambda name=name: calls.append(name), lambda name=name: calls.append(name + "'")] for name in "ab"
    }
    laps = interleaved_laps(parts, rounds=3, warmup=1)
    assert all(len(values) == 3 and all(len(one) == 2 for one in values) for values in laps.values())
    assert len(calls) == 16 and all(calls[i + 1] == calls[i] + "'" for i in range(0, 16, 2))


def within(measure: Callable[[], dict[str, float]], bounds: dict[str, float]) -> None:
    """Fails when a ratio stays above its bound in each of a few measurements."""
    for _ in range(ATTEMPTS):
        found = measure()
        if all(found[name] <= bound for name, bound in bounds.items()):
            return
    pytest.fail(f"ratios {found} above {bounds} in {ATTEMPTS} measurements")


def test_the_block_keeps_its_ratios() -> None:
    """To its own matrix products, and to the fastest of Mixtral's implementations."""
    steps = block.candidates(256, 704, 8, 1024, 2, torch.float32, "cpu", compiles=False)
    names = ("expert choice", "matrix products", "Mixtral eager", "Mixtral grouped_mm")
    steps = {name: steps[name] for name in names}

    def measure() -> dict[str, float]:
        seconds = interleaved(steps, rounds=7, warmup=1)
        seconds["Mixtral"] = [
            min(pair) for pair in zip(seconds["Mixtral eager"], seconds["Mixtral grouped_mm"], strict=True)
        ]
        over_mixtral = summarize(seconds, "Mixtral")["expert choice"]["ratio"]
        return {
            "matrix products": summarize(seconds, "matrix products")["expert choice"]["ratio"],
            "Mixtral": over_mixtral,
        }

    within(measure, {"matrix products": 1.35, "Mixtral": 1.25})


def test_router_and_choice_are_a_small_part_of_the_block() -> None:
    steps = router.parts(Sizes(256, 704, 8, 2), 1024, torch.float32)
    steps = {name: steps[name] for name in ("block", "router + choice")}
    within(
        lambda: {"share": summarize(interleaved(steps, rounds=7, warmup=1), "block")["router + choice"]["ratio"]},
        {"share": 0.15},
    )


def test_a_slow_ratio_is_seen() -> None:
    """Negative control."""
    with pytest.raises(pytest.fail.Exception, match="above"):
        within(lambda: {"x": 2.0}, {"x": 1.9})


@pytest.mark.parametrize("name", [name for name in PARTS if name != "tests"])
def test_the_parts_for_a_gpu_run_on_a_cpu(name: str) -> None:
    """At sizes that show nothing else; every figure is a number and can be written."""
    found: list[dict[str, Any]] = []
    PARTS[name].run(True, lambda figures: found.append(json.loads(json.dumps(figures, allow_nan=False))))
    assert found and found[-1]


def test_a_part_that_takes_too_long_leaves_the_rest(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setitem(PARTS, "tests", PARTS["tests"]._replace(seconds=0.5))
    monkeypatch.setattr(gpu, "LEAST", 0)
    gpu.main(["--tiny", "--parts", "tests", "ceilings", "--output", str(tmp_path), "--minutes", "2"])
    said = capsys.readouterr().out
    assert "tests: cut after 0 s" in said and "ceilings: done" in said
    assert json.loads((tmp_path / "ceilings.json").read_text())["flops"] > 0
    assert json.loads((tmp_path / "machine.json").read_text())["versions"]["torch"]


def test_what_an_evaluation_costs(
    results: Path, tmp_path: Path, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part is timed in every round, of the first layer alone."""
    write_dense(tmp_path / "dense", "Llama", max_position_embeddings=512)
    make_model("Llama", vocab_size=300, max_position_embeddings=512).save_pretrained(tmp_path / "moe")
    arguments = ["evaluation", str(tmp_path / "dense"), str(tmp_path / "moe")]
    monkeypatch.setattr("sys.argv", [*arguments, "--layers=1", "--tokens=512", "--rounds=2"])
    evaluation.main()
    found = json.loads((results / "evaluation-moe.json").read_text())
    assert len(found["processor_seconds"]) == 6 and all(len(row) == 2 for row in found["processor_seconds"].values())
    assert found["over_dense"]["dense, forward pass"] == 1
    assert evaluation.load(arguments[2], 1).config.num_hidden_layers == 1


def test_operations_of_one_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["operations", "--calls", "2"])
    operations.main()
    said = capsys.readouterr().out
    assert said.count("| aten::mm | ") == 2 and "expert choice: " in said and "Mixtral: " in said
