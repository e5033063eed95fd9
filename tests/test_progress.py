"""Progress of long work, on a terminal and in a log file."""

import io
import sys

import pytest

import ecmoe.progress
from ecmoe.progress import duration, gigabytes, number_of, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_whole_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(ecmoe.progress, "SECONDS_PER_LINE", 0.0)
    for _ in progress_bar(range(3), desc="Verifying", unit="batch"):
        pass
    lines = log.getvalue().splitlines()
    assert len(lines) >= 2 and all(line.startswith("Verifying") for line in lines), lines
    assert "\r" not in log.getvalue() and "<" in lines[-1]  # [passed<left, rate]


def test_short_work_says_nothing_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(desc="Writing", unit="B", total=2, unit_scale=True) as bar:
        bar.set_description("Layer 1 of 2")
        bar.update(2)
    assert log.getvalue() == ""


def test_a_terminal_gets_the_usual_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress_bar(range(3), desc="Verifying", unit="batch")) == [0, 1, 2]
    assert "\r" in terminal.getvalue() and "3/3" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 second"),
        (1, "1 second"),
        (42, "42 seconds"),
        (200, "3 minutes"),
        (5_000, "83 minutes"),
        (5_400, "1.5 hours"),
    ],
)
def test_durations_read_like_estimates(seconds: float, text: str) -> None:
    assert duration(seconds) == text


SIZES = {
    0: "0.0 kB",
    4_200: "4.2 kB",
    99_000: "99 kB",
    432_000: "0.4 MB",
    38e6: "38 MB",
    1e8: "0.10 GB",
    2e12: "2,000.00 GB",
}


@pytest.mark.parametrize("size", SIZES)
def test_no_size_is_read_as_nothing(size: float) -> None:
    assert gigabytes(size) == SIZES[size]


def test_one_is_no_plural() -> None:
    assert [number_of(count, "row") for count in (0, 1, 2_048)] == ["0 rows", "1 row", "2,048 rows"]
