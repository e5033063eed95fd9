"""Peak memory and time of the converter, against copying its output: `python -m benchmarks.conversion`.

Random bf16 Llamas of 2 and 4 GB are converted with --no-verify, which runs no model; then the output is copied with
`cp`. The two alternate, so that a slow moment of the machine meets both. Needs some 60 GB of disk.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .machine import save

SHARD = "1GB"
LAYERS = {"2GB": 22, "4GB": 46}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (default: the system's)")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=options.scratch))
    try:
        measured = {name: measure(name, scratch, options.repeats, options.num_experts) for name in LAYERS}
    finally:
        shutil.rmtree(scratch)
    growth = measured["4GB"]["peak_rss_bytes"] / measured["2GB"]["peak_rss_bytes"]
    limit = 1.5e9 + 1e9
    figures = {
        "max_shard_size": SHARD,
        "num_experts": options.num_experts,
        "peak_rss_limit_bytes": limit,
        "peak_rss_growth": growth,
        **measured,
    }
    print(json.dumps(figures, indent=2))
    print(save("conversion", figures))
    for name, result in measured.items():
        if result["peak_rss_bytes"] > limit or result["time_over_cp"] > 3 or growth > 1.1:
            sys.exit(f"{name}: beyond the limits of 1.5 x {SHARD} + 1 GB, 3 x cp, and 10 % growth")


def measure(name: str, scratch: Path, repeats: int, num_experts: int) -> dict[str, Any]:
    """One size: peak resident memory, and medians of the seconds of converting and of copying."""
    source, output, copy = scratch / name, scratch / "output", scratch / "copy"
    # In a process of its own: a child begins with its parent's peak in its books.
    writer = multiprocessing.get_context("spawn").Process(target=write_llama, args=(source, LAYERS[name]))
    writer.start()
    writer.join()
    seconds: dict[str, list[float]] = {"convert": [], "cp": []}
    peaks = []
    for _ in range(repeats):
        options = ["--no-verify", "--max-shard-size", SHARD, "--num-experts", str(num_experts), "--init", "copy"]
        taken, peak = timed([sys.executable, "-m", "ecmoe.conversion", str(source), str(output), *options])
        seconds["convert"].append(taken)
        peaks.append(peak)
        seconds["cp"].append(timed(["cp", "-r", str(output), str(copy)])[0])
        output_bytes = sum(path.stat().st_size for path in output.iterdir())
        shutil.rmtree(output)
        shutil.rmtree(copy)
    medians = {f"{what}_seconds": statistics.median(values) for what, values in seconds.items()}
    ratios = [ours / theirs for ours, theirs in zip(seconds["convert"], seconds["cp"], strict=True)]
    source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    shutil.rmtree(source)
    return {
        "source_bytes": source_bytes,
        "output_bytes": output_bytes,
        "peak_rss_bytes": max(peaks),
        **medians,
        "time_over_cp": statistics.median(ratios),
        "all_seconds": seconds,
    }


def timed(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a command."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - begin, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_llama(folder: Path, num_layers: int) -> None:
    """A Llama of TinyLlama's widths with random weights, in shards."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
    torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    main()
