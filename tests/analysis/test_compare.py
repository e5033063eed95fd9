"""The comparison: figures against naive counts, the same text for everyone, and a verdict that only reads figures."""

import copy
import itertools
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from checkpoints import STORIES_MODEL, STORIES_TEXT, write_dense, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from ecmoe.analysis import AnalysisError, compare
from ecmoe.analysis import comparison as module
from ecmoe.analysis.amounts import Amounts, choose, described, estimate, in_words
from ecmoe.analysis.cli import main
from ecmoe.analysis.text import fixed_batches, packed
from ecmoe.analysis.variants import BALANCE_COEFFICIENT, DROPLESS, configure, variants_of
from ecmoe.analysis.verdict import verdict
from ecmoe.conversion import convert
from modeling_ecmoe import EcMoeLlamaModel, calibrate_thresholds, sparse_blocks

EXPERTS, TOKENS = 4, 512
TOKENS_CHOOSE = {"routing": "token_choice", "inference_routing": "token_choice", "min_experts_per_token": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense checkpoint, its expert-choice conversion with decided routers, and text."""
    folder = tmp_path_factory.mktemp("compare")
    write_dense(folder / "dense", "Llama")
    text = write_text(folder / "text.txt", documents=12)
    convert(str(folder / "dense"), str(folder / "raw"), num_experts=EXPERTS, init="noise", text=str(text), ratio=0.1)
    model = AutoModelForCausalLM.from_pretrained(folder / "raw")
    for block in sparse_blocks(model).values():
        block.gate.weight.data.mul_(5)
    model.save_pretrained(folder / "ecmoe")
    AutoTokenizer.from_pretrained(folder / "raw").save_pretrained(folder / "ecmoe")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of four rows, and one round of timing after the warm-up."""
    for name, value in (("POOL", TOKENS), ("ROUNDS", 1), ("CALIBRATION_BATCHES", 2)):
        monkeypatch.setattr(module, name, value)


def read(place: Path, steps: int = 0, max_tokens: int = 2 * TOKENS) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(place / "ecmoe")
    return module._read(tokenizer, str(place / "text.txt"), "text", 128, steps, max_tokens)


def entry_of(result: dict[str, Any], name: str, k: int) -> dict[str, Any]:
    (found,) = (e for e in result["variants"] if (e["name"], e["num_choices"]) == (name, k))
    return found


def figures(pairs_of_passes: list[oracle.Pairs], asked: int | None = None) -> dict[str, float]:
    """By counting (expert, token) pairs one by one; asked: choices of each pass, when some may have been dropped."""
    loads = [[sum(e == expert for e, _ in pairs) for expert in range(EXPERTS)] for pairs in pairs_of_passes]
    means = [sum(load) / EXPERTS for load in loads]
    deviations = [
        math.sqrt(sum((n - mean) ** 2 for n in load) / EXPERTS) for load, mean in zip(loads, means, strict=True)
    ]
    chosen = sum(map(len, pairs_of_passes))
    covered = sum(len({token for _, token in pairs}) for pairs in pairs_of_passes)
    return {
        "dropped": 0 if asked is None else 1 - chosen / (asked * len(pairs_of_passes)),
        "no_expert": 1 - covered / (TOKENS * len(pairs_of_passes)),
        "experts_per_token": chosen / (TOKENS * len(pairs_of_passes)),
        "load_max": sum(max(load) / mean for load, mean in zip(loads, means, strict=True)) / len(loads),
        "load_cv": sum(d / mean for d, mean in zip(deviations, means, strict=True)) / len(loads),
    }


def test_figures_are_those_of_a_naive_count(place: Path, small: None) -> None:
    """The oracle's routes, counted pair by pair, and the model's own loss."""
    result = compare(str(place / "ecmoe"), str(place / "text.txt"), max_tokens=2 * TOKENS)
    assert (result["held_out_tokens"], result["steps"], len(result["variants"])) == (2 * TOKENS, 0, 16)
    text = read(place)
    for variant in variants_of(EXPERTS):
        if variant.bounds_experts or variant.trains_by_threshold or variant.key == "nudged-bias":
            continue  # bounded choice has no oracle of its own; threshold training is in test_report
        model = AutoModelForCausalLM.from_pretrained(place / "ecmoe")
        configure(model, variant)
        calibrate_thresholds(model, [{n: t for n, t in b.items() if n != "labels"} for b in text.training[:2]])
        training, inference, losses = [], [], []
        k, factor = variant.num_choices, variant.fields["token_choice_capacity_factor"]
        for batch in text.held_out:
            with torch.no_grad():
                seen = model.train()(**batch, use_cache=False, output_router_logits=True).router_logits
                output = model.eval()(**batch, use_cache=False, output_router_logits=True)
            losses.append((output.loss.item(), int((batch["labels"][:, 1:] != -100).sum())))
            for scores in (logits.softmax(-1) for logits in seen):
                if variant.is_token_choice:
                    training.append(oracle.token_choice(scores, k, factor))
                else:
                    training.append(oracle.expert_choice(scores, k, [range(TOKENS)]))
            for block, logits in zip(sparse_blocks(model).values(), output.router_logits, strict=True):
                scores, threshold = logits.softmax(-1), block.gate.threshold.tolist()
                if variant.is_token_choice:
                    inference.append(oracle.token_choice(scores, k))
                else:
                    inference.append(oracle.threshold_routes(scores, threshold, 0, None))
        entry = entry_of(result, variant.name, k)
        asked = k * TOKENS if variant.is_token_choice else None
        for name, value in figures(training, asked).items():
            assert entry["training"][name] == pytest.approx(value, abs=1e-9), (variant.name, name)
        for name, value in figures(inference).items():
            if name != "dropped":
                assert entry["inference"][name] == pytest.approx(value, abs=1e-9), (variant.name, name)
        mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
        assert entry["inference"]["loss"] == pytest.approx(mean, abs=1e-5)
        assert entry["gap"] == pytest.approx(entry["inference"]["loss"] - entry["training"]["loss"])
    assert entry_of(result, "token choice, capacity 1.0", 1)["training"]["dropped"] > 0.05


def test_what_each_way_of_routing_promises(place: Path, small: None) -> None:
    result = compare(str(place / "ecmoe"), str(place / "text.txt"), max_tokens=TOKENS)
    for k in (1, 2):
        for name in ("expert choice", "expert choice, at least 1", f"expert choice, at most {k + 1}"):
            entry = entry_of(result, name, k)
            assert entry["training"]["load_max"] == 1 and entry["training"]["load_cv"] == 0
            assert entry["training"]["dropped"] == 0 and entry["training"]["experts_per_token"] == k
            assert entry["auxiliary_losses"] == []
        by_quantiles = entry_of(result, "token choice, by quantiles", k)
        for phase in ("training", "inference"):
            assert by_quantiles[phase]["experts_per_token"] == k and by_quantiles[phase]["no_expert"] == 0
        assert by_quantiles["training"]["load_max"] == 1 and by_quantiles["training"]["dropped"] == 0
        assert by_quantiles["is_token_choice"] and by_quantiles["auxiliary_losses"] == []
        covered = entry_of(result, "expert choice, at least 1", k)
        assert covered["training"]["no_expert"] == covered["inference"]["no_expert"] == 0
        dropless = entry_of(result, DROPLESS, k)
        assert dropless["training"]["dropped"] == dropless["training"]["no_expert"] == dropless["gap"] == 0
        assert dropless["loss_against_dropless"] == {"difference": 0, "standard_error": 0}
        assert dropless["step"]["ratios"] == [1] and dropless["auxiliary_losses"] == ["balance"]
    assert entry_of(result, "expert choice", 1)["training"]["no_expert"] > 0
    json.dumps(result, allow_nan=False)


def test_training_changes_the_loss_on_the_same_batches(
    place: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every variant trains on the same batches in the same order; lower loss for all, and not the same for all."""
    seen: list[list[str]] = []

    def watch(model: Any, batches: list[dict[str, torch.Tensor]], steps: int, on_pass: Any) -> None:
        seen.append([str(batch["input_ids"].tolist()) for batch in batches])
        module_train(model, batches, steps, on_pass)

    module_train = module.train
    monkeypatch.setattr(module, "LEARNING_RATE", 3e-3)
    before = compare(str(place / "ecmoe"), str(place / "text.txt"), max_tokens=TOKENS)
    monkeypatch.setattr(module, "train", watch)
    after = compare(str(place / "ecmoe"), str(place / "text.txt"), steps=8, max_tokens=TOKENS)
    assert len(seen) == 18 and all(batches == seen[0] for batches in seen) and len(set(seen[0])) == 8
    for one in before["variants"]:
        two = entry_of(after, one["name"], one["num_choices"])
        assert two["inference"]["loss"] < one["inference"]["loss"] - 0.05, one["name"]
    assert len({e["inference"]["loss"] for e in after["variants"]}) > 15
    nudged, dropless = (entry_of(after, name, 2) for name in ("token choice, nudged bias", DROPLESS))
    assert nudged["inference"]["loss"] != dropless["inference"]["loss"] and nudged["auxiliary_losses"] == []


def test_the_balance_loss_is_token_choices_alone() -> None:
    for variant in variants_of(8):
        by_loss = variant.is_token_choice and variant.key not in ("nudged-bias", "quantiles")
        assert variant.fields["router_aux_loss_coef"] == (BALANCE_COEFFICIENT if by_loss else 0)


@pytest.mark.parametrize(("own", "numbers"), [(1.0, {1, 2}), (2, {1, 2}), (4, {4}), (7.5, {1, 2}), (8, {1, 2})])
def test_a_checkpoint_of_many_experts_per_token_is_compared_with_as_many(own: float, numbers: set[int]) -> None:
    """But for one whose tokens have all of the experts, which leaves nothing to choose."""
    assert {v.num_choices for v in variants_of(8, own)} == numbers


@pytest.mark.parametrize("rate", [None, 0.0])
def test_every_token_choice_begins_with_the_bias_of_the_checkpoint(
    place: Path, small: None, rate: float | None
) -> None:
    """Of one whose tokens choose, as GLM-4-MoE's conversion; thresholds of expert choice are no such bias."""
    routing = TOKENS_CHOOSE if rate is not None else {}
    folder = place / f"bias-{rate}"
    if not folder.is_dir():
        model = AutoModelForCausalLM.from_pretrained(place / "ecmoe", token_choice_bias_update_rate=rate, **routing)
        for block in sparse_blocks(model).values():
            block.gate.threshold.copy_(torch.tensor([0.3, 0.0, -0.2, 0.1]))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(place / "ecmoe").save_pretrained(folder)
    result = compare(
        str(folder), str(place / "text.txt"), max_tokens=TOKENS, routings=["dropless:1", "nudged-bias:1"], timing=False
    )
    dropless, nudged = (entry_of(result, name, 1)["inference"] for name in (DROPLESS, "token choice, nudged bias"))
    assert dropless == nudged
    batch = read(place, max_tokens=TOKENS).held_out[0]
    model = AutoModelForCausalLM.from_pretrained(folder)
    configure(model, next(v for v in variants_of(EXPERTS, 1, rate) if v.name == DROPLESS))
    with torch.no_grad():
        logits = model(**batch, use_cache=False, output_router_logits=True).router_logits
    bias = 0 if rate is None else torch.tensor([0.3, 0.0, -0.2, 0.1])
    loads = [(each.softmax(-1) - bias).argmax(-1).bincount(minlength=EXPERTS) for each in logits]
    expected = sum(float(load.max() / (TOKENS / EXPERTS)) for load in loads) / len(loads)
    assert dropless["load_max"] == pytest.approx(expected, abs=1e-6)


def test_few_experts_leave_out_what_they_cannot_have() -> None:
    assert [(v.num_choices, v.name) for v in variants_of(2)] == [
        (1, "token choice, capacity 1.0"),
        (1, "token choice, capacity 1.25"),
        (1, DROPLESS),
        (1, "token choice, nudged bias"),
        (1, "token choice, by quantiles"),
        (1, "expert choice"),
        (1, "expert choice, at least 1"),
        (1, "threshold"),
    ]
    with pytest.raises(AnalysisError, match="num_experts=4 with num_expert_groups=4 leaves nothing to choose"):
        variants_of(4, 4, num_groups=4)
    assert {v.num_choices for v in variants_of(8, 2, num_groups=2)} == {2, 4}
    assert len(variants_of(3)) == 17 and len(variants_of(4)) == 18
    with pytest.raises(AnalysisError, match="num_experts=1 leaves nothing to choose"):
        variants_of(1)


def test_rows_are_full_and_documents_apart() -> None:
    rows = list(packed(iter([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11]]), 4))
    assert rows == [
        {"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 2, 0], "labels": [-100, 2, 3, -100]},
        {"input_ids": [5, 6, 7, 8], "position_ids": [0, 0, 1, 2], "labels": [-100, -100, 7, 8]},
    ]
    assert [b["input_ids"].shape for b in fixed_batches(iter(rows * 5), 4)] == [(4, 4), (4, 4)]
    endless = fixed_batches(packed(([1, 2] for _ in itertools.count()), 4), 2)
    assert next(endless)["labels"].tolist() == [[-100, 2, -100, 2]] * 2  # lazily


def test_held_out_documents_are_not_trained_on(tmp_path: Path, small: None) -> None:
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(str(number) for number in range(40)))

    def tokenizer(document: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(document)] * 300}

    text = module._read(tokenizer, str(tmp_path / "text.txt"), "text", 128, 3, 2 * TOKENS)
    held_out = {token for batch in text.held_out for token in batch["input_ids"].flatten().tolist()}
    trained = {token for batch in text.training for token in batch["input_ids"].flatten().tolist()}
    assert held_out == {0, 10, 20, 30} and trained == {1, 2, 3, 4, 5, 6}
    assert (len(text.held_out), len(text.training)) == (2, 3)


