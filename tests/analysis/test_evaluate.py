"""Evaluation: the figures are the model's own, text of any size streams, and bad input gets one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_dense, write_text
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, T5Config

import ecmoe
from ecmoe.analysis import AnalysisError, evaluate
from ecmoe.analysis.cli import main
from ecmoe.analysis.printing import evaluation_table
from ecmoe.analysis.rows import Row, at_most, batches
from ecmoe.analysis.text import _PIECE, read_documents, windows
from ecmoe.conversion import convert


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense checkpoint, its expert-choice conversion, and text."""
    folder = tmp_path_factory.mktemp("analysis")
    write_dense(folder / "dense", "Llama")
    text = write_text(folder / "text.txt", documents=3)
    apart = {"init": "noise", "ratio": 0.5}  # experts that differ, so that routes show in the loss
    convert(str(folder / "dense"), str(folder / "ecmoe"), num_experts=4, capacity_factor=1.5, text=str(text), **apart)
    return folder


def test_losses_are_those_of_the_model(place: Path) -> None:
    """Document by document, each window alone, by the model's own loss."""
    result = evaluate(str(place / "ecmoe"), data=str(place / "text.txt"), max_tokens=0)
    model = AutoModelForCausalLM.from_pretrained(place / "ecmoe").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "ecmoe")
    total = predicted = 0.0
    for window in windows(tokenizer, read_documents(str(place / "text.txt")), 128):
        ids = torch.tensor([window])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (len(window) - 1)
        predicted += len(window) - 1
    assert result["loss"] == pytest.approx(total / predicted, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["loss_gap"] == pytest.approx(result["loss"] - result["loss_top_k"])
    assert result["loss_top_k"] != result["loss"]
    summary = result["routes"]["summary"]
    assert 1.2 < summary["experts_per_token"] < 1.8
    loads = [load for layer in result["routes"]["layers"].values() for load in layer["load"]]
    assert len(loads) == 2 * 4
    assert sum(loads) / len(loads) == pytest.approx(summary["experts_per_token"] / 1.5)


def test_the_dense_parent_and_a_fresh_conversion_have_one_loss(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same windows of the same file: what is new in a fine-tuned model can be read off against its parent."""
    convert(str(place / "dense"), str(tmp_path / "shared"), num_experts=4, verify=False)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"sentence_good": "a b", "sentence_bad": "b a"}) + "\n")
    options = {"data": str(place / "text.txt"), "pairs": [str(tmp_path / "pairs.jsonl")], "max_tokens": 4096}
    dense, shared = (evaluate(str(folder), **options) for folder in (place / "dense", tmp_path / "shared"))
    assert dense["loss"] == pytest.approx(shared["loss"], abs=1e-5)
    assert (dense["tokens"], dense["pairs"]) == (shared["tokens"], shared["pairs"])
    extra = {"loss_top_k", "loss_gap", "top_k_tokens", "routes", "thresholds_from"}
    assert shared.keys() - dense.keys() == extra
    main(["evaluate", str(place / "dense"), f"--data={place / 'text.txt'}", "--max-tokens=100"])
    printed = capsys.readouterr().out
    assert "causal loss" in printed and "top-k" not in printed and "expert" not in printed


@pytest.mark.parametrize("tokens", [2, 100, 129, 4_097])
def test_no_more_tokens_are_read_than_asked_for(place: Path, tokens: int) -> None:
    """All of them, but for a last one by itself, which nothing would predict."""
    few = evaluate(str(place / "ecmoe"), data=str(place / "text.txt"), max_tokens=tokens)
    assert tokens - 1 <= few["tokens"] <= tokens
    everything = evaluate(str(place / "ecmoe"), data=str(place / "text.txt"), max_tokens=0)
    assert everything["tokens"] > 4_097


def test_pairs_prefer_what_the_model_finds_likelier(place: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "ecmoe").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "ecmoe")

    @torch.no_grad()
    def likelihood(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        return -model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)

    sentences = [("The class is a type.", "Is type the a class."), ("An object", "Object an"), ("a b c d", "d c b a e")]
    rows = [{"sentence_good": good, "sentence_bad": bad} for good, bad in sentences]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [likelihood(good) > likelihood(bad) for good, bad in sentences]
    result = evaluate(str(place / "ecmoe"), pairs=[str(tmp_path)])
    assert result["pairs"] == {
        "accuracy": sum(expected) / 3,
        "pairs": 3,
        "files": {"pairs": sum(expected) / 3},
    }


def test_a_folder_of_every_kind(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_text("one<|endoftext|>\n\n<|endoftext|>two")
    (tmp_path / "b.md").write_text("three")
    (tmp_path / "c.jsonl").write_text('{"text": "four"}\n\n{"text": " "}\n{"text": null}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["five", None, "six"]}), tmp_path / "d.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert list(read_documents(str(tmp_path))) == ["one", "two", "three", "four", "five", "six"]


@pytest.mark.parametrize("cells", [[1, 2], [b"one", b"two"], [["one"], ["two"]]], ids=["numbers", "bytes", "lists"])
def test_a_parquet_column_that_is_no_text_gets_one_line(tmp_path: Path, cells: list[Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [None, *cells]}), tmp_path / "a.parquet")
    kind = type(cells[0]).__name__
    with pytest.raises(AnalysisError, match=f"row 2: text_column=text holds {kind}, not text; name the column"):
        list(read_documents(str(tmp_path)))


def test_a_long_document_streams_in_pieces(tmp_path: Path) -> None:
    """No piece is much longer than what is read at once, nothing is lost, and separators are found across borders."""
    words = " ".join(str(n) for n in range(500_000))
    (tmp_path / "long.txt").write_text(words + "<|endoftext|>end")
    pieces = list(read_documents(str(tmp_path / "long.txt")))
    assert len(pieces) > 3 and max(map(len, pieces)) <= 2 * _PIECE
    assert " ".join(" ".join(pieces[:-1]).split()) == words and pieces[-1] == "end"


def test_batches_are_lazy() -> None:
    """Ten thousand documents are not read for the first batch."""
    read = 0

    def sequences():
        nonlocal read
        for _ in range(10_000):
            read += 1
            yield Row([1, 2, 3, 4], [True] * 4, read)

    stream = batches(at_most(sequences(), 80), pool=40, padding=0)
    assert next(stream).inputs["input_ids"].shape == (10, 4)
    assert read == 10
    assert len(list(stream)) == 1 and read == 20


DAMAGE = {
    "missing.txt": (None, "does not exist"),
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n ", "holds no text"),
    "junk.txt": (b"\x80\x81\xff" * 50, "cannot be read as a .txt file"),
    "nul.txt": (b"a\0b" * 50, "holds NUL bytes"),
    "junk.jsonl": (b"{", "cannot be read as a .jsonl file"),
    "column.jsonl": (b'{"story": "x"}\n', "no text in the field text_column=text"),
    "junk.parquet": (b"PAR1" * 20, "cannot be read as a .parquet file"),
    "picture.png": (b"x", "must be a folder or end in"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_text_gets_one_line(place: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = DAMAGE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(place / "ecmoe"), "--data", str(tmp_path / name)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_other_refusals(place: Path, tmp_path: Path) -> None:
    with pytest.raises(AnalysisError, match="does not exist"):
        evaluate(str(tmp_path / "nowhere"), data=str(place / "text.txt"))
    AutoModelForCausalLM.from_pretrained(place / "ecmoe").save_pretrained(tmp_path / "bare")
    with pytest.raises(AnalysisError, match=r"bare has no tokenizer; save that of its source there, AutoTokenizer\."):
        evaluate(str(tmp_path / "bare"), data=str(place / "text.txt"))
    tokenizer = AutoTokenizer.from_pretrained(place / "ecmoe")
    for config, message in [(BertConfig(), "bert, an encoder"), (T5Config(), "t5, which has no AutoModelForCausalLM")]:
        config.save_pretrained(tmp_path / config.model_type)
        tokenizer.save_pretrained(tmp_path / config.model_type)
        with pytest.raises(AnalysisError, match=f"is of model_type {message}.*; give a decoder"):
            evaluate(str(tmp_path / config.model_type), data=str(place / "text.txt"))
    with pytest.raises(AnalysisError, match="nothing to evaluate on"):
        evaluate(str(place / "ecmoe"))
    for device in ("gpu", "cuda:99"):
        with pytest.raises(AnalysisError, match=f"device={device} cannot be used .*; leave it out, or name cpu"):
            evaluate(str(place / "ecmoe"), data=str(place / "text.txt"), device=device)
    with pytest.raises(AnalysisError, match="max_tokens=-5 must be at least 2"):
        evaluate(str(place / "ecmoe"), data=str(place / "text.txt"), max_tokens=-5)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"sentence_good": "a " * 400, "sentence_bad": "b"}) + "\n")
    with pytest.raises(AnalysisError, match="the model's context 128"):
        evaluate(str(place / "ecmoe"), pairs=[str(tmp_path / "pairs.jsonl")])
    (tmp_path / "pairs.jsonl").write_text('{"good": "a"}\n')
    with pytest.raises(AnalysisError, match="line 1: sentence_good and sentence_bad must be text"):
        evaluate(str(place / "ecmoe"), pairs=[str(tmp_path / "pairs.jsonl")])


def test_a_mistyped_folder_gets_one_whole_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it tries for most of a minute
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "t-fulll", "--data", str(tmp_path)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint=t-fulll is no local folder and could not be fetched from the Hub: " in line
    assert line.endswith("; give a checkpoint folder or a Hub id")


def test_json_is_for_machines(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(place / "ecmoe"), "--data", str(place / "text.txt"), "--max-tokens", "1000", "--json"])
    assert json.loads(capsys.readouterr().out)["model_type"] == "ecmoe_llama"
    main(["evaluate", str(place / "ecmoe"), "--data", str(place / "text.txt"), "--max-tokens", "1000"])
    assert "causal loss" in capsys.readouterr().out


def test_a_model_in_memory_is_evaluated_as_its_folder(place: Path, tmp_path: Path) -> None:
    """And left in the mode that it was in; what belongs to a folder alone is refused."""
    text = str(place / "text.txt")
    model = AutoModelForCausalLM.from_pretrained(place / "ecmoe").train()
    tokenizer = AutoTokenizer.from_pretrained(place / "ecmoe")
    found = ecmoe.evaluate(model, data=text, max_tokens=2000, tokenizer=tokenizer)
    expected = ecmoe.evaluate(str(place / "ecmoe"), data=text, max_tokens=2000)
    assert model.training and found["checkpoint"] == expected["checkpoint"]
    for name in ("loss", "loss_top_k", "tokens", "routes"):
        assert found[name] == expected[name]
    page = ecmoe.report(model, str(tmp_path / "page.html"), text="a b c", tokenizer=tokenizer)
    assert page["checkpoint"] == "ecmoe" and model.training and (tmp_path / "page.html").is_file()
    for options, message in (
        ({}, "tokenizer=None: a model in memory has none"),
        ({"tokenizer": tokenizer, "device": "cpu"}, "device=cpu is of a checkpoint"),
    ):
        with pytest.raises(AnalysisError, match=message):
            ecmoe.evaluate(model, data=text, **options)
    with pytest.raises(AnalysisError, match="checkpoint=7 is neither"):
        ecmoe.evaluate(7, data=text)
    with pytest.raises(AnalysisError, match="tokenizer is of a model in memory"):
        ecmoe.evaluate(str(place / "ecmoe"), data=text, tokenizer=tokenizer)
    dense = AutoModelForCausalLM.from_pretrained(place / "dense")
    with pytest.raises(AnalysisError, match="is a llama model without experts"):
        ecmoe.report(dense, str(tmp_path / "none.html"), text="a", tokenizer=tokenizer)


def test_many_layers_have_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    layers = {f"model.layers.{n}.mlp": {"load": [1 - n / 40, 1 + n / 40]} for n in range(30)}
    summary = {"experts_per_token": 1.0, "uncovered": 0.0}
    Console(width=100).print(evaluation_table({"checkpoint": "many", "routes": {"summary": summary, "layers": layers}}))
    said = " ".join(capsys.readouterr().out.split())
    assert "load, 30 layers 0.28 to 1.73" in said and "least even in layers 29, 28, 27" in said
    assert "load, layers" not in said
