"""The teaching pictures show the library's own numbers, and nothing else."""

import json
import re
from pathlib import Path

import pytest
import torch

from ecmoe.analysis.cli import main
from ecmoe.analysis.drawing import as_text, number, write_picture
from ecmoe.analysis.walkthrough import Walkthrough, read_matrices, walk_through
from modeling_ecmoe.routing_ecmoe import choose_tokens, router_scores

CASES = [(3, 2), (3, 3), (5, 2), (5, 3)]


@pytest.mark.parametrize(("experts", "top"), CASES)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_table_follows_from_the_one_before(experts: int, top: int, seed: int) -> None:
    """By hand, in plain arithmetic on the drawn matrices."""
    walk = walk_through(experts, top, seed)
    torch.testing.assert_close(walk.affinity, walk.tokens @ walk.experts.T)
    torch.testing.assert_close(walk.scores, walk.affinity.softmax(1))
    aggregate = torch.zeros_like(walk.tokens)
    for expert in range(experts):
        column = sorted(range(6), key=lambda t: -walk.scores[t, expert].item())
        assert sorted(walk.scores[walk.index[expert], expert].tolist(), reverse=True) == walk.gates[expert].tolist()
        assert walk.gates[expert, -1] >= walk.scores[column[top], expert]
        for rank, token in enumerate(walk.index[expert].tolist()):
            hidden = (walk.w1[expert] @ walk.tokens[token]).clamp(min=0)
            torch.testing.assert_close(walk.hidden[expert, rank], hidden)
            torch.testing.assert_close(walk.outputs[expert, rank], walk.w2[expert] @ hidden)
            aggregate[token] += walk.gates[expert, rank] * (walk.w2[expert] @ hidden)
    torch.testing.assert_close(walk.aggregate, aggregate)
    assert int(walk.load.sum()) == walk.chosen_experts.numel()


def cells(path: Path) -> list[str]:
    """The texts of an SVG in the order of the drawing."""
    return re.findall(r"<text [^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("experts", "top"), CASES)
def test_the_picture_holds_the_librarys_numbers(tmp_path: Path, experts: int, top: int) -> None:
    walk = walk_through(experts, top)
    write_picture(walk, tmp_path / "walk.svg")
    found = cells(tmp_path / "walk.svg")
    scores = router_scores((walk.tokens @ walk.experts.T), "softmax")
    choice = choose_tokens(scores[None], (top - 0.5) * experts / 6)
    for title, values in (
        ("scores = softmax", scores),
        ("gates: each", choice.scores),
        ("aggregate", walk.aggregate),
    ):
        at = next(i for i, text in enumerate(found) if title in text)
        drawn = numbers_before(found, at, values.numel())
        assert drawn == [number(v) for v in values.flatten().tolist()], title
    taken = [f"t{t}" for t in choice.token_index.flatten().tolist()]
    at = next(i for i, text in enumerate(found) if "tokens taken" in text)
    before = [text for text in found[:at] if re.fullmatch(r"t\d", text)]
    assert before[-len(taken) :] == taken


def numbers_before(found: list[str], at: int, count: int) -> list[str]:
    """The last `count` numbers that are drawn before a title: a table's cells come first, row by row."""
    return [text for text in found[:at] if re.fullmatch(r"-?\d+(\.\d\d)?", text)][-count:]


def test_the_same_numbers_draw_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        write_picture(walk_through(3, 2), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    write_picture(walk_through(3, 2), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_the_text_names_every_choice() -> None:
    walk: Walkthrough = walk_through(5, 3)
    text = as_text(walk)
    for expert, row in enumerate(walk.index.tolist()):
        for token in row:
            assert f"E{expert} takes t{token}:" in text
    assert len(re.findall(r"E\d takes t\d:", text)) == 15
    assert "Expert choice: 3 tokens of every expert." in text


def test_given_matrices(tmp_path: Path) -> None:
    path = tmp_path / "matrices.json"
    path.write_text(
        json.dumps(
            {
                "tokens": [[1, 0], [0, 1], [1, 1]],
                "experts": [[1, 0], [0, 1]],
                "w1": [[[1, 0], [0, 1]], [[1, 0], [0, 1]]],
                "w2": [[[2, 0], [0, 2]], [[3, 0], [0, 3]]],
            }
        )
    )
    walk = walk_through(top=1, matrices=read_matrices(path))
    assert walk.index.tolist() == [[0], [1]]
    gate = torch.tensor([1.0, 0.0], dtype=torch.float64).softmax(0)[0]
    torch.testing.assert_close(
        walk.aggregate, torch.stack([gate * 2 * walk.tokens[0], gate * 3 * walk.tokens[1], walk.tokens[2] * 0])
    )


REFUSALS = {
    "--top=9": "top=9 must be between 1 and",
    "--top=0": "top=0 must be between 1 and",
    "--experts=1": "num_experts=1 must be at least 2",
    "--output=walk.gif": "must end in .svg or .png",
    "--output=missing/walk.png": "cannot be written",
    "--matrices=missing.json": "matrices=missing.json does not exist",
}


@pytest.mark.parametrize("option", REFUSALS)
def test_refusals(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["draw", option])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert REFUSALS[option] in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "matrices must be tokens, experts, w1, w2"),
        ({"tokens": [[1]], "experts": [[1, 2]], "w1": [[[1]]], "w2": [[[1]]]}, "tokens is [1, 1]"),
        ({"tokens": [[1], [1, 2]], "experts": [[1]], "w1": [[[1]]], "w2": [[[1]]]}, "matrices: "),
        ({"tokens": [1], "experts": [[1]], "w1": [[[1]]], "w2": [[[1]]]}, "have two dimensions"),
    ],
)
def test_matrices_that_do_not_fit(
    tmp_path: Path, content: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "matrices.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        main(["draw", f"--matrices={tmp_path / 'matrices.json'}", "--top=1"])
    assert message in capsys.readouterr().err
