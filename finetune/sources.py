"""Where rows come from: files, Hub datasets, mixtures of them, in memory or streamed; and of what kind they are."""

import difflib
import hashlib
import math
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from accelerate import PartialState
from datasets import Dataset, IterableDataset

from ecmoe.progress import number_of

from .errors import RecipeError
from .recipe import Recipe, refuse_unknown

DOCUMENT_SEPARATOR = "<|endoftext|>"
SPLIT_SEED = 0  # not the recipe's: every seed is judged on the same documents
_FIELDS = ("dataset", "weight", "dataset_config", "dataset_split")
# What each kind is read from, in the order in which they are looked for, and what is said of it.
_KINDS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "text": ("text",)}
_LEARNED = {
    "messages": "conversations from {}; what the assistant says is learned",
    "prompt": "prompt and completion from {}; the completion is learned",
    "text": "text from {}; all of it is learned",
}
# What columns of instructions and answers are called.
_PROMPTS = ("prompt", "question", "instruction", "query", "input", "problem")
_ANSWERS = ("completion", "answer", "response", "output", "solution", "chosen")
_BESIDE = ("tools", "chat_template_kwargs")  # what a row may hold for its template
Rows: TypeAlias = Dataset | IterableDataset


def load_rows(recipe: Recipe) -> tuple[Rows, Rows, str]:
    """Training rows, held-out rows, and their kind: "text", "messages" or "prompt".

    The columns are named after the kind: text; messages; prompt and completion. Empty rows are left out.

    Raises:
        RecipeError: when a dataset cannot be found or read, is empty, or lacks the columns.
    """
    entries = recipe.dataset if isinstance(recipe.dataset, list) else [{"dataset": recipe.dataset}]
    if not entries:
        raise RecipeError("dataset=[] holds nothing; give a path or Hub id, or a list of mappings")
    parts = [_entry(entry, recipe) for entry in entries]
    kinds = {kind for _, kind, _ in parts}
    if len(kinds) > 1:
        raise RecipeError(f"dataset mixes rows of {' and '.join(sorted(kinds))}; give one kind in all of its parts")
    kind = kinds.pop()
    if recipe.validation_dataset is not None:
        held_out, other, _ = _entry({"dataset": recipe.validation_dataset}, recipe)
        if other != kind:
            raise RecipeError(f"validation_dataset={recipe.validation_dataset} holds {other} and dataset {kind} rows")
        # In another order, as where some are held out: a run may use the first ones alone.
        mixed = [rows.shuffle(seed=SPLIT_SEED) if isinstance(rows, Dataset) else rows for rows, _, _ in parts]
        splits = [(rows, held_out) for rows in mixed]
    else:
        splits = [_split(rows, recipe, name["dataset"]) for (rows, _, _), name in zip(parts, entries, strict=True)]
    weights = [weight for _, _, weight in parts]
    train = _mix([rows for rows, _ in splits], weights)
    held_out = splits[0][1] if recipe.validation_dataset else _mix([rows for _, rows in splits], weights)
    return train, held_out, kind


def say(line: str) -> None:
    """Prints a line once, however many processes run."""
    if PartialState().is_main_process:
        print(line, flush=True)