def test_the_standard_error_is_that_of_repeated_draws() -> None:
    """Against the spread of the mean over many draws of rows with unequal counts."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(20, 60, (4_000, 50), generator=generator).double()
    reference = torch.rand(4_000, 50, generator=generator, dtype=torch.float64) * 100
    own = reference + counts * (0.3 + torch.randn(4_000, 50, generator=generator, dtype=torch.float64))
    drawn = [module.paired_difference(*row) for row in zip(own, reference, counts, strict=True)]
    means, errors = torch.tensor(drawn).T
    assert means.mean().item() == pytest.approx(0.3, abs=0.01)
    assert errors.mean().item() == pytest.approx(means.std().item(), rel=0.05)
    assert module.paired_difference(own[0, :1], reference[0, :1], counts[0, :1])[1] == math.inf


def made_up(name: str, difference: float, **changes: float) -> dict[str, Any]:
    """An entry of a result; the standard error is 0.001 unless given, the step ratios lie 0.05 around `ratio`."""
    (variant,) = (v for v in variants_of(8) if (v.name, v.num_choices) == (name, 1))
    routes = {"no_expert": changes.get("no_expert", 0.0), "load_max": changes.get("load_max", 1.0)}
    ratio = changes.get("ratio", 1.0)
    return {
        "name": name,
        "num_choices": 1,
        "is_token_choice": variant.is_token_choice,
        "fields": variant.fields,
        "training": routes | {"dropped": changes.get("dropped", 0.0)},
        "inference": routes | {"loss": 1.5 + difference},
        "loss_against_dropless": {
            "difference": difference,
            "standard_error": changes.get("standard_error", 0.001),
        },
        "step": {"ratio": ratio, "ratios": [ratio - 0.05, ratio, ratio + 0.05]},
    }


def said_of(*entries: dict[str, Any], normalize: bool = False) -> str:
    """The verdict, with the differences to the lowest loss that these entries have."""
    found = [dict(entry) for entry in entries]
    lowest = min(entry["inference"]["loss"] for entry in found)
    for entry in found:
        error = entry["loss_against_dropless"]["standard_error"]
        entry["loss_against_lowest"] = {"difference": entry["inference"]["loss"] - lowest, "standard_error": error}
    return "\n".join(verdict({"variants": found, "normalize_combine_weights": normalize}))


def sentences(*entries: dict[str, Any]) -> str:
    dropless = made_up(DROPLESS, 0.0, load_max=1.5)
    return said_of(made_up("token choice, capacity 1.0", 0.004, dropped=0.125), dropless, *entries)


def test_the_verdict_says_what_was_won() -> None:
    said = sentences(made_up("expert choice", -0.005, ratio=0.8), made_up("expert choice, at least 1", -0.003))
    won = "1 expert per token: expert choice wins, causal loss 1.4950 on held-out text; the next, "
    assert f"{won}token choice, dropless, +0.0050 ± 0.0010.\n" in sentences(made_up("expert choice", -0.005))
    shown = made_up("expert choice, at least 1", -0.003, standard_error=0.0005)
    assert f"{won}expert choice, at least 1, +0.0020 ± 0.0005.\n" in sentences(made_up("expert choice", -0.005), shown)
    assert "by their causal loss" not in said
    assert "capacity 1.0 (12.5%); expert choice none, by construction" in said
    assert "Expert choice wins: plain -0.0050 ± 0.0010, at least 1 -0.0030 ± 0.0010.\n" in said
    assert "Expert choice wins: plain 0.80x. Not the same in every round: at least 1 1.00x.\n" in said
    assert "has none). None with plain, at least 1.\n" in said
    assert "in training (dropless token choice 1.50). Expert choice wins: plain 1.00, at least 1 1.00." in said


def test_the_verdict_says_plainly_what_was_not_won() -> None:
    said = sentences(
        made_up("expert choice", 0.005, ratio=1.3, no_expert=0.25, load_max=1.7), made_up("threshold", -0.0015)
    )
    lowest = (
        "threshold has the lowest causal loss 1.4985 on held-out text; the next, token choice, dropless, +0.0015 ± "
    )
    assert f"{lowest}0.0010: no difference that this text can show.\n" in said
    assert "  Ways by their causal loss: thresholds 1.4985, balance loss 1.5000, expert choice 1.5050.\n" in said
    loss = next(line for line in said.splitlines() if "Causal loss" in line)
    assert "wins" not in loss
    assert "No difference that this text can show: trained by threshold -0.0015 ± 0.0010. Expert" in loss
    assert "choice does not win: plain +0.0050 ± 0.0010." in loss
    assert "every round: trained by threshold 1.00x. Expert choice does not win: plain 1.30x." in said
    served = "None with trained by threshold. Expert choice does not win: plain 25.0% in training, 25.0% at inference."
    assert served in said
    assert "Expert choice wins: trained by threshold 1.00. Expert choice does not win: plain 1.70." in said


def test_the_verdict_says_where_no_router_learns() -> None:
    """With normalised weights and one expert for every token; with two, or other weights, it is silent."""
    for k, normalize, is_said in ((1, True, True), (1, False, False), (2, True, False)):
        entries = [made_up(DROPLESS, 0.0) | {"num_choices": k}, made_up("expert choice", 0.0) | {"num_choices": k}]
        said = said_of(*entries, normalize=normalize)
        assert ("the router learns from the balance loss alone" in said) == is_said


def test_the_verdict_reads_the_figures_alone() -> None:
    """Negative control: the same entries with the sign turned win where they lost."""
    lost = made_up("expert choice", 0.005)
    won = copy.deepcopy(lost)
    won["loss_against_dropless"]["difference"] = -0.005
    won["inference"]["loss"] = 1.495
    assert "does not win: plain +0.0050" in sentences(lost) and "token choice, dropless wins" in said_of(
        made_up(DROPLESS, 0.0), lost
    )
    assert "wins: plain -0.0050" in sentences(won) and "expert choice wins, causal loss" in sentences(won)


def test_the_verdict_names_no_winner_among_equals() -> None:
    """As of untrained copies, all of which compute the same function but for rounding."""
    said = sentences(made_up("expert choice", -1e-8, standard_error=1e-9), made_up("threshold", 0.0))
    tie = (
        "a tie, causal loss 1.5000 on held-out text: expert choice; token choice, dropless; threshold; the next, token"
    )
    assert f"{tie} choice, capacity 1.0, +0.0040 ± 0.0010.\n" in said
    assert "a tie of all, causal loss 1.5000 on" in said_of(made_up(DROPLESS, 0.0), made_up("expert choice", -1e-8))
    assert "No difference that this text can show: plain -0.0000 ± 0.0000, trained by threshold" in said
    said = sentences(made_up("expert choice", -0.005), made_up("expert choice, at least 1", -0.005))
    tie = (
        "a tie, causal loss 1.4950 on held-out text: expert choice; expert choice, at least 1; the next, token choice, "
    )
    assert f"{tie}dropless, +0.0050 ± 0.0010.\n" in said


def test_the_verdict_lists_only_what_dropped_choices() -> None:
    said = sentences(made_up("threshold", 0.0))
    assert "Choices dropped for capacity in training: token choice, capacity 1.0 (12.5%); expert" in said
    said = sentences(made_up("threshold", 0.0, dropped=0.01))
    assert "capacity 1.0 (12.5%), threshold (1.0%); expert choice none" in said
    nothing = said_of(made_up(DROPLESS, 0.0), made_up("threshold", 0.0))
    assert "No choices were dropped for capacity in training." in nothing


def test_help_says_what_takes_the_time_and_names_every_routing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    said = capsys.readouterr().out
    assert "backward passes that time a training step" in " ".join(said.split())
    assert "Up to 18 ways of routing" in said
    assert all(variant.key in re.sub(r"-\n\s+", "-", said) for variant in variants_of(8))


REFUSALS = {
    "empty.txt": (b"", "is empty"),
    "junk.txt": (b"\x80\x81\xff" * 50, "cannot be read as a .txt file"),
    "nul.txt": (b"a\0b" * 50, "holds NUL bytes"),
    "blank.txt": (b" \n ", "holds too little text: every 10th document must fill a batch of 4096 tokens"),
    "one.txt": (b"word " * 20_000, "holds too little text: the others must fill a batch"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_text_gets_one_line(place: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = REFUSALS[name]
    (tmp_path / name).write_bytes(content)
    assert message in refused([str(place / "ecmoe"), "--data", str(tmp_path / name)], capsys)


def test_other_refusals(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(place / "text.txt")]
    assert "is a llama model without experts" in refused([str(place / "dense"), *data], capsys)
    assert "convert it with ecmoe-convert" in refused([str(place / "dense"), *data], capsys)
    assert "steps=-1 must not be negative" in refused([str(place / "ecmoe"), *data, "--steps=-1"], capsys)
    for option, message in {
        "--max-tokens=0": "max_tokens=0 must be at least 2",
        "--minutes=0": "minutes=0.0 must be a number above 0",
        "--minutes=nan": "minutes=nan must be a number above 0",
        "--routings=best": "routings=best is unknown; choose all or some of capacity-1.0, capacity-1.25, dropless",
        "--routings=dropless:3": "with :1 or :2 for so many experts per token alone",
    }.items():
        assert message in refused([str(place / "ecmoe"), *data, option], capsys), option
    assert "exclude each other" in refused([str(place / "ecmoe"), *data, "--minutes=3", "--quick"], capsys)


def test_what_was_asked_for_is_what_is_compared(
    place: Path, small: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routings by name, with the reference that they are held against; no timing; and the figures of the whole."""
    loads = []
    load = module.load_expert_choice
    monkeypatch.setattr(module, "load_expert_choice", lambda *args: loads.append(args) or load(*args))
    arguments = [str(place / "ecmoe"), "--data", str(place / "text.txt"), "--tokens", str(TOKENS)]
    main(["compare", *arguments, "--routings", "at-least-1:1", "threshold:2", "--no-timing"])
    assert len(loads) == 1
    printed = capsys.readouterr()
    assert "against\ndropless" not in printed.out.split("Causal")[0] and "Time of a training step" not in printed.out
    assert "nothing timed; cpu" in " ".join(printed.out.split())
    assert "4 ways of routing, 512 tokens held out, 2 batches of 512 to calibrate, nothing timed" in printed.err
    lines = [line for line in printed.err.splitlines() if re.match(r"\d of 4: ", line)]
    assert [line.split(": ")[1] for line in lines] == [
        "1 per token, token choice, dropless",
        "1 per token, expert choice, at least 1",
        "2 per token, token choice, dropless",
        "2 per token, threshold",
    ]
    some = compare(*arguments[:3:2], max_tokens=TOKENS, routings=["at-least-1:1", "threshold:2"], timing=False)
    whole = compare(*arguments[:3:2], max_tokens=TOKENS)
    for entry in some["variants"]:
        other = entry_of(whole, entry["name"], entry["num_choices"])
        assert entry["step"] is None and other["step"]
        own = {"step": None, "loss_against_lowest": None}  # the lowest of some is not that of all
        assert entry | own == other | own
        assert f"causal loss {entry['inference']['loss']:.4f};" in printed.err


