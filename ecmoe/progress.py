"""What long work shows while it runs: a bar on a terminal, a line every half minute anywhere else.

The only module that conversion, finetune and analysis all import. It asks nothing of them and nothing of torch.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS_PER_LINE = 30.0


class _Lines(tqdm):
    """A progress bar where each state is a line of its own, for logs and pipes: the first after SECONDS_PER_LINE."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Writes the bar's text and ends the line."""
        self.fp.write((msg or str(self)) + "\n")
        self.fp.flush()
        return True

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        """For the next line; a new description alone writes none."""
        super().set_description(desc, refresh=False)

    def clear(self, nolock: bool = False) -> None:
        """Nothing: a line that is written stays."""

    def close(self) -> None:
        """Ends without a last line; what follows says that the work is done."""
        self.disable = True


def progress_bar(iterable: Iterable[Any] | None = None, *, desc: str, unit: str, **options: Any) -> tqdm:
    """tqdm's bar with the time left on standard error, or lines of the same text where that is no terminal.

    Args:
        iterable: what is gone through; without it the caller calls `update`.
        desc: what is done, such as "Calibrating".
        unit: what is counted, in the singular.
        options: of tqdm, such as total, unit_scale, leave.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, desc=desc, unit=unit, **options)
    pace = {"mininterval": SECONDS_PER_LINE, "maxinterval": SECONDS_PER_LINE, "miniters": 1, "delay": SECONDS_PER_LINE}
    return _Lines(iterable, desc=desc, unit=unit, ncols=100, ascii=True, file=sys.stderr, **(pace | options))


def announce(text: str) -> None:
    """One line on standard error before long work: what is done, on how much, and about how long it takes."""
    print(text, file=sys.stderr, flush=True)


def number_of(count: int, what: str) -> str:
    """Such as "1 row", "2,048 rows"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def gigabytes(size: float) -> str:
    """Such as "7.24 GB"; below a tenth of a unit in the next smaller one: "38 MB", "4.2 kB"."""
    if size >= 1e8:
        return f"{size / 1e9:,.2f} GB"
    unit, power = ("MB", 1e6) if size >= 1e5 else ("kB", 1e3)
    return f"{size / power:.{1 if size < 10 * power else 0}f} {unit}"


def duration(seconds: float) -> str:
    """Such as "20 seconds", "3 minutes", "1.5 hours": an estimate, so no more digits than it is worth."""
    if seconds < 90:
        return f"{max(1, round(seconds))} second{'s' if round(seconds) > 1 else ''}"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"
