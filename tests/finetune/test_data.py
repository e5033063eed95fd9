"""Rows to sequences: packing, mixtures, streams, what is held out, and the cache."""

import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import prepared
from transformers import AutoModelForCausalLM, AutoTokenizer

from ecmoe.finetune import RecipeError, load_recipe, run
from ecmoe.finetune.data import Collator
from ecmoe.finetune.encode import wrap
from ecmoe.finetune.losses import IGNORE
from ecmoe.finetune.recipe import learned_of, training_arguments
from ecmoe.finetune.sources import load_rows
from ecmoe.finetune.train import make_trainer

DOCUMENTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), max_size=12)


@settings(max_examples=60, deadline=None)
@given(documents=DOCUMENTS, length=st.integers(2, 12))
def test_packing_loses_nothing_but_the_tail(documents: list[list[int]], length: int) -> None:
    packed = wrap({"input_ids": documents, "labels": documents}, length)
    tokens = [token for ids in documents for token in ids]
    flat = {name: [value for row in rows for value in row] for name, rows in packed.items()}
    assert {len(row) for row in packed["input_ids"]} | {sum(row) for row in packed["seq_lengths"]} <= {length}
    starts = {sum(map(len, documents[:number])) for number in range(len(documents))}
    # A row of beginnings alone has nothing that anything predicts.
    full = [range(first, first + length) for first in range(0, len(tokens) - length + 1, length)]
    kept = [place for row in full if not starts.issuperset(row[1:]) for place in row]
    assert flat["input_ids"] == [tokens[place] for place in kept]
    rows = [dict(zip(packed, values, strict=True)) for values in zip(*packed.values(), strict=True)]
    if not rows:
        return
    for padding_free in (False, True):  # rows for most attention, and the one row of FlashAttention
        batch = Collator(0, padding_free)(rows)
        assert batch["input_ids"].shape == ((1, len(rows) * length) if padding_free else (len(rows), length))
        positions, position = batch["position_ids"].flatten().tolist(), 0
        labels = batch["labels"].flatten()
        for number, (place, token, label) in enumerate(zip(kept, flat["input_ids"], labels, strict=True)):
            begins = place in starts or place % length == 0
            position = 0 if begins else position + 1
            assert positions[number] == position
            assert label == (IGNORE if begins else token)


@pytest.mark.parametrize("name", ["dense", "ecmoe"])
@torch.no_grad()
def test_a_packed_batch_gives_each_document_its_own_loss(place: Path, name: str) -> None:
    """In eval mode, for documents that begin and end anywhere in a batch of two rows."""
    model = AutoModelForCausalLM.from_pretrained(place / name).eval()
    sizes = (23, 9, 31, 14, 19)
    documents = [torch.randint(3, 300, (size,)).tolist() for size in sizes]
    packed = wrap({"input_ids": documents, "labels": documents}, 48)
    rows = [dict(zip(packed, values, strict=True)) for values in zip(*packed.values(), strict=True)]
    batch = Collator(0)(rows)
    assert batch["input_ids"].shape == (2, 48)

    def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        )

    found = losses(model(**batch, use_cache=False).logits, batch["labels"])
    parts = [ids for row in rows for ids in documents_of(row)]
    alone = torch.cat([losses(model(ids[None]).logits, ids[None]) for ids in parts])
    torch.testing.assert_close(found[found > 0], alone, atol=1e-5, rtol=0)
    # Where documents see each other they get another loss, so the comparison can fail.
    batch.pop("position_ids")
    assert (losses(model(**batch, use_cache=False).logits, batch["labels"])[found > 0] - alone).abs().max() > 1e-3


def documents_of(row: dict[str, list[int]]) -> list[torch.Tensor]:
    return list(torch.tensor(row["input_ids"]).split(row["seq_lengths"]))


@torch.no_grad()
def test_padding_changes_no_loss(place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "ecmoe").eval()
    rows = []
    for size in (5, 17, 40):
        ids = torch.randint(3, 300, (size,)).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE] * 3 + ids[3:]})
    batch = Collator(pad_token_id=0)(rows)
    assert batch["input_ids"].shape == (3, 40)
    assert (batch["input_ids"][0, 5:] == 0).all() and (batch["labels"][0, 5:] == IGNORE).all()
    assert batch["attention_mask"].sum(1).tolist() == [5, 17, 40]
    counts = (batch["labels"][:, 1:] != IGNORE).sum(1)
    alone = torch.stack([model(**Collator(0)([row])).loss for row in rows])
    assert model(**batch).loss.item() == pytest.approx(((alone * counts).sum() / counts.sum()).item(), abs=1e-5)


