"""Loads folders as remote code in a process without the package: `remote_process.py TOKENS OUTPUT AGAIN FOLDER...`.

Saves each head's outputs to OUTPUT, and each language model again under AGAIN.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

HEADS = {
    "AutoModel": "last_hidden_state",
    "AutoModelForCausalLM": "logits",
    "AutoModelForSequenceClassification": "logits",
    "AutoModelForTokenClassification": "logits",
    "AutoModelForQuestionAnswering": "start_logits",
}


def outputs_of(
    folder: Path, ids: torch.Tensor, again: Path | None = None, first: int = 0, **kwargs: bool
) -> dict[str, torch.Tensor]:
    """Each head's output, a head that the folder does not hold having fixed weights; saves the language model again.

    first: which head is loaded first, when nothing of the folder's code has been registered yet.
    """
    outputs = {}
    for auto_class, field in [*HEADS.items()][first:] + [*HEADS.items()][:first]:
        model, info = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True, **kwargs)
        head = ("score.", "qa_outputs.")
        assert all(name.startswith(head) for name in info["missing_keys"]), (auto_class, info["missing_keys"])
        assert model.config._experts_implementation == "grouped_mm"
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(head):
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
            outputs[auto_class] = model.eval()(ids)[field].contiguous()
        if auto_class == "AutoModelForCausalLM":
            outputs["generate"] = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
            if again is not None:
                model.save_pretrained(again)
    return outputs


def main() -> None:
    for package in ("modeling_ecmoe", "ecmoe"):
        sys.modules[package] = None  # an import of it raises
    tokens, output, again, *folders = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    ids = load_file(tokens)["ids"]
    found = {}
    for number, folder in enumerate(folders):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert type(config).__module__.startswith("transformers_modules."), type(config).__module__
        outputs = outputs_of(folder, ids, again / folder.name, first=number + 1, trust_remote_code=True)
        found |= {f"{folder.name}.{name}": tensor for name, tensor in outputs.items()}
    save_file(found, output)


if __name__ == "__main__":
    main()
