"""Memory, loss and speed in 4 bits against 16: `python -m benchmarks quantization --model FOLDER`.

Each kind is measured in a process of its own: peak resident memory of loading it and of a training step of LoRA on
attention and experts, the causal loss of text that no step has seen, and greedy tokens a second without the adapter and
with it, alternating. Loaded are a checkpoint in bfloat16, made of FOLDER first, and one in 4 bits that is made of that.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ecmoe.finetune.adapters import add_lora, train_in_float32
from ecmoe.finetune.memory import begin_peak, peak_bytes
from modeling_ecmoe.quantized_ecmoe import Stacked4bit

from .machine import save

SAVED = "4 bits, as saved"  # by "4 bits"
KINDS: dict[str, dict[str, Any]] = {
    "16 bits": {},
    "4 bits": {"load_in_4bit": True},
    "4 bits, experts in 16": {"load_in_4bit": True, "llm_int8_skip_modules": ["experts", "lm_head"]},
    SAVED: {},
}
ROWS = 2  # of a training step
SHARD = "500MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a converted checkpoint")
    parser.add_argument("--text", type=Path, help="a .txt file (default: the package's sample of text)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=16, help="of the text whose loss is measured")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (default: the system's)")
    parser.add_argument("--kind", choices=["write", *KINDS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind == "write":
        return write(options.model, options.folder)
    if options.kind:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        apart("write", Path(scratch))
        measured = {kind: apart(kind, Path(scratch)) for kind in KINDS}
    figures = {"length": options.length, "rows": options.rows, "training_rows": ROWS, "kinds": measured}
    print(json.dumps(figures, indent=2))
    print(save("quantization", figures))


def apart(kind: str, folder: Path) -> Any:
    """One kind in a process of its own, with the options of this one: a process remembers its peak."""
    print(f"{kind} ...", file=sys.stderr, flush=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "quantization",
        *sys.argv[1:],
        "--kind",
        kind,
        "--folder",
        str(folder),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) if kind != "write" else None


def write(model: str, folder: Path) -> None:
    """The checkpoint that is loaded, in bfloat16."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    loaded.save_pretrained(folder / "bfloat16", max_shard_size=SHARD)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "bfloat16")


def quantization(kind: str) -> dict[str, BitsAndBytesConfig]:
    """Of `from_pretrained`, which would take None for a wish to forget what a checkpoint is quantised by."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return {"quantization_config": BitsAndBytesConfig(**settings, **KINDS[kind])} if KINDS[kind] else {}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One kind."""
    folder = options.folder / ("4bit" if options.kind == SAVED else "bfloat16")
    before = peak_bytes()
    begin = time.perf_counter()
    with peak_memory() as loading:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **quantization(options.kind))
        take_from_files(model)
    found: dict[str, Any] = {
        "file_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "resident_before_bytes": before,
        "load_seconds": time.perf_counter() - begin,
        "load": loading,
        "weight_bytes": model.get_memory_footprint(),
    }
    if options.kind == "4 bits":
        model.save_pretrained(options.folder / "4bit", max_shard_size=SHARD)
    rows = read_rows(options)
    found["loss"] = causal_loss(model, rows[: options.rows])
    adapted = add_lora(model, {})
    train_in_float32(adapted)
    found["train"] = train(adapted, rows[options.rows :])
    found |= decode(adapted, rows[:1, :32], options.new_tokens)
    return found


@torch.no_grad()
def take_from_files(model: Any) -> None:
    """Weights that are pages of a checkpoint's file, which the system may drop and read again, become the process's
    own: what a kind needs is counted alike, and files that are not needed any more are let go."""
    for parameter in model.parameters():
        if isinstance(parameter, Stacked4bit):
            for name, part in parameter.parts().items():
                setattr(parameter, name, part.clone())
        else:
            parameter.data = parameter.data.clone()


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """resident_bytes: the most that was resident, pages of the checkpoint's files among it. anonymous_bytes: the most
    without them, looked at every 5 ms: the figure to compare by."""
    found: dict[str, int] = {"anonymous_bytes": 0}
    done = Event()

    def watch() -> None:
        while not done.wait(0.005):
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
            found["anonymous_bytes"] = max(found["anonymous_bytes"], now)

    begin_peak()
    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found["resident_bytes"] = peak_bytes()


def read_rows(options: argparse.Namespace) -> torch.Tensor:
    """[rows + ROWS, length] tokens."""
    tokenizer = AutoTokenizer.from_pretrained(options.folder / "bfloat16")
    text = (options.text or files("ecmoe.conversion") / "sample.txt").read_text(encoding="utf-8")
    ids = tokenizer(text.replace("<|endoftext|>", "\n"), verbose=False)["input_ids"]
    count = options.rows + ROWS
    stride = max(1, len(ids) // options.length // count)  # over the whole text, which holds several kinds
    found = torch.tensor(ids[: len(ids) // options.length * options.length]).view(-1, options.length)[::stride]
    return found[:count]


@torch.no_grad()
def causal_loss(model: Any, rows: torch.Tensor) -> float:
    losses = [model.eval()(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in rows]
    return statistics.fmean(losses)


def train(model: Any, rows: torch.Tensor) -> dict[str, Any]:
    """Two steps of AdamW on the adapters, activations computed again; the peak is that of the second."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    found: dict[str, Any] = {}
    for _ in range(2):
        begin = time.perf_counter()
        with peak_memory() as peak:
            model.train()(input_ids=rows, labels=rows, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found = {**peak, "seconds": time.perf_counter() - begin}
    model.gradient_checkpointing_disable()
    return found


def decode(model: Any, prompt: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Median seconds of a greedy token, without the adapter and with it, a pass of each in turn."""
    model.eval()
    seconds: dict[str, list[float]] = {"base": [], "adapter": []}

    def timed(name: str) -> None:
        begin = time.perf_counter()
        model.generate(
            input_ids=prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
        seconds[name].append((time.perf_counter() - begin) / new_tokens)

    for _ in range(3):
        timed("adapter")
        with model.disable_adapter():
            timed("base")
    base, adapter = (statistics.median(seconds[name][1:]) for name in ("base", "adapter"))  # the first warms up
    return {"token_seconds": base, "token_seconds_with_adapter": adapter, "adapter_over_base": adapter / base}


if __name__ == "__main__":
    main()