@pytest.mark.parametrize("tokens", [2, 100, 511, 513, 1_300])
def test_no_more_tokens_are_held_out_than_asked_for(place: Path, small: None, tokens: int) -> None:
    text = read(place, max_tokens=tokens)
    found = sum(batch["input_ids"].numel() for batch in text.held_out)
    assert 0 < found <= tokens and found > tokens / 2
    assert len({batch["input_ids"].shape for batch in (*text.held_out, *text.training)}) == 1


def everything(k: tuple[int, ...] = (1, 2)) -> Amounts:
    variants = tuple(v for v in variants_of(8) if v.num_choices in k)
    return Amounts(variants, held_out=32_768, calibration=8, rounds=5, step_tokens=4_096, pool=4_096)


def test_less_is_done_where_time_is_short() -> None:
    """Each level takes less than the one before; a small model does everything; what was asked for stays."""
    fast, slow = ({1: rate, 2: 1.5 * rate} for rate in (1 / 50_000, 1 / 400))
    assert choose(everything(), fast, 0, 540, 1, set()) == everything()
    seconds, seen = 1e9, []
    while not seen or choose(everything(), slow, 0, seconds, 1, set()) != seen[-1]:
        seen.append(choose(everything(), slow, 0, seconds, 1, set()))
        seconds = 0.999 * estimate(seen[-1], slow, 0)
    assert len(seen) == 6 and seen[0] == everything()
    own = choose(everything(), slow, 0, 540, 2, set())
    assert estimate(own, slow, 0) <= 540 and {v.num_choices for v in own.variants} == {2}
    for fixed in ("variants", "held_out", "rounds"):
        least = choose(everything(), slow, 0, 1, 1, {fixed})
        assert getattr(least, fixed) == getattr(everything(), fixed)
        assert least.calibration == 1 and all(
            getattr(least, f) < getattr(everything(), f) for f in {"held_out", "rounds"} - {fixed}
        )
    assert DROPLESS in {v.name for v in seen[-1].variants} and len(seen[-1].variants) == 2
    said = described(seen[-1], everything(), slow, 0)
    assert said["left_out"][0] == "2 experts per token" and "the time of a training step" in said["left_out"]
    assert said["left_out"][1].startswith("capacity-1.0, capacity-1.25, nudged-bias, quantiles")
    assert re.search(r"Everything takes about \d+ minutes: --minutes \d+$|hours: --minutes \d+$", in_words(said))
    assert described(everything(), everything(), fast, 0)["left_out"] == []


