"""Shared by the tests of the tools around Transformers: converted checkpoints, tiny and real."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from converted import stories, tiny  # noqa: F401  (fixtures)
from pages import lay_out

from modeling_ecmoe import notices_ecmoe


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the notices say in one test, also what was said once before."""
    lines: list[str] = []
    monkeypatch.setattr(notices_ecmoe.logger, "warning_once", lines.append)
    yield lines


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for what the pages name."""
    folder = tmp_path_factory.mktemp("desk")
    lay_out(folder)
    return folder
