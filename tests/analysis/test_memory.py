"""Text of any size with flat memory: two gigabytes in one file, and ten thousand files."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import write_dense, write_text
from runs import ROOT

from ecmoe.conversion import convert

pytestmark = pytest.mark.slow

GIGABYTE = 1 << 30
# Reads all of the text, then evaluates a part of it; prints the peak of the resident memory, bytes, after each.
SCRIPT = """
import json, resource, sys
from ecmoe.analysis import evaluate
from ecmoe.analysis.text import read_documents
model, data = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
peaks = [peak()]
characters = sum(map(len, read_documents(data)))
peaks.append(peak())
tokens = evaluate(model, data=data, max_tokens=8_192)["tokens"]
print(json.dumps({"characters": characters, "tokens": tokens, "peaks": [*peaks, peak()]}))
"""


def measure(model: Path, data: Path) -> dict:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(model), str(data)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A converted model, and two hundred documents of text."""
    folder = tmp_path_factory.mktemp("memory")
    write_dense(folder / "dense", "Llama")
    write_text(folder / "text.txt", documents=200)
    convert(str(folder / "dense"), str(folder / "ecmoe"), num_experts=4, text=str(folder / "text.txt"))
    yield folder
    (folder / "large.txt").unlink(missing_ok=True)


def test_two_gigabytes(place: Path) -> None:
    content = (place / "text.txt").read_bytes() + b"<|endoftext|>"
    with (place / "large.txt").open("wb") as file:
        while file.tell() < 2 * GIGABYTE:
            file.write(content)
    small, large = measure(place / "ecmoe", place / "text.txt"), measure(place / "ecmoe", place / "large.txt")
    print(small, large)
    assert large["characters"] > 1.5e9
    assert small["tokens"] >= 8_192 and large["tokens"] >= 8_192
    assert large["peaks"][1] - large["peaks"][0] < 64e6  # the reader alone
    assert large["peaks"][2] < 1.1 * small["peaks"][2]


def test_ten_thousand_files(place: Path) -> None:
    folder = place / "files"
    folder.mkdir()
    documents = [text for text in (place / "text.txt").read_text().split("<|endoftext|>") if text.strip()]
    for number in range(10_000):
        (folder / f"{number}.txt").write_text(documents[number % len(documents)][:500])
    one, many = measure(place / "ecmoe", place / "text.txt"), measure(place / "ecmoe", folder)
    print(one, many)
    assert many["tokens"] >= 8_192
    assert many["peaks"][2] < 1.1 * one["peaks"][2]
