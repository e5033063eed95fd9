"""Shared by the fine-tuning tests: a folder with checkpoints, text and a recipe, made once."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_dense, write_text
from converted import stories, tiny  # noqa: F401  (fixtures)
from runs import QUICK_END

from ecmoe.conversion import convert
from ecmoe.finetune import Recipe, load_recipe
from ecmoe.finetune.sources import DOCUMENT_SEPARATOR

RECIPE = """
max_length: 64
packing: true
activation_checkpointing: false
validation_fraction: 0.2
max_eval_sequences: 16
per_device_train_batch_size: 8
max_steps: 12
learning_rate: 3e-3
save_strategy: "no"
disable_tqdm: true
use_cpu: true
"""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `datasets` keeps of the tests' files goes where their files go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense checkpoint, its expert-choice conversion, text and a recipe."""
    folder = tmp_path_factory.mktemp("finetune")
    write_dense(folder / "dense", "Llama", initializer_range=0.02)
    documents = write_text(folder / "text.txt").read_text().split(DOCUMENT_SEPARATOR)
    (folder / "text.txt").write_text(DOCUMENT_SEPARATOR.join(document[:2500] for document in documents))
    text = folder / "text.txt"
    # With `blend` all of an expert learns from the first step on, so that routes show in the weights.
    convert(str(folder / "dense"), str(folder / "ecmoe"), num_experts=4, init="blend", text=str(text))
    (folder / "recipe.yaml").write_text(RECIPE + f"dataset: {text}\n")
    return folder


@pytest.fixture
def recipe_of(place: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """The recipe of `place` with other fields; the expert-choice model and tmp_path/out unless they are given."""

    def make(**fields: Any) -> Recipe:
        fields = {"model": place / "ecmoe", "output_dir": tmp_path / "out"} | fields
        values = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
        return load_recipe(place / "recipe.yaml", [f"{name}={json.dumps(value)}" for name, value in values.items()])

    return make


@pytest.fixture
def quick_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's end without its picture and with little calibration, for tests that look at something else."""
    for name, value in QUICK_END.items():
        monkeypatch.setattr(name, value)
