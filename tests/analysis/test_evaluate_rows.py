"""What is evaluated of conversations and instructions is what fine-tuning learns; and how far a loss is known."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from checkpoints import tiny_tokenizer, write_dense, write_text
from runs import ROOT
from torch import nn
from transformers import AutoModelForCausalLM

from ecmoe.analysis import AnalysisError, calibrate, evaluate
from ecmoe.analysis.cli import main
from ecmoe.analysis.planning import halved_until
from ecmoe.analysis.printing import in_words, remarks
from ecmoe.analysis.rows import Columns, read_rows, tokens_of
from ecmoe.conversion import convert
from ecmoe.encoding import IGNORE
from ecmoe.finetune.encode import Encoder as FineTuning
from ecmoe.finetune.recipe import make_recipe
from ecmoe.finetune.train import make_trainer

CHATML = (ROOT / "recipes" / "chatml.jinja").read_text()
# No marks, and turns that the text alone tells apart.
UNMARKED = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


HELLO = [
    said("system", "Be brief."),
    said("user", "Hello  there!"),
    said("assistant", " Well, thank you. \n\n And you?"),
]
ROWS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": HELLO},
    "several": {"messages": [*HELLO, said("user", "1 + 1?"), said("assistant", "héllo ✓ 2\n"), said("user", "Bye")]},
    "sharegpt": {"messages": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello."}]},
    "parts": {"messages": [said("user", "Hi"), said("assistant", [{"type": "text", "text": "Hello."}])]},
    "null": {"messages": [said("user", "Hi") | {"tool_calls": None}, said("assistant", "Hello.") | {"name": None}]},
    "text": {"prompt": "Question: 1 + 1?\n", "completion": "It is 2."},
    "no prompt": {"prompt": None, "completion": "It is 2."},
    "messages": {"prompt": [*HELLO, said("user", "1 + 1?")], "completion": [said("assistant", "It is 2.")]},
}


@pytest.mark.parametrize("template", [CHATML, UNMARKED, None], ids=["marked", "unmarked", "none"])
@pytest.mark.parametrize("name", ROWS)
def test_tokens_and_what_is_predicted_are_those_of_fine_tuning(name: str, template: str | None) -> None:
    row, tokenizer = ROWS[name], tiny_tokenizer()
    tokenizer.chat_template = template
    if template is None and not isinstance(row.get("completion"), str):
        with pytest.raises(AnalysisError, match="no chat template and the dataset holds conversations"):
            encoded(tokenizer, row)
        return
    kind = "prompt" if "completion" in row else "messages"
    expected = FineTuning(tokenizer, kind, len(tokenizer))(row)
    ids, is_learned = encoded(tokenizer, row)
    assert ids == expected["input_ids"]
    assert is_learned == [label != IGNORE for label in expected["labels"]]
    assert any(is_learned) and (not all(is_learned) or name == "no prompt")


def encoded(tokenizer: Any, row: Any) -> tuple[list[int], list[bool]]:
    """As an evaluation has it: tokens, and which of them are predicted."""
    (found,) = tokens_of(tokenizer, iter([row]), 512, 4096)
    return found.ids, found.is_learned


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint that chats, its conversion with experts that differ, text, and conversations."""
    folder = tmp_path_factory.mktemp("rows")
    write_dense(folder / "dense", "Llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "dense")
    text = write_text(folder / "text.txt", documents=12)
    options = {"num_experts": 4, "text": str(text), "init": "noise", "ratio": 0.5, "verify": False}
    convert(str(folder / "dense"), str(folder / "ecmoe"), **options)
    answers = ["Yes.", "No, it is not.", "Perhaps it is, and perhaps it is not; who can say?", "2", "A type of object."]
    talks = [[said("user", f"Is it {n}?"), said("assistant", answer)] for n, answer in enumerate(answers)]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return folder


def test_the_loss_is_the_one_that_fine_tuning_reports(place: Path, tmp_path: Path) -> None:
    talks = str(place / "talks.jsonl")
    fields = {"model": str(place / "dense"), "dataset": talks, "validation_dataset": talks, "use_cpu": True}
    recipe = make_recipe(fields | {"output_dir": str(tmp_path / "out"), "max_steps": 1, "max_length": 128})
    expected = make_trainer(recipe).evaluate()["eval_loss"]
    found = evaluate(str(place / "dense"), data=talks)
    assert found["loss"] == pytest.approx(expected, abs=1e-5)
    assert found["predicted_tokens"] < found["tokens"] / 2 and found["num_units"] == 5


def without_template(folder: Path, tmp_path: Path, **fields: Any) -> Path:
    """A copy whose tokenizer has no chat template, and with other fields."""
    copied = tmp_path / f"bare_{folder.name}"
    shutil.copytree(folder, copied)
    (copied / "chat_template.jinja").unlink()
    return copied


@pytest.mark.parametrize("is_second", [True, False])
def test_a_template_is_lent_where_one_model_has_none(place: Path, tmp_path: Path, is_second: bool, capsys: Any) -> None:
    """The figures are those of a model with the template of its own, whichever has it, and it is said."""
    data, bare = str(place / "talks.jsonl"), without_template(place / "dense", tmp_path)
    expected = evaluate(str(place / "dense"), data=data)["loss"]
    first, second = (place / "ecmoe", bare) if is_second else (bare, place / "ecmoe")
    found = evaluate(first, data=data, against=[second])
    entries = [found, *found["against"]]
    assert entries[is_second]["loss"] == pytest.approx(expected, abs=1e-6)
    assert [entry.get("chat_template_from") for entry in entries][is_second] == str(place / "ecmoe")
    assert f"The chat template of {place / 'ecmoe'} is used for all" in capsys.readouterr().err
    evaluate(first, data=str(place / "text.txt"), against=[second], max_tokens=64)
    assert "template" not in capsys.readouterr().err  # of plain text nobody asks for one


def test_a_tokenizer_without_a_template_is_named(place: Path, tmp_path: Path) -> None:
    """Alike by evaluate, alone or beside a model of another vocabulary, and by calibrate."""
    talks, bare = str(place / "talks.jsonl"), without_template(place / "ecmoe", tmp_path)
    words = json.loads((bare / "tokenizer.json").read_text())
    words["added_tokens"].append({**words["added_tokens"][0], "id": 299, "content": "<other>"})
    (bare / "tokenizer.json").write_text(json.dumps(words))
    refused: list[Callable[[], Any]] = [
        lambda: evaluate(bare, data=talks),
        lambda: evaluate(place / "dense", data=talks, against=[bare]),
        lambda: calibrate(bare, talks),
    ]
    no_template = "the tokenizer has no chat template and the dataset holds conversations"
    for call in refused:
        with pytest.raises(AnalysisError) as refusal:
            call()
        assert str(refusal.value) == f"{no_template}; put one that takes them into {bare} as chat_template.jinja"
    instructions = tmp_path / "instructions.jsonl"
    instructions.write_text(
        "".join(json.dumps({"prompt": f"Is it {n}? ", "completion": "Yes."}) + "\n" for n in range(40))
    )
    assert calibrate(bare, instructions, tokens=200)["tokens"] == 200


def by_hand(folder: Path, documents: list[tuple[list[int], list[bool]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and predicted tokens of each, one pass for each of them."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    sums = []
    for ids, learned in documents:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        losses = nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        sums.append((losses * torch.tensor(learned[1:])).sum().item())
    return torch.tensor(sums).double(), torch.tensor([sum(learned[1:]) for _, learned in documents]).double()


def error_by_hand(sums: torch.Tensor, counts: torch.Tensor) -> float:
    """The jackknife's error of the mean per token, which the linear one agrees with to a share of 1 / N."""
    number = len(sums)
    left_out = [(sums.sum() - sums[i]) / (counts.sum() - counts[i]) for i in range(number)]
    mean = sum(left_out) / number
    return math.sqrt((number - 1) / number * sum((value - mean) ** 2 for value in left_out))


def test_models_side_by_side_and_their_errors(place: Path) -> None:
    """Losses and errors document by document, by hand, and the difference paired."""
    data = str(place / "talks.jsonl")
    found = evaluate(str(place / "ecmoe"), data=data, against=[str(place / "dense")])
    (other,) = found["against"]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    rows = [encoded(tokenizer, row) for row in read_rows(data, Columns())]
    sums, counts = by_hand(place / "ecmoe", rows)
    its_sums, _ = by_hand(place / "dense", rows)
    assert found["loss"] == pytest.approx(float(sums.sum() / counts.sum()), abs=1e-5)
    assert other["loss"] == pytest.approx(float(its_sums.sum() / counts.sum()), abs=1e-5)
    assert found["standard_error"] == pytest.approx(error_by_hand(sums, counts), rel=0.5)
    assert other["difference"]["loss"] == pytest.approx(found["loss"] - other["loss"], abs=1e-6)
    assert other["difference"]["standard_error"] == pytest.approx(error_by_hand(sums - its_sums, counts), rel=0.5)
    assert other["difference"]["standard_error"] < found["standard_error"]  # what pairing is for
    assert other == evaluate(str(place / "dense"), data=data) | {
        name: other[name] for name in ("difference", "tokens_per_second")
    }
    assert any("5 decide" in line for line in remarks(found)) and any("against" in line for line in remarks(found))


def test_a_conversation_that_is_cut_is_counted(place: Path, tmp_path: Path) -> None:
    """The model's context is 128; of an answer that begins beyond it nothing is left."""
    answers = ["Yes. " * 100, "No."]
    rows = [{"messages": [said("user", "Is it?"), said("assistant", answer)]} for answer in answers]
    rows.append({"messages": [said("user", "Is it? " * 200), said("assistant", "No.")]})
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(str(place / "dense"), data=str(tmp_path))
    assert (found["num_units"], found["num_cut"]) == (2, 1) and found["tokens"] < 128 + 60
    assert "Cut at the longest row that is read: 1 of the conversations" in " ".join(remarks(found))


def test_windows_of_a_document_are_one_unit(place: Path) -> None:
    """A document's windows stand and fall together; with one document the windows are all there is."""
    found = evaluate(str(place / "dense"), data=str(place / "text.txt"))
    assert (found["units"], found["num_units"]) == ("documents", 12)
    (place / "one.txt").write_text((place / "text.txt").read_text().replace("<|endoftext|>", "\n"))
    single = evaluate(str(place / "dense"), data=str(place / "one.txt"))
    assert single["units"] == "rows" and single["num_units"] == math.ceil(single["tokens"] / 128)
    tiny = evaluate(str(place / "dense"), data=str(place / "one.txt"), max_tokens=100)
    assert tiny["standard_error"] is None and "a single row of text" in remarks(tiny)[0]
    json.dumps(tiny, allow_nan=False)


def test_the_gap_is_of_the_tokens_it_was_measured_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every batch it is the difference of both losses; of some it says on how many tokens."""
    data = str(place / "text.txt")
    sampled = evaluate(str(place / "ecmoe"), data=data, max_tokens=9_000)
    monkeypatch.setattr("ecmoe.analysis.evaluation.TOP_K_EVERY", 1)
    whole = evaluate(str(place / "ecmoe"), data=data, max_tokens=9_000)
    assert whole["top_k_tokens"] == whole["tokens"] > sampled["top_k_tokens"] >= 4_096
    assert whole["loss"] == sampled["loss"] and whole["loss_gap"] != 0
    assert sampled["loss_gap"] == pytest.approx(whole["loss_gap"], abs=0.02)


COLUMNS: dict[str, tuple[dict[str, Any], Columns, str]] = {
    "other names": ({"question": "a", "answer": "b"}, Columns(), "set prompt_column=question completion_column=answer"),
    "neither": ({"story": "a"}, Columns(), "no text in the field text_column=text; it has story"),
    "a named one": ({"prompt": "a", "answer": "b"}, Columns(prompt="ask"), "prompt_column=ask completion_column=compl"),
    "a number": ({"prompt": 1, "completion": "b"}, Columns(), "line 1: prompt holds int, not messages or text"),
    "no messages": ({"messages": "hello"}, Columns(), "line 1: messages holds str, not messages; name"),
    "half a pair": ({"prompt": "\ud800", "completion": "b"}, Columns(), "half a surrogate pair"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_that_cannot_be_read(tmp_path: Path, case: str) -> None:
    row, columns, message = COLUMNS[case]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(AnalysisError, match=message):
        list(read_rows(str(tmp_path), columns))


def test_columns_are_found_as_in_fine_tuning(tmp_path: Path) -> None:
    """Messages before prompts before text; named ones before all; a table's rows as a file's."""
    talk = [said("user", "Hi"), said("assistant", "Hello.")]
    row = {"messages": talk, "prompt": "p", "completion": "c", "text": "t", "answer": "a"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    for columns, expected in (
        (Columns(), {"messages": talk}),
        (Columns(prompt="prompt"), {"prompt": "p", "completion": "c"}),
        (Columns(prompt="prompt", completion="answer"), {"prompt": "p", "completion": "a"}),
        (Columns(text="text"), "t"),
    ):
        assert list(read_rows(str(tmp_path), columns)) == [expected, expected]


def test_refused_pairs_of_models(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens of another chat template cannot be held against each other; and both ways to say how much is too many."""
    model = AutoModelForCausalLM.from_pretrained(place / "dense")
    model.save_pretrained(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = UNMARKED
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(AnalysisError, match=r"against=.*other reads the text as other tokens"):
        evaluate(str(place / "dense"), data=str(place / "talks.jsonl"), against=[str(tmp_path / "other")])
    with pytest.raises(SystemExit):
        main(["evaluate", str(place / "dense"), f"--data={place / 'talks.jsonl'}", "--tokens=50", "--quick"])
    assert "max_tokens=50 and quick both say how much to read" in capsys.readouterr().err


def test_a_slow_model_reads_less_and_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the rate, in steps of two; the estimate comes before the work."""
    monkeypatch.setattr("ecmoe.analysis.evaluation.EVALUATED_TOKENS", 8_192)
    monkeypatch.setattr("ecmoe.analysis.evaluation.FEWEST_TOKENS", 2_048)
    monkeypatch.setattr("ecmoe.analysis.evaluation.seconds_per_token", lambda *_: 300 / 5_000)
    main(["evaluate", str(place / "dense"), f"--data={place / 'text.txt'}"])
    printed = capsys.readouterr()
    assert "on 4,096 tokens: about 4 minutes. Of the text: 4,096 tokens at most, chosen for 17 tokens/s" in printed.err
    assert "--tokens 8192 takes about 8 minutes" in printed.out.replace("\n", " ")
    monkeypatch.setattr("ecmoe.analysis.evaluation.seconds_per_token", lambda *_: 1e-6)
    assert evaluate(str(place / "dense"), data=str(place / "text.txt"))["amount"] is None
    assert "Evaluating" not in capsys.readouterr().err


@pytest.mark.parametrize(("fits", "expected"), [(1e9, 1024), (1024, 1024), (1023, 512), (300, 256), (1, 64)])
def test_steps_of_two(fits: float, expected: int) -> None:
    assert halved_until(fits, 1024, 64) == expected


def test_words_for_an_error() -> None:
    assert in_words(0.01, 50) == ""
    assert in_words(0.2, 50).startswith("wide: 50 decide, and another such text may differ by 0.40")
    assert in_words(0.01, 3).startswith("wide: 3 decide") and "single row" in in_words(math.inf, 1)


def test_logits_come_in_parts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses however few logits are computed at once, of both kinds of model."""
    for name in ("dense", "ecmoe"):
        whole = evaluate(str(place / name), data=str(place / "text.txt"), max_tokens=3_000)
        with monkeypatch.context() as patch:
            patch.setattr("ecmoe.analysis.losses._LOGITS", 300 * 64)
            parts = evaluate(str(place / name), data=str(place / "text.txt"), max_tokens=3_000)
        assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-6)
        assert parts.get("loss_gap") == (whole.get("loss_gap") and pytest.approx(whole["loss_gap"], abs=1e-5))
