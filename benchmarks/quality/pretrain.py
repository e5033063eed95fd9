"""The parent "5M": a Llama of 5.5 million parameters with a vocabulary of its own, trained once on the training
documents of three domains, so that mathematics and code are new to it. Its recipe is below, and what it came to is
benchmarks/results/quality-parent.json."""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..machine import save
from . import measure
from .data import DOMAINS, END, load, read_domain, trained_bpe, training_batches
from .train import BETAS, MOST_NORM, learning_rate_factor

VOCABULARY = 4096
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
KNOWN = ("prose", "documentation", "stories")
# They divide the rows, windows of 128 tokens.
STEPS, ROWS, LEARNING_RATE, WEIGHT_DECAY, SEED = 900, 66, 3e-3, 0.1, 0
SAVE_EVERY = 100
_STATE = "unfinished.safetensors"


def train_parent(data: Path, folder: Path, steps: int = STEPS) -> Path:
    """Trains the parent "5M" into a folder; stopped at any moment, the same call goes on from its last hundred steps.

    Returns:
        The file of its figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(data, folder)
    windows = load(data, tokenizer, most=1 << 30)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **SIZES))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    done = _resume(model, optimizer, folder / _STATE)
    batches = training_batches({name: windows[name].train for name in KNOWN}, ROWS, steps, SEED)
    begin, log = time.perf_counter(), []
    for step, rows in enumerate(itertools.islice(batches, done, None), start=done):
        loss = _step(model, optimizer, rows, LEARNING_RATE * max(learning_rate_factor(step, steps), 0.1 / steps))
        log.append(loss)
        if (step + 1) % SAVE_EVERY == 0:
            _keep(model, optimizer, step + 1, folder / _STATE)
            left = (time.perf_counter() - begin) / (step + 1 - done) * (steps - step - 1) / 60
            print(f"step {step + 1}/{steps}: loss {sum(log) / len(log):.4f}, {left:.0f} minutes left", flush=True)
            log.clear()
    losses = measure.domain_losses(model, {name: each.held_out for name, each in windows.items()})
    model.save_pretrained(folder)
    (folder / _STATE).unlink(missing_ok=True)
    recipe = {"steps": steps, "rows": ROWS, "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "seed": SEED}
    figures = {"recipe": recipe, "sizes": SIZES, "vocabulary": VOCABULARY, "parameters": model.num_parameters()}
    tokens = {name: windows[name].train.numel() for name in KNOWN}
    return save("quality-parent", figures | {"tokens_of_domain": tokens, "losses": losses})


def _tokenizer(data: Path, folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training documents, made once."""
    if not (folder / "tokenizer.json").is_file():
        texts: Iterator[str] = itertools.chain.from_iterable(read_domain(domain, data)[0] for domain in DOMAINS)
        made = trained_bpe(texts, VOCABULARY)
        wrapped = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, bos_token=END, eos_token=END, pad_token=END)
        wrapped.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _step(model: Any, optimizer: torch.optim.Optimizer, rows: Tensor, rate: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", torch.bfloat16):  # products alone; weights and moments are float32
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MOST_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _keep(model: Any, optimizer: torch.optim.Optimizer, done: int, path: Path) -> None:
    """Weights and moments, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {name: parameter.detach(), f"1 {name}": state["exp_avg"], f"2 {name}": state["exp_avg_sq"]}
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished, {"done": str(done)})
    unfinished.replace(path)


@torch.no_grad()
def _resume(model: Any, optimizer: torch.optim.Optimizer, path: Path) -> int:
    """Puts weights and moments back; the steps that were done."""
    if not path.is_file():
        return 0
    tensors = load_file(path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    done = int(header["__metadata__"]["done"])
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])
        moments = {"exp_avg": tensors[f"1 {name}"], "exp_avg_sq": tensors[f"2 {name}"]}
        optimizer.state[parameter] = {"step": torch.tensor(float(done)), **moments}
    return done
