"""The whole road on any machine, without data and without the Hub: `make demo`.

Train a small dense Llama on English that every CPython carries, convert it, fine-tune the expert-choice model and
the dense control on the same tokens of other documents, compare. `make demo SOURCE=<folder or Hub id>` starts from
your dense checkpoint instead of training one.
"""

import argparse
import ast
import json
import random
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from ecmoe.conversion import ConversionError, convert
from ecmoe.finetune import Recipe, RecipeError, run

SEPARATOR = "\n<|endoftext|>\n"
VOCAB_SIZE = 1024
SEQUENCE_LENGTH = 128
PROMPT = "The object is"


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder to make")
    parser.add_argument("--source", help="a dense checkpoint folder or Hub id to start from")
    options = parser.parse_args()
    if options.output.exists() and any(options.output.iterdir()):
        print(f"demo: error: output={options.output} is not empty; remove it or say OUTPUT=another", file=sys.stderr)
        sys.exit(2)
    logging.set_verbosity_error()
    try:
        demo(options.output, options.source)
    except (ConversionError, RecipeError) as error:
        shutil.rmtree(options.output, ignore_errors=True)  # it was empty before
        print(f"demo: error: {error}", file=sys.stderr)
        sys.exit(2)


def demo(output: Path, source: str | None) -> None:
    """Runs every stage into a folder of its own below `output`, prints the table and the text."""
    begin = time.perf_counter()
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    first, second = write_texts(output)
    if source is None:
        console.rule("1. A small dense Llama, trained from scratch")
        write_random_llama(output / "random", first)
        source = str(output / "dense")
        recipe = {"max_steps": 900, "learning_rate": 3e-3, "per_device_train_batch_size": 16, "warmup_steps": 20}
        run(make(output / "random", output / "dense", first, **recipe))
        tuning = {"max_steps": 100, "learning_rate": 1e-3, "per_device_train_batch_size": 16, "warmup_steps": 10}
    else:
        tuning = {"max_steps": 30, "learning_rate": 1e-5, "per_device_train_batch_size": 4, "warmup_steps": 3}

    console.rule("2. The same model with eight experts in each layer")
    converted = output / "expert_choice"
    record = convert(source, str(converted), num_experts=8, capacity_factor=1, text=str(second))
    console.print(
        f"Loss of the dense model {record['verification']['loss_dense']:.6f}, "
        f"of the converted one {record['verification']['loss_converted']:.6f}."
    )

    console.rule("3. Both fine-tuned on the same tokens of other documents")
    dense = run(make(source, output / "dense_tuned", second, **tuning))
    sparse = run(make(converted, output / "expert_choice_tuned", second, **tuning))

    console.rule("4. Side by side")
    console.print(table(dense, sparse))
    text = generate(output / "expert_choice_tuned")
    console.print("The expert-choice model goes on (greedy, causal routes, KV cache):", style="bold")
    console.print(text, markup=False, highlight=False)
    minutes = (time.perf_counter() - begin) / 60
    summary = {"minutes": minutes, "conversion": record, "dense": dense, "expert_choice": sparse, "text": text}
    (output / "demo.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"\nDone in {minutes:.1f} minutes. Models, measurements (demo.json) and text are in {output.resolve()}."
    )


def make(model: Path | str, output: Path, dataset: Path, **training: Any) -> Recipe:
    """A recipe that differs between the stages in what is given here alone."""
    fixed = {"max_length": SEQUENCE_LENGTH, "packing": True, "activation_checkpointing": False}
    fixed |= {"lr_scheduler_type": "cosine", "logging_steps": 50, "save_strategy": "no", "report_to": "none"}
    return Recipe(
        model=str(model),
        output_dir=str(output),
        dataset=str(dataset),
        validation_fraction=0.15,
        training=fixed | training,
    )


def write_texts(output: Path) -> tuple[Path, Path]:
    """Two files of whole documents: one to pretrain on, one to fine-tune on.

    Python's help topics, half in each; the pretraining half is joined by the docstrings of the standard library,
    since half the topics (some 80,000 tokens) would only be learned by heart.
    """
    documents = [topics[name].strip() for name in sorted(topics)]
    random.Random(0).shuffle(documents)
    pretrain, finetune = output / "pretrain.txt", output / "finetune.txt"
    pretrain.write_text(SEPARATOR.join(documents[::2] + library_docstrings()), encoding="utf-8")
    finetune.write_text(SEPARATOR.join(documents[1::2]), encoding="utf-8")
    return pretrain, finetune


def library_docstrings() -> list[str]:
    """The docstrings of each module of the standard library, one document per module; nothing is imported."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    documents = []
    for path in sorted(root.rglob("*.py")):
        if left_out.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        text = "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes)))
        if text:
            documents.append(text)
    return documents


def write_random_llama(folder: Path, text: Path) -> None:
    """A byte-level BPE tokenizer learned from the text, and a small Llama with random weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.read_text(encoding="utf-8").split(SEPARATOR), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def table(dense: dict[str, Any], sparse: dict[str, Any]) -> Table:
    result = Table(title="Held-out text, causal routes")
    for column in ("", "dense", "expert choice"):
        result.add_column(column, justify="left" if not column else "right")
    routing = sparse["routing"]
    rows = [
        ("parameters", f"{dense['parameters']:,}", f"{sparse['parameters']:,}"),
        ("active per token", f"{dense['active_parameters']:,}", f"{sparse['active_parameters']:,}"),
        ("tokens trained on", f"{dense['tokens']:,}", f"{sparse['tokens']:,}"),
        ("causal loss before", f"{dense['loss_before']:.4f}", f"{sparse['loss_before']:.4f}"),
        ("causal loss after", f"{dense['loss_after']:.4f}", f"{sparse['loss_after']:.4f}"),
        ("tokens/s in training", f"{dense['tokens_per_second']:,.0f}", f"{sparse['tokens_per_second']:,.0f}"),
        ("expert load (1 = its share)", "", f"{routing['load_min']:.2f} to {routing['load_max']:.2f}"),
        ("experts per token", "", f"{routing['experts_per_token']:.2f}"),
        ("tokens chosen by no expert", "", f"{routing['uncovered']:.1%}"),
    ]
    for row in rows:
        result.add_row(*row)
    return result


def generate(folder: Path) -> str:
    """A greedy continuation by the saved model, loaded as any user would load it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=60
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()
