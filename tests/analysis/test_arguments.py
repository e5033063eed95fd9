"""What is wrong with a command of ecmoe-inspect by itself is said before torch is loaded."""

import subprocess
import sys
from pathlib import Path

WRONG = [
    (["evaluate", "{tmp}/no", "--data={tmp}"], "checkpoint={tmp}/no does not exist; give a checkpoint folder or a Hub"),
    (["evaluate", "{tmp}/file", "--data={tmp}"], "checkpoint={tmp}/file is a file; give the checkpoint's folder"),
    (["evaluate", "{tmp}", "--data={tmp}/no.txt"], "data={tmp}/no.txt does not exist; name a text file, or a folder"),
    (["evaluate", "{tmp}", "--data={tmp}", "--max-tokens=-3"], "max_tokens=-3 must not be negative"),
    (["evaluate", "{tmp}", "--pairs", "{tmp}", "{tmp}/no.jsonl"], "pairs={tmp}/no.jsonl does not exist"),
    (["compare", "{tmp}", "--data={tmp}", "--steps=-1"], "steps=-1 must not be negative"),
    (["draw", "--matrices={tmp}/no.json"], "matrices={tmp}/no.json does not exist"),
    (["draw", "--output=walk.gif"], "output=walk.gif must end in .svg or .png"),
    (["report", "{tmp}", "--text=a", "--output=page.txt"], "output=page.txt must end in .html"),
    (["report", "{tmp}", "--text-file={tmp}/no", "--output=page.html"], "text_file={tmp}/no does not exist"),
]


def test_a_mistyped_argument_does_not_wait_for_torch(tmp_path: Path) -> None:
    """One process for all of them, in which nothing that is slow was loaded at the end."""
    (tmp_path / "file").touch()
    commands = [[word.format(tmp=tmp_path) for word in words] for words, _ in WRONG]
    script = f"""
import sys
from ecmoe.analysis.cli import main
for command in {commands!r}:
    try:
        main(command)
    except SystemExit as stop:
        assert stop.code == 2, command
    else:
        raise AssertionError(command)
slow = [name for name in ("torch", "transformers", "matplotlib") if name in sys.modules]
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(WRONG)
    for line, (_, message) in zip(lines, WRONG, strict=True):
        assert line.startswith("ecmoe-inspect: error: ") and message.format(tmp=tmp_path) in line