def test_the_same_rows_for_every_model_and_seed(place: Path, recipe_of: Callable) -> None:
    """Held-out documents are the same, and none of them is trained on; dense and expert choice read the same text."""
    packed = [
        prepared(recipe_of(model=place / name, seed=seed, append_eos=False), tokenizer_of(place), 300)
        for name, seed in (("dense", 1), ("ecmoe", 2))
    ]
    for mine, other in zip(*packed, strict=True):
        assert mine["input_ids"] == other["input_ids"]
    train, held_out = packed[0]
    seen = {tuple(row) for row in train["input_ids"]}
    assert len(held_out) and not seen.intersection(map(tuple, held_out["input_ids"]))


def tokenizer_of(place: Path):
    return AutoTokenizer.from_pretrained(place / "dense")


def write_rows(path: Path, name: str, count: int) -> Path:
    """Short documents, one number each, which the first token of a row tells apart."""
    texts = [f"{name}{number:04d} " + "abcdefg " * 3 for number in range(count)]
    if path.suffix == ".parquet":
        Dataset.from_dict({"text": texts}).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def names_of(rows, place: Path) -> list[str]:
    tokenizer = tokenizer_of(place)
    return [tokenizer.decode(row["input_ids"])[:5] for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_mixture(
    recipe_of: Callable,
    place: Path,
    tmp_path: Path,
    streaming: bool,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows come in proportion to the weights, and what is held out is never among them, however long training is."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # after each Parquet stream
    parts = [write_rows(tmp_path / f"{name}.{suffix}", name, 400) for name in "xy"]
    fields = {
        "dataset": [{"dataset": str(parts[0]), "weight": 3}, {"dataset": str(parts[1]), "weight": 1}],
        "packing": False,
        "streaming": streaming,
        "shuffle_buffer": 50,
        "max_eval_sequences": 1000,
    }
    train, held_out = prepared(recipe_of(**fields), tokenizer_of(place), 300)
    drawn = names_of(islice(train, 1500), place)
    counts = Counter(name[0] for name in drawn)
    assert 0.70 < counts["x"] / len(drawn) < 0.80
    assert 0.65 < Counter(name[0] for name in names_of(held_out, place))["x"] / len(held_out) < 0.85
    kept = set(names_of(held_out, place))
    assert len(kept) > 100 and not kept.intersection(drawn)
    assert len(kept) + len(set(drawn)) > 600  # the rows of both parts are read
    train, held_out = prepared(recipe_of(**fields, seed=7), tokenizer_of(place), 300)
    assert set(names_of(held_out, place)) == kept
    if streaming:
        assert names_of(islice(train, 50), place) != drawn[:50]  # another seed, another order


@pytest.mark.parametrize("streaming", [False, True])
def test_a_validation_dataset(recipe_of: Callable, place: Path, tmp_path: Path, streaming: bool) -> None:
    train_file, validation_file = (write_rows(tmp_path / f"{name}.jsonl", name, 30) for name in "tv")
    recipe = recipe_of(
        dataset=train_file,
        validation_dataset=validation_file,
        packing=False,
        streaming=streaming,
        max_eval_sequences=99,
    )
    train, held_out = prepared(recipe, tokenizer_of(place), 300)
    assert sorted(names_of(held_out, place)) == [f"v{number:04d}" for number in range(30)]
    assert set(names_of(islice(train, 90), place)) == {f"t{number:04d}" for number in range(30)}


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_stream_never_ends(recipe_of: Callable, place: Path, tmp_path: Path, suffix: str) -> None:
    """So that a resumed run counts batches alone: however often the rows were read, in another order each time."""
    rows = write_rows(tmp_path / "rows.jsonl", "n", 40)
    if suffix == "txt":
        texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
        rows = tmp_path / "rows.txt"
        rows.write_text("<|endoftext|>".join(texts))
    train, held_out = prepared(recipe_of(dataset=rows, streaming=True, packing=False), tokenizer_of(place), 300)
    count = 40 - len(held_out)
    names = names_of(islice(train, 3 * count), place)
    passes = [names[start : start + count] for start in range(0, 3 * count, count)]
    assert all(len(set(each)) == count for each in passes)
    assert passes[0] != passes[1] != passes[2]
    assert names == names_of(islice(train, 3 * count), place)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_second_time_nothing_is_tokenized(
    recipe_of: Callable, place: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else differs between two recipes; what makes other tokens is tokenized anew."""
    rows = write_rows(tmp_path / f"rows.{suffix}", "n", 60)
    calls: list[str] = []

    def count(tokenizer) -> object:
        original = type(tokenizer).__call__
        monkeypatch.setattr(
            type(tokenizer),
            "__call__",
            lambda self, text, **options: (calls.append(text), original(self, text, **options))[1],
        )
        return tokenizer

    tokenizer = count(tokenizer_of(place))
    first = prepared(recipe_of(dataset=rows), tokenizer, 300)
    assert len(calls) == 60
    second = prepared(recipe_of(dataset=rows, output_dir="elsewhere", learning_rate=1e-4), tokenizer_of(place), 300)
    assert len(calls) == 60
    assert first[0]["input_ids"] == second[0]["input_ids"]
    prepared(recipe_of(dataset=rows, max_length=48), tokenizer, 300)
    assert len(calls) == 60
    prepared(recipe_of(dataset=rows, append_eos=False), tokenizer, 300)
    assert len(calls) == 120


@pytest.mark.parametrize(
    ("too_long", "fate", "left"), [("drop", "; 6 are", 14), ("truncate", " and are cut; 0 are", 20)]
)
def test_rows_that_are_too_long_are_counted(
    recipe_of: Callable,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    too_long: str,
    fate: str,
    left: int,
) -> None:
    """The same number when the sequences come from the cache, and nothing of a stream, which is not read before."""
    monkeypatch.setattr("ecmoe.finetune.data.PART", 7)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"{n} " + "ab " * (99 if n % 10 < 3 else 2)}) + "\n" for n in range(20))
    )
    fields = {"dataset": rows, "validation_dataset": rows, "packing": False, "too_long": too_long}
    line = f"6 of 20 training rows are longer than max_length=64{fate} left out, too long or without anything to learn"
    for _ in range(2):
        train, _ = prepared(recipe_of(**fields), tokenizer_of(place), 300)
        assert len(train) == left and set(train.column_names) == {"input_ids", "labels"}
        assert line in capsys.readouterr().out.splitlines()
    prepared(recipe_of(**fields), tokenizer_of(place), 300, 1)
    assert "of the first 7 training rows are longer" in capsys.readouterr().out
    prepared(recipe_of(**fields, streaming=True), tokenizer_of(place), 300)
    assert "longer than" not in capsys.readouterr().out


def test_only_what_a_run_uses_is_tokenized(recipe_of: Callable, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecmoe.finetune.data.PART", 2)
    whole, _ = prepared(recipe_of(), tokenizer_of(place), 300)
    part, _ = prepared(recipe_of(), tokenizer_of(place), 300, 5)
    assert len(part) == 5 < len(whole)
    assert part["input_ids"] == whole["input_ids"][:5]


def test_parts_without_a_sequence(
    recipe_of: Callable, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of the rows that gives none, dropped or too short, is no trouble for the others."""
    monkeypatch.setattr("ecmoe.finetune.data.PART", 3)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "a" if n < 25 else "word " * 20}) + "\n" for n in range(30)))
    for fields in ({"max_length": 32}, {"packing": False, "too_long": "drop", "append_eos": False}):
        train, _ = prepared(
            recipe_of(dataset=rows, validation_dataset=rows, **{"max_length": 120} | fields),
            tokenizer_of(place),
            300,
        )
        assert len(train) >= 3


