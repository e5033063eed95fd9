"""Loads composites as remote code in a process without the package: `composite_process.py OUTPUT AGAIN FOLDER...`.

Saves to OUTPUT the logits and the generated tokens of each folder's inputs.safetensors, and each model again under AGAIN.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel


def outputs_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In eval mode."""
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return {"logits": logits.contiguous(), "generated": generated}


def main() -> None:
    for package in ("modeling_ecmoe", "ecmoe"):
        sys.modules[package] = None  # an import of it raises
    output, again, *folders = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    found = {}
    for folder in folders:
        inputs = load_file(folder / "inputs.safetensors")
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        decoder = type(model.get_decoder()).__module__
        assert decoder.startswith("transformers_modules."), decoder
        auto_class = "AutoProcessor" if (folder / "processor_config.json").is_file() else "AutoTokenizer"
        getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
        found |= {f"{folder.name}.{name}": tensor for name, tensor in outputs_of(model, inputs).items()}
        assert transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).get_decoder() is not None
        model.save_pretrained(again / folder.name)
        save_file(inputs, again / folder.name / "inputs.safetensors")
        for path in [*folder.glob("processor*.json"), *folder.glob("tokenizer*")]:
            (again / folder.name / path.name).write_bytes(path.read_bytes())
    save_file(found, output)


if __name__ == "__main__":
    main()
