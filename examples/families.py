"""What each family passes, as a page: `python -m examples.families RESULTS.xml ... --output docs/families.md`.

The results are pytest's own (`--junitxml`), of the core families and the others; `make families` runs both and this. A
cell is what its tests gave: how many passed, or that one failed. Where a family has no test of a column,
tests/families.py says why.
"""

import argparse
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import families as tested  # noqa: E402  tests/families.py

import modeling_ecmoe  # noqa: E402
from ecmoe.conversion.upcycling.refusals import REFUSALS  # noqa: E402

# What a column is called, and the tests that are in it: a file, and a pattern of their names.
COLUMNS: dict[str, tuple[str, str]] = {
    "exact": ("conversion.test_initialisations", "test_step_0_is_exact"),
    "causal": ("modeling_ecmoe.test_causality", "test_later_tokens"),
    "padded, batched": ("modeling_ecmoe.test_causality", "test_padded_batch|test_batch_of_one"),
    "cache": ("modeling_ecmoe.test_causality", "test_cached_steps"),
    "packed": ("modeling_ecmoe.test_packing", "test_packed_documents"),
    "saved, loaded": ("modeling_ecmoe.test_family", "test_saved_and_loaded"),
    "remote code": ("modeling_ecmoe.test_remote_code", "."),
    "heads": ("modeling_ecmoe.test_heads", "."),
    "checkpointing": ("modeling_ecmoe.test_compile", "test_checkpointed_step"),
    "compiled": ("modeling_ecmoe.test_compile", "test_compiled"),
    "generation": ("modeling_ecmoe.test_generation", "."),
    "parallel": ("modeling_ecmoe.test_plans", "test_parallel_plans"),
    "LoRA": ("modeling_ecmoe.test_family|finetune.test_lora", "test_lora_on|test_the_default_adapters"),
    "served": ("modeling_ecmoe.test_serving", "."),
}
# Of tests/families.py: what a family is left out of, and the reason where none stands beside its name.
EXCEPTIONS: dict[str, str] = {
    "NO_PACKING": "no packing: packed documents would see each other, as in the dense class",
    "NO_STATIC_CACHE": "no static cache, as the dense class",
    "NO_EXPORT": "no export of a decoding step: {}",
    "NO_TENSOR_PLAN": "no tensor parallelism: {}",
    "NO_STAGES": "no pipeline: the dense family has no plan",
    "SHARED_KEYS": "no reentrant checkpointing and no quantised cache: layers share keys",
    "STATEFUL": "no quantised cache: some layers carry a state instead of keys",
    "ATTENTION_SINKS": "no flex attention on a CPU",
    "TRANSPOSED": "LoRA's default adapts experts and router alone: PEFT takes Conv1D or stacked experts, not both",
}


Found = dict[tuple[str, str], Counter[str]]


def main(arguments: list[str] | None = None) -> None:
    """Writes the page, and ends with 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "families.md")
    options = parser.parse_args(arguments)
    found, skipped = results_of(options.results)
    options.output.write_text(page(found, skipped), encoding="utf-8")
    print(f"{options.output}: {len(tested.MODEL_TYPES)} families")
    raise SystemExit(any(outcome == "failed" for cell in found.values() for outcome in cell))


def results_of(files: list[Path]) -> tuple[Found, dict[str, dict[str, str]]]:
    """How many tests of each family and column passed or failed, and of what was skipped the reason by family and
    column."""
    found: Found = defaultdict(Counter)
    skipped: dict[str, dict[str, str]] = defaultdict(dict)
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            name = case.get("name", "")
            ends = {child.tag: child.get("message", "") for child in case}
            for column in columns_of(case.get("classname", ""), name):
                for family in families_of(name):
                    if "skipped" in ends:
                        skipped[family][column] = ends["skipped"]
                    elif not is_left_out(family, column, name):
                        found[family, column]["failed" if {"failure", "error"} & ends.keys() else "passed"] += 1
    return found, skipped


def is_left_out(family: str, column: str, name: str) -> bool:
    """Whether a test that names the family, alone or in a group, leaves it out, or shows that it cannot."""
    if column == "packed":
        return family in tested.NO_PACKING
    if column != "parallel":
        return False
    cannot_be_staged = family in tested.NO_STAGES or not has_pipeline(family)
    return ("tensor" in name and family in tested.NO_TENSOR_PLAN) or ("pipeline" in name and cannot_be_staged)


def has_pipeline(family: str) -> bool:
    """Whether Transformers' pipeline computes what the model does."""
    return bool(modeling_ecmoe.model_class(tested.MODEL_TYPES[family]).supports_pipeline)