def test_text_columns(place: Path, tmp_path: Path) -> None:
    """A named column is read, its empty rows left out, and a wrong name gets the nearest one."""
    path = tmp_path / "rows.jsonl"
    stories = (f"Once upon a time {number} ran. " * 30 for number in range(20))
    path.write_text(
        "".join(json.dumps({"number": number, "story": text}) + "\n" for number, text in enumerate(stories))
        + "".join(json.dumps({"number": 0, "story": empty}) + "\n" for empty in (None, "", "  "))
    )
    fixed = [f"model={place / 'dense'}", f"output_dir={tmp_path}", f"dataset={path}", "append_eos=false"]

    def of(*fields: str):
        return prepared(load_recipe(place / "recipe.yaml", [*fixed, *fields]), tokenizer_of(place), 300)

    with pytest.raises(RecipeError, match=r"dataset_text_field=stori is not in .* did you mean story"):
        of("dataset_text_field=stori")
    with pytest.raises(RecipeError, match=r"dataset_text_field=number holds Value.*int64.*, not text"):
        of("dataset_text_field=number")
    train, held_out = of("dataset_text_field=story", "packing=false", "too_long=truncate")
    assert len(train) + len(held_out) == 20


def test_rows_whose_answer_was_cut_away_are_said_and_no_batch_is_empty(
    recipe_of: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_end: None
) -> None:
    """Nothing is learned of them; as many others are read as the run uses."""
    rows = [{"prompt": "word " * (40 if n % 10 else 2), "completion": "yes"} for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"dataset": tmp_path / "rows.jsonl", "packing": False, "too_long": "truncate", "max_length": 64}
    trainer = make_trainer(recipe_of(**fields, max_steps=1, per_device_train_batch_size=4))
    assert len(trainer.train_dataset) == 4
    assert "training rows are longer than max_length=64 and are cut; 7" in capsys.readouterr().out
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if len(row["prompt"]) > 50))
    with pytest.raises(RecipeError, match=r"gives no held-out sequence of max_length=64 .* max_length=256 gi"):
        make_trainer(recipe_of(**fields | {"dataset": tmp_path / "long.jsonl"}))


