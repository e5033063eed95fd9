"""The text that a conversion calibrates on by default: several kinds, so that no single one decides the thresholds.

Chat, prose, maths and lists, and other languages were written for this package (sample.txt); code and documentation
are CPython's own.
"""

import importlib.util
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

# How many of 80 windows each kind has.
SHARES = {"chat": 22, "prose": 18, "code": 16, "documentation": 13, "maths and lists": 7, "languages": 4}
_PIECE = 1_600  # characters of a source file or help topic: many short pieces are of more kinds than few long ones
_MODULES = """
    abc argparse bisect bz2 calendar cmd codecs collections colorsys configparser contextlib copy csv
    dataclasses datetime difflib dis enum fileinput fnmatch fractions ftplib functools getpass glob gzip heapq
    hmac html http inspect io ipaddress json keyword linecache locale logging mailbox mimetypes numbers operator
    optparse os pathlib pickle platform plistlib pprint profile queue random reprlib sched secrets selectors
    shelve shlex shutil signal smtplib socket sqlite3 statistics string subprocess symtable tabnanny tarfile
    tempfile textwrap threading timeit tokenize trace traceback turtle types typing unittest urllib uuid
    warnings wave weakref webbrowser zipfile
"""


def sample_documents() -> dict[str, list[Any]]:
    """The documents of each kind of `SHARES`: texts, and of chat the messages of each conversation."""
    documents: dict[str, list[Any]] = {kind: [] for kind in SHARES}
    written = (files(__package__) / "sample.txt").read_text(encoding="utf-8")
    for part in re.split(r"^=== ", written, flags=re.MULTILINE)[1:]:
        kind, _, text = part.partition("\n")
        documents[kind].append(_messages(text) if kind == "chat" else text.strip())
    documents["code"] = [piece for name in _MODULES.split() if (piece := _source_of(name))]
    documents["documentation"] = _help_topics()
    return documents


def _messages(text: str) -> list[dict[str, str]]:
    turns = re.split(r"^--- ", text, flags=re.MULTILINE)[1:]
    pairs = [turn.partition("\n") for turn in turns]
    return [{"role": role, "content": content.strip()} for role, _, content in pairs]


def _source_of(name: str) -> str:
    """A piece from the middle of a module, from the beginning of a line; empty where Python comes without sources."""
    found = importlib.util.find_spec(name)
    path = Path(found.origin) if found is not None and found.origin else Path()
    if path.suffix != ".py" or not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    begin = text.rfind("\n", 0, max(0, (len(text) - _PIECE) // 2)) + 1
    return text[begin : begin + _PIECE]


def _help_topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return list(dict.fromkeys(topics[name].strip()[:_PIECE] for name in sorted(topics)))  # some have two names
