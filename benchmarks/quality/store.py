"""Finished runs on disk: one JSON file each, so that a run is there whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from .grid import Run


def path_of(folder: Path, run: Run) -> Path:
    return folder / f"{run.name}.json"


def finished(folder: Path, run: Run) -> bool:
    """Whether the run is there with the same recipe; one with another recipe is run again and replaced."""
    path = path_of(folder, run)
    return path.is_file() and json.loads(path.read_text())["recipe"] == json.loads(json.dumps(run.recipe()))


def save(folder: Path, run: Run, result: dict[str, Any]) -> Path:
    """Writes the file beside its place and moves it there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, run)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(rounded(result)) + "\n")
    os.replace(unfinished, path)
    return path


def rounded(value: Any) -> Any:
    """The same with seven significant digits: a run differs from its repetition long before."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def read(folder: Path, run: Run) -> dict[str, Any]:
    """What a finished run found."""
    found: dict[str, Any] = json.loads(path_of(folder, run).read_text())
    return found
