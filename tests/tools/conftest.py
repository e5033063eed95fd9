"""Shared by the tests of the tools around Transformers: converted checkpoints, tiny and real."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import STORIES_MODEL, STORIES_TEXT, write_dense, write_text

from conversion import convert
from modeling_ecmoe import notices_ecmoe


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random checkpoint, converted, and the text of its thresholds."""
    folder = tmp_path_factory.mktemp("tools")
    text = write_text(folder / "text.txt", documents=12)
    write_dense(folder / "dense", "Qwen3", initializer_range=0.02)
    convert(str(folder / "dense"), str(folder / "ecmoe"), num_experts=4, text=str(text), verify=False)
    return folder


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K, converted."""
    if not (STORIES_MODEL.is_dir() and STORIES_TEXT.is_file()):
        pytest.skip("stories260K and its text are not beside the repository (ECMOE_TEST_DATA)")
    folder = tmp_path_factory.mktemp("stories") / "ecmoe"
    convert(str(STORIES_MODEL), str(folder), text=str(STORIES_TEXT), verify=False)
    return folder


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the notices say in one test, also what was said once before."""
    lines: list[str] = []
    monkeypatch.setattr(notices_ecmoe.logger, "warning_once", lines.append)
    yield lines
