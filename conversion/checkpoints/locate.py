"""Where a checkpoint is: a folder, or what the Hub hands out as one."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from ecmoe.hub import why_not_from_hub

from ..errors import ConversionError
from .places import local_folder

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
# Mistral and Llama repositories carry the same weights a second time in another layout.
_OTHER_LAYOUTS = ["consolidated*", "original/*"]


def locate(source: str, revision: str | None = None, with_weights: bool = True) -> tuple[Path, str | None]:
    """The folder of a checkpoint given as a folder or a Hub id, and the commit where it came from the Hub.

    A Hub id may carry its revision: `Qwen/Qwen3-0.6B@main`. Pickled weights are never fetched.

    Raises:
        ConversionError: when it is neither, or the Hub does not have it.
    """
    folder = local_folder(source)
    if folder is not None:
        return folder, None
    repository, _, named_revision = source.partition("@")
    try:
        snapshot = huggingface_hub.snapshot_download(
            repository,
            revision=named_revision or revision,
            allow_patterns=_SMALL_FILES + ["*.safetensors"] * with_weights,
            ignore_patterns=_OTHER_LAYOUTS,
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ConversionError(
            f"source={source} is no local folder and could not be fetched from the Hub: {why_not_from_hub(error)}"
        ) from error
    return Path(snapshot), Path(snapshot).name


def last_line(error: BaseException) -> str:
    """What a refusal of a config's field says; the lines before it say where."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
