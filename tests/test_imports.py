"""Imports point one way: modeling_ecmoe <- {conversion, finetune, analysis} <- ecmoe, and these three apart."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ecmoe

ROOT = Path(__file__).parents[1]
STAGES = {"conversion", "finetune", "analysis"}
OUTSIDE = {"ecmoe", "examples", "benchmarks", "tests"}
# Leaves, and what each may import: what the stages show while they work, why the Hub gives nothing, rows to tokens.
SHARED = {
    "ecmoe.encoding": {"jinja2", "transformers", "trl"},
    "ecmoe.hub": {"huggingface_hub", "transformers"},
    "ecmoe.progress": {"tqdm"},
}
# What conversion/ holds, and which of its rooms each may import.
INSIDE_CONVERSION = {"checkpoints": set(), "upcycling": {"checkpoints"}, "leaving": {"checkpoints"}}
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
        # Where torch brings it, and where somebody asks for its numbers.
        optional = {"kernels_ecmoe.py": {"triton"}, "quantized_ecmoe.py": {"bitsandbytes"}}.get(path.name, set())
        assert top_level(path.read_text()) <= FAMILY_MAY_IMPORT | optional, path.name


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
        imported = {name.split(".")[0] for name in imported_modules(path.read_text()) - SHARED.keys()}
        assert not imported & (STAGES | OUTSIDE), path.name
        depth = len(path.relative_to(ROOT).parts) - 1  # so many dots stay in the room
        for name in imported_modules(path.read_text()):
            assert len(name) - len(name.lstrip(".")) <= depth, (path.name, name)


def test_what_the_stages_share_imports_none_of_them() -> None:
    for name, allowed in SHARED.items():
        source = (ROOT / f"{name.replace('.', '/')}.py").read_text()
        assert top_level(source) <= allowed | sys.stdlib_module_names


@pytest.mark.parametrize("inner", INSIDE_CONVERSION)
def test_rooms_of_conversion_point_one_way(inner: str) -> None:
    for path in files_of(f"conversion/{inner}"):
        for name in imported_modules(path.read_text()):
            neighbour = name.removeprefix("..").split(".")[0] if name.startswith("..") else inner
            assert neighbour not in INSIDE_CONVERSION.keys() - INSIDE_CONVERSION[inner] - {inner}, (path.name, name)


def test_nothing_imports_a_room_by_a_bare_name() -> None:
    """Installed there is no such name; run in the repository's folder it would be a second copy of the module."""
    for room in ("ecmoe", "modeling_ecmoe", "conversion", "finetune", "analysis", "benchmarks", "examples", "tests"):
        for path in files_of(room):
            assert not top_level(path.read_text()) & (STAGES | {"model_cards", "recipes"}), path


@pytest.mark.parametrize("package", ["ecmoe", "modeling_ecmoe"])
def test_an_import_loads_nothing_that_is_slow(package: str) -> None:
    slow = "('torch', 'transformers', 'ecmoe.', 'modeling_ecmoe.llama', 'modeling_ecmoe.block')"
    script = f"import sys, {package}; sys.exit(', '.join(n for n in sys.modules if n.startswith({slow})) or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "before",
    [
        "import ecmoe",
        "import transformers, ecmoe",
        "from transformers import AutoConfig; import ecmoe",
        "import ecmoe, trl",
    ],
)
def test_the_family_is_registered_whatever_is_imported_first(before: str) -> None:
    """And only the family that is asked for is loaded; what another package registers stays beside it."""
    script = f"""
{before}
import sys, torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

AutoConfig.register("stranger", type("Stranger", (PreTrainedConfig,), {{"model_type": "stranger"}}))
config = AutoConfig.for_model("ecmoe_qwen3", num_hidden_layers=1)
torch.set_default_device("meta")
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "EcMoeQwen3ForCausalLM"
assert "stranger" in CONFIG_MAPPING and "ecmoe_llama" in CONFIG_MAPPING and "ecmoe_none" not in CONFIG_MAPPING
assert "modeling_ecmoe.llama_ecmoe" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


HOOKS = {
    "a look": "import ecmoe, importlib.util; importlib.util.find_spec('transformers.models.auto.configuration_auto')",
    "a thread": """
import threading, time
thread = threading.Thread(target=lambda: __import__("transformers.models.auto.configuration_auto"))
thread.start()
time.sleep(1.5)
import ecmoe
thread.join()
""",
    "another hook": """
import importlib.machinery, sys
import ecmoe

class First:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.PathFinder.find_spec(name, path) if name.endswith("configuration_auto") else None

sys.meta_path.insert(0, First())
import transformers.models.auto.configuration_auto
ecmoe.upcycle
""",
    "copies": """
import copy, ecmoe
import transformers.models.auto.configuration_auto as module
copy.copy(module.__loader__), copy.deepcopy(module.__spec__)
""",
}


@pytest.mark.parametrize("name", HOOKS)
def test_the_registration_survives_whoever_else_looks_at_imports(name: str) -> None:
    end = "from transformers import CONFIG_MAPPING as m; assert 'ecmoe_llama' in m and 'ecmoe_llama' in list(m.keys())"
    done = subprocess.run([sys.executable, "-c", f"{HOOKS[name]}\n{end}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


def test_what_the_front_door_offers_is_there() -> None:
    for name in ecmoe.__all__:
        assert getattr(ecmoe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'upcyle'"):
        ecmoe.upcyle  # noqa: B018


@pytest.mark.parametrize(
    ("room", "heavy"), [("conversion", "transformers"), ("finetune", "torch"), ("analysis", "torch")]
)
def test_help_does_not_wait_for_what_it_does_not_need(room: str, heavy: str) -> None:
    script = (
        f"import sys; from ecmoe.{room}.cli import _parser; _parser().format_help(); sys.exit({heavy!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


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
