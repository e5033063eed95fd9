"""A saved folder loads as remote code where the package is not installed, and so does a folder saved from there."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from families import CORE, FAMILIES, MIXED, MODEL_TYPES
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).with_name("remote_process.py")
SHARED_FILES = {
    "adapters_ecmoe.py",
    "auto_ecmoe.py",
    "context_ecmoe.py",
    "documents_ecmoe.py",
    "global_pool_ecmoe.py",
    "graphs_ecmoe.py",
    "kernels_ecmoe.py",
    "pairs_ecmoe.py",
    "precision_ecmoe.py",
    "quantized_ecmoe.py",
    "quantizer_ecmoe.py",
    "serving_ecmoe.py",
    "configuration_ecmoe.py",
    "routing_ecmoe.py",
    "bounded_ecmoe.py",
    "router_ecmoe.py",
    "experts_ecmoe.py",
    "versions_ecmoe.py",
    "parallel_ecmoe.py",
    "block_ecmoe.py",
    "mixins_ecmoe.py",
    "names_ecmoe.py",
    "notices_ecmoe.py",
}
SUFFIXES = {
    "AutoConfig": "Config",
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
    "AutoModelForQuestionAnswering": "ForQuestionAnswering",
}


@pytest.fixture
def remote_process() -> ModuleType:
    """The script as a module of this process, where the package is there."""
    spec = importlib.util.spec_from_file_location("remote_process", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_apart(work: Path, ids: Path, folders: list[Path]) -> tuple[dict[str, torch.Tensor], list[Path]]:
    """Runs the script from another folder with an empty cache; its outputs and the folders it saved."""
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home")}
    command = [sys.executable, SCRIPT, ids, work / "out.safetensors", work / "again", *folders]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(work / "out.safetensors"), [work / "again" / folder.name for folder in folders]


def assert_carries_its_code(folder: Path, family: str) -> None:
    file = f"{MODEL_TYPES[family]}_ecmoe"
    own = {f"{file}.py"}
    if "from .variants_ecmoe" in (folder / f"{file}.py").read_text():  # which few families take mixins of
        own.add("variants_ecmoe.py")
    assert {path.name for path in folder.glob("*.py")} == SHARED_FILES | own
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {name: f"{file}.EcMoe{family}{suffix}" for name, suffix in SUFFIXES.items()}


OTHERS = [name for name in FAMILIES | MIXED if name not in CORE]


@pytest.mark.parametrize(
    "families",
    [CORE, *(pytest.param(OTHERS[i : i + 4], marks=pytest.mark.families) for i in range(0, len(OTHERS), 4))],
    ids=lambda families: "-".join(families),
)
def test_remote_code_gives_the_outputs_of_the_package_twice(
    families: list[str], remote_process: ModuleType, make_routed_model: Callable, make_tokens: Callable, tmp_path: Path
) -> None:
    """Every family and head, from a saved folder and from one that the remote code saved itself."""
    ids = make_tokens(2, 9)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    folders, expected = [], {}
    for family in families:
        model = make_routed_model(family)
        folder = tmp_path / family
        model.save_pretrained(folder)
        assert_carries_its_code(folder, family)
        outputs = remote_process.outputs_of(folder, ids)
        expected |= {f"{family}.{name}": tensor for name, tensor in outputs.items()}
        folders.append(folder)
    for work in ("first", "second"):
        found, folders = run_apart(tmp_path / work, tmp_path / "ids.safetensors", folders)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5, msg=f"{work} {name}")
        for folder in folders:
            assert_carries_its_code(folder, folder.name)


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForQuestionAnswering"])
def test_every_saved_class_carries_code_and_a_complete_map(head: str, make_model: Callable, tmp_path: Path) -> None:
    make_model("Qwen3", head=head).save_pretrained(tmp_path)
    assert_carries_its_code(tmp_path, "Qwen3")


def test_a_checkpoint_with_the_code_of_before_is_saved_over_itself(make_model: Callable, tmp_path: Path) -> None:
    """Its map names one file for all families; loaded with the package it gets its own, and the old one goes."""
    model = make_model("Qwen3")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_ecmoe.EcMoeQwen3Config",
        "AutoModelForCausalLM": "modeling_ecmoe.EcMoeQwen3ForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "qwen3_ecmoe.py").rename(tmp_path / "modeling_ecmoe.py")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is type(model)
    loaded.save_pretrained(tmp_path)
    assert_carries_its_code(tmp_path, "Qwen3")
