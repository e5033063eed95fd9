"""What can be wrong with a command before there is a model: checked before torch and Transformers are imported."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecmoe.hub import why_no_checkpoint

from .errors import AnalysisError

_PATHS = {
    "data": "name a text file, or a folder of them",
    "pairs": "name a .jsonl file, or a folder of them",
    "matrices": "name a JSON file",
    "text_file": "name a text file",
}
_ENDINGS = {"report": (".html",), "draw": (".svg", ".png")}


def check_arguments(command: str, options: Mapping[str, Any]) -> None:
    """Refuses what the arguments of a command show by themselves to be wrong.

    Raises:
        AnalysisError: naming the first that is, its value and the remedy.
    """
    for name in ("checkpoint", "against"):
        for checkpoint in _listed(options.get(name)):
            check_checkpoint(checkpoint, name)
    for name, remedy in _PATHS.items():
        for path in _listed(options.get(name)):
            if not Path(path).expanduser().exists():
                raise AnalysisError(f"{name}={path} does not exist; {remedy}")
    for name in ("max_tokens", "steps"):
        value = options.get(name)
        if value is not None and value < 0:
            raise AnalysisError(f"{name}={value} must not be negative")
    output = options.get("output")
    if output is not None and not output.endswith(_ENDINGS[command]):
        raise AnalysisError(f"output={output} must end in {' or '.join(_ENDINGS[command])}")


def check_checkpoint(checkpoint: str, name: str = "checkpoint") -> None:
    """Refuses what is neither a folder nor may be a Hub id.

    Raises:
        AnalysisError: saying which of the two it could have been.
    """
    wrong = why_no_checkpoint(checkpoint)
    if wrong:
        raise AnalysisError(f"{name}={checkpoint} {wrong}")


def _listed(value: Any) -> list[str]:
    """A value, or several, or none, that are paths or names."""
    values = value if isinstance(value, list | tuple) else [value]
    return [os.fspath(one) for one in values if isinstance(one, str | os.PathLike)]