def test_the_table_of_the_page_on_speed() -> None:
    """Each row of it, from its rate: what is done in nine minutes, and how long that and everything take."""
    page = (Path(__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
    table = page.split("| tokens/s of a forward pass | routings |")[1].split("\n\n")[0]
    rows = [[cell.strip().replace(",", "") for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    whole = everything()
    whole = replace(whole, variants=tuple(v for v in whole.variants if v.key != "nudged-bias"))  # without training
    for rate, *row in rows:
        rates = {1: 1 / float(rate), 2: 1.3 / float(rate)}
        found = choose(whole, rates, 0, 540, 1, set())
        timed = f"{found.rounds} x {found.step_tokens}" if found.rounds else "none"
        seconds = [str(round(estimate(each, rates, 0))) for each in (found, whole)]
        assert row == [str(len(found.variants)), str(found.held_out), str(found.calibration), timed, *seconds]
    assert len(rows) == 5


def test_an_estimate_counts_every_pass(place: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that go through the model are those that the estimate is made of, training steps apart."""
    seen = 0
    forward = EcMoeLlamaModel.forward

    def count(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        nonlocal seen
        seen += input_ids.numel()
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(EcMoeLlamaModel, "forward", count)
    monkeypatch.setattr(module, "seconds_per_token", lambda *_: 1.0)
    result = compare(str(place / "ecmoe"), str(place / "text.txt"), max_tokens=2 * TOKENS, timing=False, minutes=1e6)
    assert seen == result["amount"]["seconds"] == result["amount"]["seconds_of_everything"]


def test_a_loss_that_is_no_number_is_no_tie(place: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEARNING_RATE", math.inf)
    with pytest.raises(AnalysisError, match=r"steps=1: token choice, capacity 1.0, k=1, has diverged"):
        compare(str(place / "ecmoe"), str(place / "text.txt"), steps=1, max_tokens=TOKENS)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the command, which ends with code 2."""
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_tables_and_json(place: Path, small: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(place / "ecmoe"), "--data", str(place / "text.txt"), "--max-tokens", str(TOKENS)]
    main([*arguments, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] and result["model_type"] == "ecmoe_llama"
    main(arguments)
    printed = capsys.readouterr().out
    assert max(map(len, printed.split("4 experts,")[0].splitlines())) <= 100
    table = printed.split("Causal inference")[1].split(str(place))[0]
    rows = [line.split() for line in table.splitlines() if line[:1] in ("1", "2")]
    for entry, row in zip(result["variants"], rows, strict=True):
        name = entry["name"].split()
        assert row[: 2 + len(name)] == [str(entry["num_choices"]), *name, f"{entry['inference']['loss']:.4f}"]
        assert f"{entry['gap']:+.4f}" in row


@pytest.mark.slow
@pytest.mark.skipif(
    not (STORIES_MODEL.is_dir() and STORIES_TEXT.is_file()),
    reason="stories260K and its text are not beside the repository (ECMOE_TEST_DATA)",
)
def test_a_real_checkpoint_takes_five_minutes_at_most(tmp_path: Path) -> None:
    """The command of docs/looking-inside.md; -s shows its table."""
    convert(str(STORIES_MODEL), str(tmp_path / "out"), init="copy", text=str(STORIES_TEXT))
    torch.set_num_threads(2)
    begin = time.perf_counter()
    main(["compare", str(tmp_path / "out"), "--data", str(STORIES_TEXT), "--steps", "10"])
    assert time.perf_counter() - begin <= 300
