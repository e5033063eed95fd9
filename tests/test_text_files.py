"""Text as people's files hold it: a byte-order mark is no text, half a surrogate pair is refused by file and row."""

import json
from pathlib import Path

import pytest

from ecmoe.analysis import AnalysisError
from ecmoe.analysis.evaluation import _read_pairs
from ecmoe.analysis.routes import read_text
from ecmoe.analysis.text import read_documents
from ecmoe.analysis.walkthrough import read_matrices
from ecmoe.conversion import ConversionError
from ecmoe.conversion.texts import read_documents as read_calibration_text
from ecmoe.conversion.upcycling.router import read_prompts
from ecmoe.finetune import RecipeError, load_recipe
from ecmoe.finetune.loading import _read_template
from ecmoe.finetune.recipe import make_recipe
from ecmoe.finetune.sources import load_rows

MARK = b"\xef\xbb\xbf"
PAIR = {"sentence_good": "One.", "sentence_bad": "Two."}


def write(path: Path, content: str) -> str:
    path.write_bytes(MARK + content.encode())
    return str(path)


def rows_of(path: str, **fields: object) -> list[dict[str, str]]:
    rows = load_rows(
        make_recipe({"model": "m", "output_dir": "o", "dataset": path, "validation_fraction": 0.5, **fields})
    )
    return [row for part in rows[:2] for row in part]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", "First.<|endoftext|>Second.")
    rows = write(tmp_path / "a.jsonl", '{"text": "First."}\n{"text": "Second."}\n')
    assert read_calibration_text(Path(text)) == ["First.", "Second."]
    for name in (text, rows, str(tmp_path)):
        assert set(read_documents(name)) == {"First.", "Second."}
    for name in (text, rows):
        assert sorted(row["text"] for row in rows_of(name)) == ["First.", "Second."]
        assert sorted(row["text"] for row in rows_of(name, streaming=True, max_steps=1)) == ["First.", "Second."]
    assert read_text(None, text).startswith("First.")
    assert next(_read_pairs(Path(write(tmp_path / "pairs", json.dumps(PAIR))))) == ("One.", "Two.")
    assert read_matrices(Path(write(tmp_path / "m.json", '{"tokens": []}'))) == {"tokens": []}
    assert read_prompts(Path(write(tmp_path / "p.json", '[["a"], ["b"]]')), 2) == [["a"], ["b"]]
    assert _read_template(write(tmp_path / "t.jinja", "{{ messages }}")) == "{{ messages }}"
    recipe = load_recipe(write(tmp_path / "r.yaml", "model: m\noutput_dir: o\ndataset: d\n"))
    assert recipe.model == "m"


def test_half_a_surrogate_pair_is_refused_by_file_and_row(tmp_path: Path) -> None:
    rows, pairs, prompts = tmp_path / "a.jsonl", tmp_path / "pairs.jsonl", tmp_path / "p.json"
    rows.write_text('{"text": "fine"}\n{"text": "\\ud83d\\ude00 a whole one"}\n{"text": "x\\ud800y"}\n')
    pairs.write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR | {"sentence_bad": "\ud800"}))
    prompts.write_text('[["a"], ["\\udfff"]]')
    with pytest.raises(
        AnalysisError, match=r"a\.jsonl, line 3: half a surrogate pair \(\\ud800 to \\udfff\) is no text"
    ):
        list(read_documents(str(rows)))
    with pytest.raises(AnalysisError, match=r"pairs\.jsonl, line 2: half a surrogate pair"):
        list(_read_pairs(pairs))
    with pytest.raises(AnalysisError, match="holds bytes that are no text"):
        read_text("\udc80", None)
    with pytest.raises(ConversionError, match=r"p\.json holds half a surrogate pair"):
        read_prompts(prompts, 2)
    for options in ({}, {"streaming": True, "max_steps": 1}):
        with pytest.raises(RecipeError, match=r"a\.jsonl cannot be read: .*surrogate pair.* invalid.* row 2"):
            rows_of(str(rows), **options)


def test_text_that_is_no_utf_8_is_refused_by_file(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n' * 2)
        with pytest.raises(AnalysisError, match=f"{name} cannot be read"):
            list(read_documents(str(tmp_path / name)))
        with pytest.raises(RecipeError, match=f"{name} cannot be read"):
            rows_of(str(tmp_path / name))
    with pytest.raises(ConversionError, match=r"a\.txt cannot be read as UTF-8 text"):
        read_calibration_text(tmp_path / "a.txt")
