"""Shared by the tests of the tools around Transformers: converted checkpoints, tiny and real."""

from collections.abc import Iterator

import pytest
from converted import stories, tiny  # noqa: F401  (fixtures)

from modeling_ecmoe import notices_ecmoe


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the notices say in one test, also what was said once before."""
    lines: list[str] = []
    monkeypatch.setattr(notices_ecmoe.logger, "warning_once", lines.append)
    yield lines
