"""Loads composites as remote code in a process without the package: `composite_process.py OUTPUT AGAIN FOLDER...`.

Saves to OUTPUT the logits and the generated tokens of each folder's inputs.safetensors, of the model and of what it is
when it was saved again under AGAIN.
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


def loaded(folder: Path) -> PreTrainedModel:
    """A composite whose own code and whose decoder's come from its folder."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    for part in (model, model.get_decoder()):
        assert type(part).__module__.startswith("transformers_modules."), type(part).__module__
    return model


def main() -> None:
    for package in ("modeling_ecmoe", "ecmoe"):
        sys.modules[package] = None  # an import of it raises
    output, again, *folders = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    found = {}
    for folder in folders:
        inputs = load_file(folder / "inputs.safetensors")
        model = loaded(folder)
        found |= {f"{folder.name}.{name}": tensor for name, tensor in outputs_of(model, inputs).items()}
        assert transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).get_decoder() is not None
        auto_class = "AutoProcessor" if (folder / "processor_config.json").is_file() else "AutoTokenizer"
        getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
        model.save_pretrained(again / folder.name)
        found |= {f"{folder.name}.again.{n}": t for n, t in outputs_of(loaded(again / folder.name), inputs).items()}
    save_file(found, output)


if __name__ == "__main__":
    main()
