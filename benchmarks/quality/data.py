"""The domains: documents, held out by document, as windows of tokens.

Prose, documentation and mathematics are the folders of corpus-3domains, whose validation files hold other documents
than their training files; code is the standard library of the running interpreter, and stories are TinyStories, of both
of which a seeded tenth of the documents is held out.
"""

import random
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MIXTURE = ("prose", "documentation", "mathematics", "code")
DOMAINS = (*MIXTURE, "stories")
LENGTH = 128  # tokens of a window
HELD_OUT_WINDOWS = 128  # of each domain
CALIBRATION_WINDOWS = 128  # of the training documents, never trained on

END = "<|endoftext|>"

_STORIES = "tinystories-v2-2MiB/tinystories_sample.txt"
_FOLDERS = {"prose": "prose", "documentation": "docs", "mathematics": "math"}
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}


@dataclass(frozen=True)
class Windows:
    """Token ids of one domain, [windows, LENGTH] each: to train on, to calibrate thresholds on, held out."""

    train: Tensor
    calibration: Tensor
    held_out: Tensor


def files() -> list[str]:
    """What the domains are read from, below the data folder."""
    parts = [f"corpus-3domains/{name}/{part}.parquet" for name in _FOLDERS.values() for part in ("train", "validation")]
    return [*parts, _STORIES]


def read_domain(domain: str, data: Path) -> tuple[list[str], list[str]]:
    """The documents to train on and the ones that are held out."""
    if domain == "code":
        return split(_library_modules())
    if domain == "stories":
        text = (data / _STORIES).read_text(encoding="utf-8")
        return split([story.strip() for story in text.split(END) if story.strip()])
    folder = data / "corpus-3domains" / _FOLDERS[domain]
    train, held_out = (_texts(folder / f"{part}.parquet") for part in ("train", "validation"))
    return train, held_out


def split(documents: Sequence[str], one_in: int = 10) -> tuple[list[str], list[str]]:
    """A seeded one in ten of the documents is held out; both parts in the seeded order."""
    order = random.Random(0).sample(range(len(documents)), len(documents))
    held_out = max(1, len(documents) // one_in)
    return [documents[i] for i in order[held_out:]], [documents[i] for i in order[:held_out]]


def _texts(path: Path) -> list[str]:
    import pyarrow.parquet  # a machine that is handed tokens has none

    texts: list[str] = pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    return texts


def _library_modules() -> list[str]:
    """The source of the modules of the standard library, one document each; nothing is imported."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if len(text) >= 500:
                documents.append(text)
    return documents


def trained_bpe(documents: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE of the `tokenizers` library; its token 0 is <|endoftext|>."""
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(documents, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return made


def windows(tokenizer: Any, documents: Sequence[str], most: int | None = None, length: int = LENGTH) -> Tensor:
    """[windows, length] ids of the documents end to end, at most `most` windows; what fills none is left."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, verbose=False)["input_ids"]
        if most is not None and len(ids) >= most * length:
            break
    complete = len(ids) // length if most is None else min(len(ids) // length, most)
    return torch.tensor(ids[: complete * length]).view(complete, length)


def load(data: Path, tokenizer: Any, most: int, domains: Sequence[str] = DOMAINS) -> dict[str, Windows]:
    """Every domain's windows, at most `most` to train on. Which are held out does not depend on any seed of a run."""
    found = {}
    for domain in domains:
        documents, held_out = read_domain(domain, data)
        train = windows(tokenizer, documents, most + CALIBRATION_WINDOWS)
        other = windows(tokenizer, held_out)
        chosen = torch.randperm(len(other), generator=torch.Generator().manual_seed(0))[:HELD_OUT_WINDOWS]
        found[domain] = Windows(train[:-CALIBRATION_WINDOWS], train[-CALIBRATION_WINDOWS:], other[chosen])
    return found


def training_batches(pools: Mapping[str, Tensor], rows: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches [rows, length] with as many windows of each domain, the domains taking turns by rows.

    Each domain is gone through in a seeded order, and in a new one when it is used up.

    Args:
        pools: of each domain its training windows [N, length].

    Raises:
        ValueError: when the domains do not divide the rows.
    """
    if rows % len(pools):
        raise ValueError(f"rows={rows} of a step must be a multiple of the {len(pools)} domains")
    share = rows // len(pools)
    streams = [_endless(pool, share, f"{seed} {name}") for name, pool in pools.items()]
    for _ in range(steps):
        yield interleave([next(stream) for stream in streams])


def _endless(pool: Tensor, share: int, seed: str) -> Iterator[Tensor]:
    order: list[int] = []
    draw = random.Random(seed)
    while True:
        while len(order) < share:
            order += draw.sample(range(len(pool)), len(pool))
        yield pool[order[:share]]
        order = order[share:]


def interleave(parts: Sequence[Tensor]) -> Tensor:
    """Equal numbers of rows [N, length] of each part, the parts taking turns: row i is of part i modulo parts."""
    return torch.stack(list(parts), dim=1).flatten(0, 1)
