"""Fails a test in which Transformers says through its logger that something it was asked for is deprecated.

What it says through `warnings` is an error by `filterwarnings` in pyproject.toml.
"""

import logging
from collections.abc import Iterator

import pytest

# A part of the message, and why it is not ours to heed.
ALLOWED = {
    "Passing `generation_config` together with": "the text-generation pipeline of Transformers 5.16 does it itself",
}


class _Recorder(logging.Handler):
    """Keeps what speaks of deprecation; from the import on, because `warning_once` says it once in a process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower() and not any(part in message for part in ALLOWED):
            self.messages.append(message)

    def take(self) -> list[str]:
        """What was kept since the last time."""
        taken, self.messages = self.messages, []
        return taken


recorder = _Recorder()
logging.getLogger("transformers").addHandler(recorder)


@pytest.fixture(autouse=True)
def no_deprecations() -> Iterator[None]:
    """Of session and module fixtures the first test that uses them is told."""
    yield
    messages = recorder.take()
    if messages:
        pytest.fail(f"Transformers calls this deprecated: {messages}", pytrace=False)
