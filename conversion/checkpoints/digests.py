"""What tells the files of one checkpoint from those of another."""

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecmoe.progress import SECONDS_PER_LINE, announce

from .source import Source

ROUTER_ROWS = ".mlp.gate.weight"


class Digests(threading.Thread):
    """sha256 of every weight file of the sources, computed beside the writing: hashing holds no interpreter lock."""

    def __init__(self, sources: list[Source]) -> None:
        super().__init__(daemon=True)
        self.sources = sources
        self.found: list[dict[str, str]] = []
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            for source in self.sources:
                self.found.append({path.name: file_digest(path) for path in source.weight_files})
        except OSError as error:
            self.error = error

    def result(self) -> list[dict[str, str]]:
        """One {file name: sha256} per source, once all are known."""
        self.join(SECONDS_PER_LINE)
        if self.is_alive():
            announce("Computing the sha256 of the source's files")
            self.join()
        if self.error:
            raise self.error
        return self.found


def file_digest(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def router_digest(rows: Iterable[Tensor]) -> str:
    """The sha256 of the router rows of every layer, in the layers' order."""
    digest = hashlib.sha256()
    for tensor in rows:
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprints(sources: list[Source], *texts: str | None) -> dict[str, Any]:
    """What tells one state of the input files from another, without reading the weights."""
    stats = {name: state for source in sources for name, state in source.fingerprint().items()}
    read = {name: hashlib.sha256(Path(name).expanduser().read_bytes()).hexdigest() for name in texts if name}
    return stats | read