@pytest.mark.parametrize("way", ["filled", "streamed", "rows that are too long", "instructions that are cut"])
def test_what_would_give_a_sequence_is_said(way: str, recipe_of: Callable, place: Path, tmp_path: Path) -> None:
    """How many tokens there are; and what the message names works."""
    rows = [{"text": f"the story of number {number}"} for number in range(40)]
    if "instructions" in way:
        rows = [{"prompt": row["text"], "completion": "yes"} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields: dict[str, Any] = {"dataset": tmp_path / "rows.jsonl", "validation_fraction": 0.05}
    fields |= {
        "filled": {"max_length": 512},
        "streamed": {"max_length": 512, "streaming": True},
        "rows that are too long": {"max_length": 8, "packing": False, "too_long": "drop"},
        "instructions that are cut": {"max_length": 8, "packing": False, "too_long": "truncate"},
    }[way]
    with pytest.raises(RecipeError) as refusal:
        prepared(recipe_of(**fields), tokenizer_of(place))
    said = re.search(
        r"of max_length=(\d+) tokens with something to learn: (\d+) held-out rows? ha\w+ (\d+) tokens; "
        r"max_length=(\d+) gives some, (packing=false takes each row by itself, )?or give more text, or ",
        str(refusal.value),
    )
    assert said is not None, refusal.value
    length, number, tokens, other = map(int, said.groups()[:4])
    assert (said[5] is None) == ("packing" in fields)
    assert (length <= tokens < 512) if "packing" in fields else (2 * other > tokens >= other)
    if way != "streamed":
        assert number == 2
    for remedy in ({"max_length": other}, {"packing": False, "max_length": 64}):
        train, held_out = prepared(recipe_of(**fields | remedy), tokenizer_of(place))
        assert len(held_out) and next(iter(train))["input_ids"]


def test_a_short_run_reads_all_of_a_sorted_file(recipe_of: Callable, place: Path, tmp_path: Path) -> None:
    rows = [{"text": name * 20} for name in "ab" for _ in range(100)]
    (tmp_path / "sorted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"dataset": tmp_path / "sorted.jsonl", "validation_dataset": tmp_path / "sorted.jsonl", "packing": False}
    train, _ = prepared(recipe_of(**fields), tokenizer_of(place), 300, 20)
    assert {name[0] for name in names_of(train, place)} == {"a", "b"}


def test_an_empty_prompt_is_a_prompt(
    recipe_of: Callable, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": prompt, "completion": "yes"} for prompt in ("", None, "word") for _ in range(5)]
    rows += [{"prompt": "word", "completion": ""}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = prepared(recipe_of(dataset=tmp_path / "rows.jsonl", packing=False), tokenizer_of(place))
    assert len(train) + len(held_out) == 15
    assert "3 of 18 rows are empty and left out" in capsys.readouterr().out


def test_the_positions_of_the_model_are_a_limit(recipe_of: Callable, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "word " * 60}) + "\n" for _ in range(9)))
    with pytest.raises(RecipeError, match="more than max_length=128; raise it"):
        make_trainer(recipe_of(dataset=tmp_path / "rows.jsonl", packing=False, max_length=None))


LEARNED = {
    ("messages", ""): "the assistant",
    ("messages", "assistant_only_loss=false"): "all",
    ("messages", "completion_only_loss=true"): None,
    ("prompt", ""): "the completion",
    ("prompt", "completion_only_loss=false"): "all",
    ("prompt", "completion_only_loss=false assistant_only_loss=true"): "the assistant",
    ("prompt", "assistant_only_loss=true"): "the completion",
    ("text", ""): "the completion",
    ("text", "completion_only_loss=false assistant_only_loss=false"): "all",
    ("text", "assistant_only_loss=true"): None,
    ("text", "completion_only_loss=true"): None,
}


@pytest.mark.parametrize(("kind", "fields"), LEARNED)
def test_what_is_learned(kind: str, fields: str, recipe_of: Callable) -> None:
    recipe = recipe_of(**{name: value == "true" for name, _, value in (f.partition("=") for f in fields.split())})
    if LEARNED[kind, fields] is not None:
        assert learned_of(recipe, kind) == LEARNED[kind, fields]
        return
    with pytest.raises(RecipeError, match=f"_only_loss=True is for other rows than these, which hold {kind}"):
        learned_of(recipe, kind)


PROMPTS = [{"prompt": "word " * 60, "completion": "yes"} for _ in range(40)]


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_packed_rows_of_prompts_alone_are_left_out(
    strategy: str, recipe_of: Callable, tmp_path: Path, quick_end: None
) -> None:
    """Every row that is left has something to learn; nowhere is a loss of nothing."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    fields = {"dataset": tmp_path / "rows.jsonl", "packing_strategy": strategy, "max_length": 24, "max_steps": 3}
    trainer = make_trainer(recipe_of(**fields, per_device_train_batch_size=1, logging_steps=1))
    trainer.train()
    assert all(row["loss"] > 0.5 for row in trainer.state.log_history if "loss" in row)
    found = trainer.evaluate()
    assert found["eval_loss"] > 0.5 and found["eval_loss_top_k"] > 0.5
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        assert all(any(label != IGNORE for label in row["labels"]) for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_short_documents_fill_long_rows(
    recipe_of: Callable, place: Path, tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the last row all of them, however many documents a row takes."""
    rows = write_rows(tmp_path / "rows.jsonl", "n", 3000)
    fields = {"dataset": rows, "validation_dataset": rows, "max_length": 100_000 // 2, "append_eos": False}
    train, held_out = prepared(recipe_of(**fields, streaming=streaming), tokenizer_of(place))
    tokens = sum(len(ids) for ids in tokenizer_of(place)(list(load_rows(recipe_of(**fields))[0]["text"]))["input_ids"])
    assert len(held_out) == min(16, tokens // 50_000) >= 1
    assert len(list(islice(train, 1))) == 1


def test_padding_that_nothing_marks_is_refused(recipe_of: Callable) -> None:
    with pytest.raises(RecipeError, match="pad_to_multiple_of=48 fills packed rows of max_length=64 with padding"):
        make_trainer(recipe_of(pad_to_multiple_of=48))
    make_trainer(recipe_of(pad_to_multiple_of=32))
    ragged = [{"input_ids": [1] * n, "labels": [1] * n, "seq_lengths": [n]} for n in (3, 5)]
    with pytest.raises(RecipeError, match="packed rows of unlike length cannot stand side by side"):
        Collator(0)(ragged)


@pytest.mark.parametrize("way", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.5}])
def test_results_are_of_the_likelihood(way: dict, recipe_of: Callable, place: Path, quick_end: None) -> None:
    """Before, after, top-k and gap are of one kind, and the best checkpoint is chosen by it."""
    recipe = recipe_of(**way, max_steps=2)
    found = run(recipe)
    assert found["loss_before"] > 4  # of 300 tokens that are drawn
    assert found["loss_gap"] == pytest.approx(found["loss_after"] - found["loss_after_top_k"], abs=1e-6)
    assert training_arguments(recipe).metric_for_best_model == "nll"
