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
    "NO_SERVER": "not served: {}",
    "SHARED_KEYS": "no reentrant checkpointing and no quantised cache: layers share keys",
    "STATEFUL": "no quantised cache: some layers carry a state instead of keys",
    "ATTENTION_SINKS": "no flex attention on a CPU",
    "TRANSPOSED": "LoRA's default adapts experts and router alone: PEFT takes Conv1D or stacked experts, not both",
}


def main(arguments: list[str] | None = None) -> None:
    """Writes the page, and ends with 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "families.md")
    options = parser.parse_args(arguments)
    found = results_of(options.results)
    options.output.write_text(page(found), encoding="utf-8")
    print(f"{options.output}: {len(tested.MODEL_TYPES)} families")
    raise SystemExit(any(outcome == "failed" for cell in found.values() for outcome in cell))


def results_of(files: list[Path]) -> dict[tuple[str, str], Counter[str]]:
    """How many tests of each family and column passed, failed or were skipped."""
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
            outcome = "failed" if outcome in ("failure", "error") else outcome
            for column in columns_of(case.get("classname", ""), case.get("name", "")):
                for family in families_of(case.get("name", "")):
                    found[family, column][outcome] += 1
    return found


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


def page(found: dict[tuple[str, str], Counter[str]]) -> str:
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
    lines += [f"| {name} | {'; '.join(reasons)} |" for name in names if (reasons := left_out(name))]
    return "\n".join([*lines, ""])


def _cell(outcomes: Counter[str]) -> str:
    if outcomes["failed"]:
        return f"**{outcomes['failed']} failed**"
    return str(outcomes["passed"]) if outcomes["passed"] else "-"


def left_out(name: str) -> list[str]:
    """Why a family has no test of something, by tests/families.py."""
    reasons = []
    for exception, text in EXCEPTIONS.items():
        members: Any = getattr(tested, exception)
        if name in members:
            reasons.append(text.format(members[name]) if "{}" in text else text)
    return reasons


if __name__ == "__main__":
    main()
