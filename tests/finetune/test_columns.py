"""Which columns of a dataset are read, and what is said where they are not there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ecmoe.finetune import RecipeError, load_recipe
from ecmoe.finetune.folder import as_yaml
from ecmoe.finetune.recipe import recipe_of as recipe_from
from ecmoe.finetune.sources import load_rows

WORDS = {"text": "a word", "question": "1 + 1?", "response": "2", "talk": [{"role": "assistant", "content": "Hi"}]}
COLUMNS = {
    "prompt_column=question completion_column=answer": (
        r"^completion_column=answer is not in dataset=\S*, which has text, question, .*; did you mean response\?$"
    ),
    "prompt_column=ask completion_column=say": (
        r"^prompt_column=ask is not in .*; set prompt_column=question completion_column=response$"
    ),
    "prompt_column=query completion_column=response": r"^prompt_column=query is not in .* did you mean question\?$",
    "messages_column=talks": r"^messages_column=talks is not in .* did you mean talk\?$",
    "messages_column=messages": (
        r"^messages_column=messages .*; set messages_column= \(empty\) prompt_column=question completion_\w+=response$"
    ),
    "dataset_text_field=": "text from text; all of it is learned",
    "completion_column=response": r"^prompt_column=prompt is not in .*",
    "dataset_text_field=words": r"^dataset_text_field=words is not in .*",
    "prompt_column=question completion_column=response": "prompt and completion from question, response; the comp",
    "prompt_column=query messages_column=talk": "conversations from talk; what the assistant says is learned",
    "prompt_column=query dataset_text_field=question": "text from question; all of it is learned",
    "": "text from text; all of it is learned",
}


@pytest.mark.parametrize("fields", COLUMNS)
def test_named_columns_must_be_there(
    recipe_of: Callable, tmp_path: Path, fields: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """However much the other columns look like plain text; what was recognised is said."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(WORDS) + "\n" for _ in range(4)))
    recipe = recipe_of(dataset=path, validation_fraction=0.5, **dict(field.split("=") for field in fields.split()))
    if COLUMNS[fields].startswith("^"):
        with pytest.raises(RecipeError, match=COLUMNS[fields]):
            load_rows(recipe)
        return
    load_rows(recipe)
    assert f"dataset={path}: {COLUMNS[fields]}" in capsys.readouterr().out


TALK = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "a word"},
    "messages": {"messages": TALK},
    "conversations": {"conversations": TALK},
    "prompt": {"prompt": "1 + 1?", "completion": "2"},
    "question": {"question": "1 + 1?", "answer": "2"},
    "question, text": {"question": "1 + 1?", "response": "2", "text": "a word"},
    "context": {"instruction": "1 + 1?", "label": "2", "text": "a context"},
}
ABSENT = {"lora": "question, answer", "chat": "messages"}
SET = "set {}prompt_column=question completion_column=answer"
# Of each recipe that is shipped and each kind of rows: what is read, or the remedy.
READ = {
    ("full", "text"): "text from text",
    ("full", "messages"): "conversations from messages",
    ("full", "conversations"): "conversations from conversations",
    ("full", "prompt"): "prompt and completion from prompt, completion",
    ("full", "question"): SET.format(""),
    ("full", "question, text"): "text from text",
    ("lora", "text"): "text from text",
    ("lora", "messages"): "conversations from messages",
    ("lora", "conversations"): "conversations from conversations",
    ("lora", "prompt"): "prompt and completion from prompt, completion",
    ("lora", "question"): "prompt and completion from question, answer",
    ("lora", "question, text"): "completion_column=answer is not in",
    ("lora", "context"): "prompt_column=question is not in",
    ("chat", "text"): "text from text",
    ("chat", "messages"): "conversations from messages",
    ("chat", "conversations"): "conversations from conversations",
    ("chat", "prompt"): "prompt and completion from prompt, completion",
    ("chat", "question"): SET.format("messages_column= (empty) "),
    ("chat", "question, text"): "prompt_column=question completion_column=response",
}
OWN = {("lora", "question"), ("chat", "messages")}  # the recipe's own columns


def write(path: Path, row: dict[str, Any]) -> list[str]:
    """Rows, and what every recipe needs."""
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    return [f"model={path.parent}", f"output_dir={path.parent}", f"dataset={path}", "validation_fraction=0.5"]


@pytest.mark.parametrize(("name", "rows"), READ)
def test_a_shipped_recipe_takes_the_columns_that_are_there(
    name: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The standard ones, where its own are not there; none by another name. What is recorded does the same."""
    recipe = load_recipe(name, write(tmp_path / "rows.jsonl", ROWS[rows]))
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    found = READ[name, rows]
    if " from " not in found:
        with pytest.raises(RecipeError) as refusal:
            load_rows(recipe)
        assert found in str(refusal.value)
        return
    load_rows(recipe)
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith(f"dataset={tmp_path / 'rows.jsonl'}: {found}; ")
    is_other = name in ABSENT and (name, rows) not in OWN
    line = f"has none of the recipe's columns ({ABSENT.get(name)}); the standard ones are taken"
    assert said[:-1] == ([f"dataset={tmp_path / 'rows.jsonl'} {line}"] if is_other else [])


def test_a_column_that_is_named_for_a_shipped_recipe_must_be_there(tmp_path: Path) -> None:
    fields = write(tmp_path / "rows.jsonl", ROWS["prompt"])
    mapping = {name: value for name, _, value in (field.partition("=") for field in fields[:3])}
    hint = r"prompt_column=question is not in .*; set prompt_column=prompt completion_column=completion$"
    for recipe in (
        load_recipe("qlora", [*fields, "completion_column=answer"]),
        recipe_from("qlora", **mapping, prompt_column="question"),
        recipe_from(recipe_from("qlora", **mapping), prompt_column="question"),
    ):
        with pytest.raises(RecipeError, match=hint):
            load_rows(recipe)
