"""Where a checkpoint is: a folder, or what the Hub hands out as one."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..errors import ConversionError

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
# Mistral and Llama repositories carry the same weights a second time in another layout.
_OTHER_LAYOUTS = ["consolidated*", "original/*"]


def locate(source: str, revision: str | None = None, with_weights: bool = True) -> tuple[Path, str | None]:
    """The folder of a checkpoint given as a folder or a Hub id, and the commit where it came from the Hub.

    A Hub id may carry its revision: `Qwen/Qwen3-0.6B@main`. Pickled weights are never fetched.

    Raises:
        ConversionError: when it is neither, or the Hub does not have it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, None
    if folder.exists():
        raise ConversionError(f"source={source} is a file; give the checkpoint's folder")
    repository, _, named_revision = source.partition("@")
    if source.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise ConversionError(
            f"source={source} does not exist; give a checkpoint folder or a Hub id such as Qwen/Qwen3-0.6B"
        )
    try:
        snapshot = huggingface_hub.snapshot_download(
            repository,
            revision=named_revision or revision,
            allow_patterns=_SMALL_FILES + ["*.safetensors"] * with_weights,
            ignore_patterns=_OTHER_LAYOUTS,
        )
    except _HUB_ERRORS as error:
        raise ConversionError(
            f"source={source} is no local folder and could not be fetched from the Hub: {_hub_reason(error)}"
        ) from error
    return Path(snapshot), Path(snapshot).name


_HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


def _hub_reason(error: BaseException) -> str:
    """The first line, in place of which the Hub client has a number for what is not there, a mistyped name mostly."""
    if isinstance(error, RepositoryNotFoundError):
        return "it has no such repository, or a private one (log in with `hf auth login`)"
    return first_line(error)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """What a refusal of a config's field says; the lines before it say where."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, with a clear refusal of anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not valid JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return content
