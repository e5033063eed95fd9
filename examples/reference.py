"""The generated pages of the documentation: `python -m examples.reference`, `make docs`.

The options of every command come from its --help, the fields of recipes and configs from their dataclasses and
docstrings, so that a page cannot say something else than the code. `--check` writes nothing and ends with code 1 where
a page differs.
"""

import argparse
import copy
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Collection
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

    os.environ["COLUMNS"] = "100"  # as wide as a page shows without scrolling
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
    from ecmoe.finetune.arguments import OF_NO_RECIPE
    from ecmoe.finetune.recipe import Recipe

    intro = (
        "A recipe is a YAML file, a mapping, or `field=value` on the command line. These are its own fields. Every "
        "argument of TRL's `SFTConfig`, and so of Transformers' `TrainingArguments`, is a field too, by TRL's name; "
        "so are the [fields of the config](config.md) that change no weight."
    )
    return _page("Fields of a recipe", intro, Recipe, OF_NO_RECIPE)


def config_fields() -> str:
    from modeling_ecmoe.configuration_ecmoe import EcMoeConfigMixin

    intro = (
        "What `config.json` of an expert-choice checkpoint holds beside the dense family's own fields. Set them in "
        "`config.json`, as keywords of `from_pretrained`, or in a recipe."
    )
    return _page("Fields of the config", intro, EcMoeConfigMixin)


def _shapes(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }


def _page(title: str, intro: str, cls: Any, hidden: Collection[str] = ()) -> str:
    """hidden: fields of the class that nobody sets."""
    defaults = {item.name: item for item in dataclasses.fields(cls) if item.name not in hidden}
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


# Shapes as their config.json on the Hub has them; nothing is fetched.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-0.6B": ("qwen3", _shapes(151_936, 1024, 3072, 28, 16, 8) | {"head_dim": 128, "tie_word_embeddings": True}),
    "Llama-3.2-1B": ("llama", _shapes(128_256, 2048, 8192, 16, 32, 8) | {"tie_word_embeddings": True}),
    "Qwen3-4B": ("qwen3", _shapes(151_936, 2560, 9728, 36, 32, 8) | {"head_dim": 128, "tie_word_embeddings": True}),
    "Llama-3.1-8B": ("llama", _shapes(128_256, 4096, 14_336, 32, 32, 8)),
}


def memory() -> str:
    intro = (
        "Eight experts in every layer beside the dense FFN (the default of `ecmoe-convert`), counted from shapes, in "
        "GB of 10^9 bytes. Weights alone to generate; weights, gradients and moments of AdamW to train, adapters of "
        "rank 16 on attention and experts. Activations come on top: `--dry-run` of `ecmoe-finetune` measures them."
    )
    rows = memory_rows()
    return "\n".join(["# Memory", "", intro, "", *rows]) + "\n"


def memory_rows() -> list[str]:
    """The table, a line each."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import ecmoe
    from ecmoe.finetune.memory import kept_bytes
    from ecmoe.finetune.recipe import recipe_of

    adapters = {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    adapters["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    head = ["model", "parameters", "becomes", "generate, bfloat16", "QLoRA", "LoRA, bfloat16", "all weights, bfloat16"]
    rows = [[*head, "all weights, float32"], ["---"] + ["---:"] * 7]
    for name, (kind, shapes) in MODELS.items():
        with torch.device("meta"):
            dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shapes))
            model = ecmoe.upcycle(dense, num_experts=8)
        common = {"model": name, "output_dir": "out", "dataset": "rows.jsonl", "dtype": "bfloat16"}
        whole = kept_bytes(recipe_of(**common), model)
        base = sum(parameter.numel() for parameter in model.parameters())
        lora = kept_bytes(recipe_of(**common, lora=adapters), copy.deepcopy(model))["adapters"]
        qlora = kept_bytes(recipe_of(**common, lora=adapters, quantization="4bit"), copy.deepcopy(model))["adapters"]
        sizes = (2 * base, qlora, lora, whole["bfloat16"], whole["float32"])
        counts = (sum(parameter.numel() for parameter in dense.parameters()), base)
        rows.append([name, *(f"{count / 1e9:.1f} B" for count in counts), *(f"{size / 1e9:.0f}" for size in sizes)])
    return [f"| {' | '.join(row)} |" for row in rows]


PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands,
    "recipe.md": recipe_fields,
    "config.md": config_fields,
    "memory.md": memory,
}

if __name__ == "__main__":
    main()
