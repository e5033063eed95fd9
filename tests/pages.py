"""The blocks of a page of the documentation, and stand-ins for what they name: tiny models by the names of real ones.

A comment before a block says how a test runs it otherwise than it stands:
`<!-- test: skip, REASON -->` does not run it, `<!-- test: OLD -> NEW; OLD -> NEW -->` replaces words in it. A page that
begins where another one ends says `<!-- test: given qwen3-8x, tuned -->`.
"""

import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path
from typing import NamedTuple

from checkpoints import CHAT_TEMPLATE, tiny_tokenizer, write_dense, write_text
from composites import write_composite
from transformers import AutoModelForCausalLM, MixtralConfig

from ecmoe.conversion import convert

ROOT = Path(__file__).parents[1]
# A block, and the comment before it.
_BLOCK = re.compile(
    r"(?:<!-- test: ((?:(?!-->)[^\n])*?) -->\n)?^( *)```(bash|python)\n(.*?)^ *```", re.DOTALL | re.MULTILINE
)
# Beside the fields of each command: two steps of a tiny model on a CPU.
FINETUNE = (
    *("use_cpu=true", "bf16=false", "max_steps=2", "eval_steps=2", "save_steps=2", "logging_steps=1", "max_length=256"),
    *("per_device_train_batch_size=2", "gradient_accumulation_steps=1", "validation_fraction=0.2", "too_long=truncate"),
)
# Expert-choice checkpoints that a page may be given, and how each is initialised.
CONVERTED = {"qwen3-8x": "shared", "tuned": "copy", "blend": "blend"}
_SHAPES = {
    **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_WIDTHS = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
DENSE = {"Qwen/Qwen3-0.6B": "Qwen3", "dense": "Llama", "stories260K": "Llama"}


def given(page: Path) -> list[str]:
    """The checkpoints of other pages that this one goes on with."""
    found = re.search(r"<!-- test: given (.*?) -->", page.read_text(encoding="utf-8"))
    return found[1].split(", ") if found else []


class Block(NamedTuple):
    """One block to run: line of the page, language, code; reason where it is skipped."""

    line: int
    language: str
    code: str
    skipped: str | None


def blocks(page: Path) -> list[Block]:
    found, text = [], page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        how, indent, language, code = match.groups()
        code = "\n".join(line.removeprefix(indent) for line in code.splitlines())
        skipped = None
        if how and how.startswith("skip"):
            skipped = how.partition(",")[2].strip() or "no reason given"
        elif how and not how.startswith("given "):
            for change in how.split(";"):
                old, _, new = (part.strip() for part in change.partition("->"))
                assert old in code, f"{page.name}: the comment replaces {old}, which is not in the block"
                code = code.replace(old, new)
        found.append(Block(text[: match.start(3)].count("\n") + 1, language, code, skipped))
    return found


def lay_out(folder: Path) -> None:
    """Puts the stand-ins there, and commands that take two steps."""
    for name, family in DENSE.items():
        # Widths that bitsandbytes reads right on a CPU: multiples of 64.
        write_dense(folder / name, family, **_WIDTHS, max_position_embeddings=2048)
    mixtral = MixtralConfig(num_local_experts=4, **_SHAPES)
    AutoModelForCausalLM.from_config(mixtral).save_pretrained(folder / "mistralai/Mixtral-8x7B-v0.1")
    tiny_tokenizer().save_pretrained(folder / "mistralai/Mixtral-8x7B-v0.1")
    write_composite(folder / "google/gemma-3-4b-it", "Gemma3", {"max_position_embeddings": 2048})
    (folder / "google/gemma-3-4b-it" / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, init in CONVERTED.items():
        source = "Qwen/Qwen3-0.6B" if name.startswith("qwen3") else "dense"
        convert(str(folder / source), str(folder / name), init=init, verify=False)
    conversations = (ROOT / "examples" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    for name in ("chats.jsonl", "chat.jsonl", "conversations.jsonl"):
        (folder / name).write_text("\n".join(conversations) + "\n", encoding="utf-8")
    (folder / "held_out.jsonl").write_text("\n".join(conversations[:8]) + "\n", encoding="utf-8")
    text = write_text(folder / "tinystories_sample.txt")
    documents = text.read_text(encoding="utf-8").split("<|endoftext|>")
    rows = "".join(json.dumps({"text": document.strip()}) + "\n" for document in documents)
    for name in ("text.jsonl", "roneneldan/TinyStories/train.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(rows, encoding="utf-8")
    shutil.copy(ROOT / "examples" / "conversations.jsonl", folder / "rows.jsonl")
    (folder / "bin").mkdir()
    for name, module, more in (
        ("ecmoe-convert", "ecmoe.conversion", ""),
        ("ecmoe-inspect", "ecmoe.analysis", ""),
        ("ecmoe-finetune", "ecmoe.finetune", " ".join(FINETUNE)),
        ("python", "", ""),
        ("pip", "", ""),
    ):
        _command(folder / "bin" / name, module, more)


def _command(path: Path, module: str, more: str) -> None:
    run = f'exec {sys.executable} -m {module} "$@" {more}' if module else f'exec {sys.executable} "$@"'
    if path.name == "pip":
        run = "true"  # what is installed is what is tested
    path.write_text(f"#!/bin/sh\n{run}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def environment(folder: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return os.environ | {"PATH": paths, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
