"""Before the Python blocks of a page: names that its reader has, on tiny models; PAGE is the page's name."""

import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer  # noqa: F401

import ecmoe  # noqa: F401  registers the family

tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
texts = [json.loads(line)["text"] for line in Path("text.jsonl").read_text().splitlines()]
stories = Dataset.from_dict({"text": ["Once upon a time there was a cat. " * (1 + n % 5) for n in range(64)]})
held_out = stories.select(range(8))
preferences = Dataset.from_dict({"prompt": ["One "] * 32, "chosen": ["day."] * 32, "rejected": ["dog."] * 32})
prompts = Dataset.from_dict({"prompt": ["Once upon", "One day"] * 16})
options = {"use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none", "learning_rate": 1e-5}
if Path("tuned").exists():
    model = AutoModelForCausalLM.from_pretrained("tuned")
if PAGE == "composites":  # noqa: F821
    from PIL import Image

    images = [[Image.new("RGB", (28, 28), colour)] for colour in ("red", "blue")]
    texts = ["<boi> a red square", "<boi> a blue square"]


def reward(completions, **_):  # type: ignore[no-untyped-def]
    return [float(len(set(each))) for each in completions]
