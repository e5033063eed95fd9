"""The questions of docs/faq.md: each message that is quoted there is one of this project, or of a library it uses."""

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
PACKAGES = ("modeling_ecmoe", "conversion", "finetune", "analysis", "ecmoe")
# Files of other libraries whose messages are quoted too; they are read, not imported.
OTHERS = {"transformers": "dynamic_module_utils.py", "peft": "tuners/tuners_utils.py", "torch": "utils/checkpoint.py"}
QUESTIONS = re.findall(r"^### (.+)", PAGE, re.MULTILINE)
# Of a question in quotes what is between them; an answer's lines that are set off.
MESSAGES = re.findall(r'^(?:### "(.+)"|> (.+))$', PAGE, re.MULTILINE)


@cache
def strings() -> frozenset[str]:
    """The strings of the sources without docstrings, "{}" for what is put in; ast joins neighbours."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    for library, name in OTHERS.items():
        spec = find_spec(library)
        files += [Path(spec.origin).parent / name] if spec is not None and spec.origin is not None else []
    found = set()
    for path in files:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.add(node.value)
    return frozenset(" ".join(text.split()) for text in found)


def is_printed(message: str) -> bool:
    """Whether one string has the words of a message in their order, with anything in place of its "..."."""
    words = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    pattern = re.compile(".*?".join(words))
    return any(pattern.search(text) for text in strings())


@pytest.mark.parametrize("message", [quoted or set_off for quoted, set_off in MESSAGES])
def test_a_quoted_message_is_in_the_code(message: str) -> None:
    assert is_printed(message)


def test_the_page_has_thirty_questions_and_quotes_messages() -> None:
    assert 30 <= len(QUESTIONS) <= 36
    assert len(set(QUESTIONS)) == len(QUESTIONS)
    assert len(MESSAGES) >= 25
    assert not is_printed("max_length=...: a row has ... tokens, more than max_length")
