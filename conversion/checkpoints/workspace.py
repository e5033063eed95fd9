"""The place in which a conversion grows: it outlives a kill, and no half-made folder in it loads as a checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import ConversionError
from .hub import push
from .writer import write_whole


class Workspace:
    """A hidden folder beside the destination, named after it: `.NAME.partial`.

    It holds a lock, what it is a conversion of, tensors that were measured, and the checkpoint to be, which has no
    config.json until all else is there. The same command finds it again and goes on; another command for the same
    destination begins anew. `finish` gives the checkpoint its name in one step.

    Raises:
        ConversionError: when the folder cannot be made, or another process is at work in it.
    """

    def __init__(self, target: Path, purpose: dict[str, Any]) -> None:
        self.target = target
        self.folder = target.parent / f".{target.name}.partial"
        self.checkpoint = self.folder / "checkpoint"
        self._lock = FileLock(self.folder / "lock", timeout=0)
        self._purpose = json.dumps(purpose, indent=2, sort_keys=True) + "\n"

    def __enter__(self) -> "Workspace":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            purpose = self.folder / "purpose.json"
            if not purpose.is_file() or purpose.read_text(encoding="utf-8") != self._purpose:
                for path in [path for path in self.folder.iterdir() if path.name != "lock"]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                write_whole(purpose, self._purpose)
            self.checkpoint.mkdir(exist_ok=True)
        except Timeout as error:
            raise ConversionError(
                f"destination={self.target} is being written by another process; wait for it"
            ) from error
        except OSError as error:
            if self._lock.is_locked:
                self.__exit__(type(error), error, None)
            raise ConversionError(f"destination={self.target} cannot be made: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After Ctrl-C the work stays, to be gone on with; after an error nothing does."""
        self._lock.release()
        if kind is None or issubclass(kind, Exception):
            shutil.rmtree(self.folder, ignore_errors=True)

    def recall(self, name: str) -> dict[str, Tensor] | None:
        """Tensors that an earlier run kept under that name."""
        path = self.folder / f"{name}.safetensors"
        return load_file(path) if path.is_file() else None

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        write_whole(self.folder / f"{name}.safetensors", content)

    def finish(self) -> None:
        """The checkpoint takes its name; an empty folder of that name gives way."""
        self.checkpoint.rename(self.target)


def produce(target: Path, purpose: dict[str, Any], fill: Callable[[Workspace], None], push_to_hub: str | None) -> None:
    """The checkpoint that `fill` makes, under its name, and on the Hub where a repository is named.

    Raises:
        ConversionError: also when the disk refuses; nothing stays then.
    """
    try:
        with Workspace(target, purpose) as work:
            fill(work)
            work.finish()
    except OSError as error:
        raise ConversionError(f"destination={target} cannot be written: {error}") from error
    if push_to_hub:
        push(target, push_to_hub)
