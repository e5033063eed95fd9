"""What is wrong with a command of ecmoe-inspect by itself is said before torch is loaded."""

from pathlib import Path

from first_answers import answered_without_torch

WRONG = [
    (["evaluate", "{tmp}/no", "--data={tmp}"], "checkpoint={tmp}/no does not exist; give a checkpoint folder or a Hub"),
    (["evaluate", "{tmp}/file", "--data={tmp}"], "checkpoint={tmp}/file is a file; give the checkpoint's folder"),
    (["evaluate", "{tmp}", "--data={tmp}/no.txt"], "data={tmp}/no.txt does not exist; name a text file, or a folder"),
    (["evaluate", "{tmp}", "--data={tmp}", "--max-tokens=-3"], "max_tokens=-3 must not be negative"),
    (["evaluate", "{tmp}", "--pairs", "{tmp}", "{tmp}/no.jsonl"], "pairs={tmp}/no.jsonl does not exist"),
    (["compare", "{tmp}", "--data={tmp}", "--steps=-1"], "steps=-1 must not be negative"),
    (
        ["evaluate", "{tmp}/adapter", "--data={tmp}"],
        "checkpoint={tmp}/adapter is a PEFT adapter of me/base, not a whole",
    ),
    (
        ["calibrate", "{tmp}/tuned", "--text={tmp}"],
        "is a PEFT adapter of me/base, not a whole model; give {tmp}/tuned/m",
    ),
    (["draw", "--matrices={tmp}/no.json"], "matrices={tmp}/no.json does not exist"),
    (["draw", "--output=walk.gif"], "output=walk.gif must end in .svg or .png"),
    (["report", "{tmp}", "--text=a", "--output=page.txt"], "output=page.txt must end in .html"),
    (["report", "{tmp}", "--text-file={tmp}/no", "--output=page.html"], "text_file={tmp}/no does not exist"),
]


def test_a_mistyped_argument_does_not_wait_for_torch(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tuned" / "merged").mkdir(parents=True)
    (tmp_path / "tuned" / "merged" / "config.json").touch()
    (tmp_path / "adapter").mkdir()
    for name in ("adapter", "tuned"):
        (tmp_path / name / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')
    commands = [[word.format(tmp=tmp_path) for word in words] for words, _ in WRONG]
    lines = answered_without_torch("analysis", commands)
    for line, (_, message) in zip(lines, WRONG, strict=True):
        assert line.startswith("ecmoe-inspect: error: ") and message.format(tmp=tmp_path) in line
