"""Loss and peak memory of weights in float32 and in bfloat16: `python -m benchmarks precision SOURCE TEXT`.

SOURCE is a dense checkpoint, TEXT a .txt or .jsonl file. The model is saved in bfloat16, converted with 4 experts and
trained by the recipe `full` at its own rate, each way in a process of its own, whose peak of resident memory is read.
Writes benchmarks/results/precision-NAME.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ecmoe

from .machine import save

WAYS: dict[str, dict[str, Any]] = {
    "float32, AdamW (default)": {"dtype": "float32"},
    "bfloat16, AdamW8bit, rounding at random": {"dtype": "bfloat16"},
    "bfloat16, AdamW": {"dtype": "bfloat16", "optim": "adamw_torch"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="dense checkpoint folder")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="rows of 128 tokens")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        dense, model = Path(scratch) / "dense", Path(scratch) / "ecmoe"
        AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.bfloat16).save_pretrained(dense)
        AutoTokenizer.from_pretrained(options.source).save_pretrained(dense)
        ecmoe.convert(str(dense), str(model), num_experts=options.experts, verify=False)
        command = [sys.executable, "-m", "benchmarks", "precision", *sys.argv[1:], "--model", str(model), "--way"]
        rows = {}
        for way in WAYS:
            output = subprocess.run([*command, way], check=True, stdout=subprocess.PIPE, text=True).stdout
            rows[way] = json.loads(output.splitlines()[-1])
    name = (
        Path(options.source).resolve().parent.name if Path(options.source).name == "hf" else Path(options.source).name
    )
    path = save(f"precision-{name}", {"steps": options.steps, "batch": options.batch, "ways": rows})
    print("| weights and optimiser | loss before | after | peak memory |\n| --- | ---: | ---: | ---: |")
    for way, row in rows.items():
        print(f"| {way} | {row['before']:.3f} | {row['after']:.3f} | {row['peak_gb']:.2f} GB |")
    print(f"\n{path}")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One way, in this process."""
    fields = {"max_length": 128, "max_steps": options.steps, "per_device_train_batch_size": options.batch}
    fields |= {"use_cpu": not torch.cuda.is_available(), "eval_strategy": "no", "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as scratch:
        found = ecmoe.finetune.run(
            "full",
            model=options.model,
            output_dir=f"{scratch}/out",
            dataset=options.text,
            **fields,
            **WAYS[options.way],
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kB on Linux
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak
    return {"before": found["loss_before"], "after": found["loss_after"], "peak_gb": peak / 1e9}


if __name__ == "__main__":
    main()
