"""Before the Python blocks of a page: names that a reader has, on a tiny model."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import ecmoe  # noqa: F401  registers the family

tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
texts = [json.loads(line)["text"] for line in Path("text.jsonl").read_text().splitlines()]
if Path("tuned").exists():
    model = AutoModelForCausalLM.from_pretrained("tuned")
