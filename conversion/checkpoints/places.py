"""Where a checkpoint comes from and goes to, as far as it shows before torch is there: these take no time to import."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ecmoe.hub import could_be_hub_id
from ecmoe.progress import gigabytes

from ..errors import ConversionError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def local_folder(source: str) -> Path | None:
    """The folder of a checkpoint that is given as one; None for what may be a Hub id.

    Raises:
        ConversionError: for a file, and for a path that leads nowhere.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConversionError(f"source={source} is a file; give the checkpoint's folder")
    if not could_be_hub_id(source):
        raise ConversionError(
            f"source={source} does not exist; give a checkpoint folder or a Hub id such as Qwen/Qwen3-0.6B"
        )
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, with a clear refusal of anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not valid JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return content


def free_place(destination: str) -> Path:
    """The folder that a checkpoint may take, after a look at what is there.

    Raises:
        ConversionError: when something is.
    """
    target = Path(destination).expanduser().resolve()  # a link to an empty folder could not be renamed over
    sweep(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConversionError(f"destination={target} exists; name a folder that does not, or remove it")
    if target.is_mount():
        raise ConversionError(f"destination={target} is a mount point and cannot be replaced; name a folder in it")
    return target


def existing_parent(target: Path) -> Path:
    """The nearest folder above that is there, whose disk a checkpoint will lie on."""
    return next(folder for folder in target.absolute().parents if folder.exists())


def check_disk(target: Path, nbytes: int) -> None:
    """Room for the output, counting what an earlier run has written of it already.

    Raises:
        ConversionError: with what is needed and what is there.
    """
    place = existing_parent(target)
    written = target.parent / f".{target.name}.partial"
    there = sum(path.stat().st_size for path in written.rglob("*") if path.is_file()) if written.is_dir() else 0
    free = shutil.disk_usage(place).free + there
    if free < nbytes:
        raise ConversionError(
            f"destination={target} needs {gigabytes(nbytes)} and {gigabytes(free)} are free there; "
            "free some, or choose another disk"
        )


def sweep(target: Path) -> None:
    """Removes what a run that was killed right after its last step left beside the finished checkpoint."""
    folder = target.parent / f".{target.name}.partial"
    if target.exists() and folder.is_dir() and not (folder / "checkpoint").exists():
        shutil.rmtree(folder, ignore_errors=True)


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, in the powers of ten that Transformers uses."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise ConversionError(f"max_shard_size={text} is no size; write it as 500MB or 5GB")
    return int(match[1]) * _UNITS[match[2]]