def _entry(entry: Any, recipe: Recipe) -> tuple[Rows, str, float]:
    """Rows, kind and weight of one part of a mixture."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dataset"), str):
        raise RecipeError(f"dataset={entry!r} must be a path or Hub id, or a mapping with `dataset` and `weight`")
    refuse_unknown(entry, _FIELDS, "a dataset")
    weight = entry.get("weight", 1)
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < math.inf:
        raise RecipeError(f"weight={weight} of dataset={entry['dataset']} must be a number above 0")
    try:
        rows, kind = _as_kind(_read(entry, recipe), recipe, entry["dataset"])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"dataset={entry['dataset']} cannot be read: {_reason(error)}") from error
    return rows, kind, float(weight)


def _read(entry: dict[str, Any], recipe: Recipe) -> Rows:
    name = entry["dataset"]
    path = Path(name).expanduser()
    if (path.is_absolute() or name.startswith((".", "~"))) and not path.exists():
        raise RecipeError(f"dataset={name} does not exist")
    if path.is_file() and path.stat().st_size == 0:
        raise RecipeError(f"dataset={name} is empty")
    if path.suffix == ".txt":
        parts = (part.strip() for part in path.read_text(encoding="utf-8-sig").split(DOCUMENT_SEPARATOR))
        texts = [part for part in parts if part]
        if not texts:
            raise RecipeError(f"dataset={name} is empty")
        documents = Dataset.from_dict({recipe.training.get("dataset_text_field") or "text": texts})
        return documents.to_iterable_dataset() if recipe.streaming else documents
    if path.suffix in (".json", ".jsonl", ".parquet"):
        if not path.is_file():
            raise FileNotFoundError("no such file")
        kind = "parquet" if path.suffix == ".parquet" else "json"
        return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=recipe.streaming)
    if path.exists():
        raise RecipeError(f"dataset={name} must be a .txt, .jsonl or .parquet file or a Hub dataset id")
    config = entry.get("dataset_config", recipe.dataset_config)
    split = entry.get("dataset_split", recipe.dataset_split)
    return datasets.load_dataset(name, config, split=split, streaming=recipe.streaming)


def _reason(error: BaseException) -> str:
    """In one line; `datasets` says "an error occurred" and keeps what it was as the cause."""
    generic = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None
    return " ".join(str(error.__cause__ if generic else error).split())


def _as_kind(rows: Rows, recipe: Recipe, name: str) -> tuple[Rows, str]:
    """The rows with the columns of their kind alone, empty ones left out."""
    resolved = rows._resolve_features() if isinstance(rows, IterableDataset) else rows
    features: dict[str, Any] = dict(resolved.features or {})
    kind, found = _kind_of(list(features), recipe, name)
    for column in found if kind != "messages" else ():
        held = features[column]
        is_text = held in (datasets.Value("string"), datasets.Value("large_string"))
        if not is_text and not (kind == "prompt" and isinstance(held, datasets.List)):
            raise RecipeError(
                f"{_field(found[column])}={column} holds {held}, not text; name the column that holds text"
            )
    say(f"dataset={name}: {_LEARNED[kind].format(', '.join(found))}")
    beside = [column for column in _BESIDE if kind != "text" and column in features and column not in found]
    rows = rows.select_columns([*found, *beside])
    for old, new in found.items():
        rows = rows.rename_column(old, new) if old != new else rows
    options: dict[str, Any] = {} if isinstance(rows, IterableDataset) else {"desc": "Leaving out empty rows"}
    learned = _KINDS[kind][-1]  # a prompt may be empty
    filled = rows.filter(lambda row: _is_filled(row[learned]), **options)
    if isinstance(filled, Dataset) and len(filled) < len(rows):
        say(f"dataset={name}: {len(rows) - len(filled):,} of {len(rows):,} rows are empty and left out")
    return filled, kind


def _field(part: str) -> str:
    """The recipe's field that names a column."""
    return "dataset_text_field" if part == "text" else f"{part}_column"


def _kind_of(columns: list[str], recipe: Recipe, name: str) -> tuple[str, dict[str, str]]:
    """The first kind that is there, of those that the recipe names, if it names any; and its columns, with their new
    names."""
    if not columns:
        raise RecipeError(f"dataset={name} is empty")
    names = {
        "messages": recipe.messages_column or ("conversations" if "messages" not in columns else "messages"),
        "prompt": recipe.prompt_column or "prompt",
        "completion": recipe.completion_column or "completion",
        "text": recipe.training.get("dataset_text_field") or "text",
    }
    given = {"text"} if recipe.training.get("dataset_text_field") else set()
    given |= {part for part in names if part != "text" and getattr(recipe, f"{part}_column")}
    named = [kind for kind, parts in _KINDS.items() if given & set(parts)]
    for kind in named or _KINDS:
        if all(names[part] in columns for part in _KINDS[kind]):
            return kind, {names[part]: part for part in _KINDS[kind]}
    absent = [names[part] for part in names if part in given and names[part] not in columns]
    other = _standard_kind(columns) if recipe.other_columns and len(absent) == len(given) else None
    if other is not None:
        say(f"dataset={name} has none of the recipe's columns ({', '.join(absent)}); the standard ones are taken")
        found = ("conversations",) if other == "messages" and "messages" not in columns else _KINDS[other]
        return other, dict(zip(found, _KINDS[other], strict=True))
    wanted = {names[part]: part for part in _KINDS[named[0] if named else "text"]}
    missing = next(column for column in wanted if column not in columns)
    hint = _hint(missing, columns, wanted, named, recipe)
    others = (
        " Conversations are read from messages_column=messages, instructions from prompt_column=prompt with "
        "completion_column=completion"
    )
    raise RecipeError(
        f"{_field(wanted[missing])}={missing} is not in dataset={name}, which has {', '.join(columns)}{hint}"
        + ("" if named else others)
    )


