"""What a command answers before anything slow is loaded."""

import subprocess
import sys


def answered_without_torch(room: str, commands: list[list[str]]) -> list[str]:
    """The lines that `ecmoe.ROOM.cli` says to commands that are each wrong, in one process in which neither torch nor
    what is built on it was loaded at the end."""
    script = f"""
import sys
from ecmoe.{room}.cli import main
for command in {commands!r}:
    try:
        main(command)
    except SystemExit as stop:
        assert stop.code == 2, command
    else:
        raise AssertionError(command)
slow = ("torch", "transformers", "trl", "datasets", "safetensors", "matplotlib")
assert not [name for name in slow if name in sys.modules], [name for name in slow if name in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands), lines
    return lines
