"""Imports point one way: modeling_ecmoe <- {conversion, finetune, analysis}, and these three apart."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = {"conversion", "finetune", "analysis"}
ROOMS = STAGES | {"modeling_ecmoe", "examples", "benchmarks", "tests"}
FAMILY_MAY_IMPORT = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names


def imported_modules(source: str) -> set[str]:
    """Full names of everything a file imports absolutely; relative imports keep their dots."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    return names


def top_level(source: str) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(source)} - {""}


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def test_the_family_imports_torch_and_transformers_alone() -> None:
    files = files_of("modeling_ecmoe")
    assert len(files) >= 5
    for path in files:
        assert top_level(path.read_text()) <= FAMILY_MAY_IMPORT, path.name


def test_the_family_is_flat() -> None:
    """Remote code is copied file by file: siblings alone, one dot, no folders."""
    for path in files_of("modeling_ecmoe"):
        assert path.parent == ROOT / "modeling_ecmoe"
        relative = {name for name in imported_modules(path.read_text()) if name.startswith(".")}
        assert all(not name.startswith("..") and name.count(".") == 1 for name in relative), path.name
        if path.name != "__init__.py":
            assert "." not in relative, path.name  # the scanner of Transformers misses `from . import x`


@pytest.mark.parametrize("room", ["routing_ecmoe.py", "configuration_ecmoe.py"])
def test_routing_and_configuration_import_no_sibling(room: str) -> None:
    assert not any(name.startswith(".") for name in imported_modules((ROOT / "modeling_ecmoe" / room).read_text()))


def test_routing_imports_torch_alone() -> None:
    source = (ROOT / "modeling_ecmoe" / "routing_ecmoe.py").read_text()
    assert top_level(source) <= {"torch"} | sys.stdlib_module_names


@pytest.mark.parametrize("room", sorted(STAGES))
def test_stages_do_not_import_each_other(room: str) -> None:
    for path in files_of(room):
        imported = top_level(path.read_text())
        assert not imported & (ROOMS - {room, "modeling_ecmoe"}), path.name
        assert not any(name.startswith("..") for name in imported_modules(path.read_text())), path.name


@pytest.mark.parametrize(
    ("room", "heavy"), [("conversion", "transformers"), ("finetune", "torch"), ("analysis", "torch")]
)
def test_help_does_not_wait_for_what_it_does_not_need(room: str, heavy: str) -> None:
    script = f"import sys; from {room}.cli import _parser; _parser().format_help(); sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import conversion.plan", "conversion"),
        ("def f():\n    from finetune import run", "finetune"),
        ("import importlib\nimportlib.import_module('analysis.draw')", "analysis"),
    ],
)
def test_a_wrong_import_is_seen(source: str, name: str) -> None:
    """Negative control, also for an import inside a function."""
    assert name in top_level(source)