def _standard_kind(columns: list[str]) -> str | None:
    """The kind of rows by the columns that TRL knows. Not text beside a question or an answer under other names."""
    if {"messages", "conversations"} & set(columns):
        return "messages"
    if {"prompt", "completion"} <= set(columns):
        return "prompt"
    return "text" if "text" in columns and not any(_pair(columns)) else None


def _pair(columns: list[str]) -> list[str | None]:
    """The columns that are called as instructions and answers are."""
    return [next((name for name in words if name in columns), None) for words in (_PROMPTS, _ANSWERS)]


def _hint(missing: str, columns: list[str], wanted: dict[str, str], named: list[str], recipe: Recipe) -> str:
    """What to set where a column is missing: a name of the same role or nearly the same, never an answer for a prompt;
    or the fields for rows of another kind."""
    part, pair = wanted[missing], _pair(columns)
    both = "; set prompt_column={} completion_column={}".format(*pair) if all(pair) else ""
    if part in ("prompt", "completion") and both and not set(wanted) & set(columns):
        return both
    roles = {"prompt": (_PROMPTS, _ANSWERS), "completion": (_ANSWERS, _PROMPTS)}
    same, opposite = roles.get(part, ((), ()))
    others = [column for column in columns if column not in wanted and column not in opposite]
    near = [column for column in same if column in others]
    near = near or difflib.get_close_matches(missing, others, n=1, cutoff=0.6)
    if {"messages", "conversations"} & set(columns):
        kind = "messages"
    else:
        kind = "prompt" if both else "text" if "text" in columns else ""
    if kind and not near and kind not in named:
        fields = ("messages_column", "prompt_column", "completion_column")
        changes = {field: "" for field in fields if getattr(recipe, field)}  # left open
        changes |= {"dataset_text_field": ""} if recipe.training.get("dataset_text_field") else {}
        changes |= {"prompt_column": pair[0] or "", "completion_column": pair[1] or ""} if kind == "prompt" else {}
        return "; set " + " ".join(f"{field}={value or ' (empty)'}" for field, value in changes.items())
    near = near or (others if len(others) == 1 else [])
    return f"; did you mean {near[0]}?" if near else ""


def _is_filled(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else bool(value)


def _split(rows: Rows, recipe: Recipe, name: str) -> tuple[Rows, Rows]:
    """Rows to learn from and rows held out: the same ones whatever the seed, the model and the mixture."""
    if isinstance(rows, IterableDataset):
        share = recipe.validation_fraction
        return rows.filter(lambda row: _draw(row) >= share), rows.filter(lambda row: _draw(row) < share)
    if len(rows) < 2:
        raise RecipeError(
            f"dataset={name} holds {number_of(len(rows), 'row')}; at least two are needed, one of them held out"
        )
    try:
        split = rows.train_test_split(test_size=recipe.validation_fraction, seed=SPLIT_SEED)
    except ValueError as error:
        raise RecipeError(
            f"validation_fraction={recipe.validation_fraction} leaves nothing to learn from or nothing to hold out of "
            f"{number_of(len(rows), 'row')}"
        ) from error
    return split["train"], split["test"]


def _draw(row: dict[str, Any]) -> float:
    """A number in [0, 1) that depends on the row alone: a stream has no length to split."""
    digest = hashlib.sha256(repr(sorted(row.items())).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _mix(parts: list[Rows], weights: list[float]) -> Rows:
    """Rows of all parts, drawn in proportion to the weights until every part was read once."""
    if len(parts) == 1:
        return parts[0]
    total = sum(weights)
    shares = [weight / total for weight in weights]
    try:
        return datasets.interleave_datasets(parts, shares, seed=SPLIT_SEED, stopping_strategy="all_exhausted")
    except ValueError as error:
        raise RecipeError(
            f"dataset mixes rows whose columns hold different things ({' '.join(str(error).split())[:200]}); give all "
            "parts the same columns"
        ) from error
