"""The generated pages of the documentation: `python -m examples.reference`, `make docs`.

The options of every command come from its --help, the fields of recipes and configs from their dataclasses and
docstrings, so that a page cannot say something else than the code. `--check` writes nothing and ends with code 1 where
a page differs.
"""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="examples.reference", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; code 1 where a page differs")
    options = parser.parse_args(arguments)
    FOLDER.mkdir(parents=True, exist_ok=True)
    differ = []
    for name, render in PAGES.items():
        path, text = FOLDER / name, render()
        if options.check:
            differ += [name] if not path.is_file() or path.read_text(encoding="utf-8") != text else []
        else:
            path.write_text(text, encoding="utf-8")
    if differ:
        print(f"{', '.join(differ)}: other than the code; run python -m examples.reference", file=sys.stderr)
        sys.exit(1)


def commands() -> str:
    """--help of each command and of each command of a command."""
    from ecmoe.analysis import cli as inspect
    from ecmoe.conversion import cli as convert
    from ecmoe.finetune import cli as finetune

    os.environ["COLUMNS"] = "100"  # argparse's width
    lines = ["# Commands", "", "What `--help` prints."]
    for module in (convert, finetune, inspect):
        parser = module._parser()
        lines += ["", f"## {parser.prog}", "", "```text", parser.format_help().rstrip(), "```"]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    lines += ["", f"### {command.prog}", "", "```text", command.format_help().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def recipe_fields() -> str:
    from ecmoe.finetune.recipe import Recipe

    intro = (
        "A recipe is a YAML file, a mapping, or `field=value` on the command line. These are its own fields. Every "
        "argument of TRL's `SFTConfig`, and so of Transformers' `TrainingArguments`, is a field too, by TRL's name; "
        "so are the [fields of the config](config.md) that change no weight."
    )
    return _page("Fields of a recipe", intro, Recipe)


def config_fields() -> str:
    from modeling_ecmoe.configuration_ecmoe import EcMoeConfigMixin

    intro = (
        "What `config.json` of an expert-choice checkpoint holds beside the dense family's own fields. Set them in "
        "`config.json`, as keywords of `from_pretrained`, or in a recipe."
    )
    return _page("Fields of the config", intro, EcMoeConfigMixin)


def _page(title: str, intro: str, cls: Any) -> str:
    defaults = {item.name: item for item in dataclasses.fields(cls)}
    rows = []
    for names, text in _described(cls.__doc__):
        known = [name for name in names if name in defaults]
        if not known:
            continue
        shown = ", ".join(f"`{name}`" for name in known)
        given = ", ".join(dict.fromkeys(_default(defaults[name]) for name in known))
        rows.append(f"| {shown} | {given} | {_escaped(text)} |")
    return (
        "\n".join([f"# {title}", "", intro, "", "| field | default | meaning |", "| --- | --- | --- |", *rows]) + "\n"
    )


def _described(docstring: str) -> list[tuple[list[str], str]]:
    """`name, name: text` of a docstring, each with its continuation lines."""
    found: list[tuple[list[str], str]] = []
    for line in docstring.splitlines()[1:]:
        start = re.match(r"    ([a-z_]+(?:, [a-z_]+)*): (.*)", line)
        if start:
            found.append((start[1].split(", "), start[2]))
        elif found and line.startswith("        "):
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    return found


def _default(item: Any) -> str:
    if item.default is not dataclasses.MISSING:
        return f"`{item.default!r}`" if isinstance(item.default, str) else f"`{item.default}`"
    return "`{}`" if item.default_factory is dict else "required"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands,
    "recipe.md": recipe_fields,
    "config.md": config_fields,
}

if __name__ == "__main__":
    main()
