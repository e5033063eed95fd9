"""Shared by the conversion tests: a text, calibration on little of it, and what a refusal looks like."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import write_text
from families import EVERY_DENSE_FAMILY

from ecmoe import conversion
from ecmoe.conversion.cli import main

Refuse = Callable[..., None]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """For what the modules' own fixtures convert: they run before those of a test."""
    torch.set_num_threads(1)


@pytest.fixture(params=EVERY_DENSE_FAMILY)
def family(request: pytest.FixtureRequest) -> str:
    """One that a dense checkpoint can become."""
    return request.param


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "topics.txt")


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration and verification on few tokens, where it is not their figures that count."""
    monkeypatch.setattr(conversion.texts, "CALIBRATION_TOKENS", 512)
    monkeypatch.setattr(conversion.texts, "VERIFICATION_TOKENS", 256)
    monkeypatch.setattr(conversion.models, "NUM_GREEDY_TOKENS", 4)


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Checks that the command fails with one line that holds the message, and leaves nothing in `tmp_path` but that."""

    def check(arguments: list[str], message: str, left: list[str]) -> None:
        capsys.readouterr()  # what making the source said
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1, said
        line = said.rstrip()
        assert line.startswith("ecmoe-convert: error:")
        assert message in line
        assert sorted(path.name for path in tmp_path.iterdir()) == left

    return check