def columns_of(module: str, name: str) -> list[str]:
    """The columns that a test belongs to."""
    return [
        column
        for column, (modules, names) in COLUMNS.items()
        if re.search(rf"({modules})$", module) and re.match(names, name)
    ]


def families_of(name: str) -> list[str]:
    """The families that a test's parameters name; a group of them is named by the group."""
    parameters = re.findall(r"\[(.*)\]$", name)
    words = re.split(r"[-, ]+", parameters[0]) if parameters else []
    named = [word for word in words if word in tested.MODEL_TYPES]
    if named:
        return named
    core, others = list(tested.CORE), [name for name in tested.MODEL_TYPES if name not in tested.CORE]
    return core if "core" in words else others if "others" in words else []


def page(found: Found, skipped: dict[str, dict[str, str]]) -> str:
    """The table and what is left out of it, in Markdown."""
    names = sorted(tested.MODEL_TYPES, key=str.lower)
    lines = [
        "# Families",
        "",
        f"{len(tested.FAMILIES)} dense families and {len(tested.MIXED)} whose dense class is a mixture itself. A",
        "number is how many tests of the column passed with a tiny random model of the family that has all its",
        f"peculiarities, on a CPU; the core families ({', '.join(tested.CORE)}) are tested in all variants, the others",
        "where they can differ. `make families` writes this page.",
        "",
        f"| family | `model_type` | {' | '.join(COLUMNS)} |",
        f"| --- | --- |{' ---: |' * len(COLUMNS)}",
    ]
    lines += [
        f"| {name} | `{tested.MODEL_TYPES[name]}` | {' | '.join(_cell(found[name, column]) for column in COLUMNS)} |"
        for name in names
    ]
    lines += ["", "| column | tests |", "| --- | --- |"]
    for column, (modules, pattern) in COLUMNS.items():
        files = [f"tests/{module.replace('.', '/')}.py" for module in modules.split("|")]
        which = "" if pattern == "." else f": {', '.join(f'`{part}...`' for part in pattern.split('|'))}"
        lines.append(f"| {column} | {', '.join(f'[{Path(file).name}](../{file})' for file in files)}{which} |")
    lines += ["", "## What a family is left out of", "", "| family | what, and why |", "| --- | --- |"]
    for name in names:
        reasons = left_out(name)
        reasons += [f"{column}: {why}" for column, why in skipped[name].items() if not found[name, column]["passed"]]
        lines += [f"| {name} | {'; '.join(reasons)} |"] if reasons else []
    return "\n".join([*lines, *refused(), ""])


def refused() -> list[str]:
    """What the converter refuses, with its own reasons, as a table."""
    together: dict[tuple[str, str], list[str]] = defaultdict(list)
    for model_type, refusal in REFUSALS.items():
        together[refusal.reason, refusal.nearest].append(f"`{model_type}`")
    rows = [f"| {', '.join(sorted(types))} | {why} | {nearest} |" for (why, nearest), types in together.items()]
    header = ["", "## What is refused", "", "| `model_type` | why | instead |", "| --- | --- | --- |"]
    return [*header, *sorted(rows)]


def _cell(outcomes: Counter[str]) -> str:
    if outcomes["failed"]:
        return f"**{outcomes['failed']} failed**"
    return str(outcomes["passed"]) if outcomes["passed"] else "-"


def left_out(name: str) -> list[str]:
    """Why a family has no test of something, by tests/families.py and its own classes."""
    reasons = []
    for exception, text in EXCEPTIONS.items():
        members: Any = getattr(tested, exception)
        if name in members:
            reasons.append(text.format(members[name]) if "{}" in text else text)
    if name not in tested.NO_STAGES and not has_pipeline(name):
        reasons.append("a pipeline is refused: Transformers' computes something else")
    if name in tested.MIXED:
        reasons.append("no dense checkpoint becomes one ([mixtures](mixtures.md))")
    return reasons


if __name__ == "__main__":
    main()
