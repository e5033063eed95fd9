"""Why a checkpoint cannot be had, from the Hub or a folder, or is of another kind, in words that say what to do.

Transformers and the Hub's client say it in several lines, in which a wrong name, a machine without a network and a
setting that forbids the network look alike. Imported by conversion, finetune and analysis; it imports none of them.
"""

import json
import re
from pathlib import Path
from typing import Any

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@.+)?")

_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "tekken.json", "*.tiktoken")


def could_be_hub_id(name: str) -> bool:
    """Whether a name that is no folder may be one of the Hub's: gpt2, Qwen/Qwen3-0.6B, me/model@v2."""
    return bool(_ID.fullmatch(name)) and not name.startswith((".", "~"))


def why_no_checkpoint(name: str) -> str | None:
    """What is wrong with a name that is neither a model's folder nor may be one of the Hub's; None of a good one."""
    path = Path(name).expanduser()
    if path.is_dir():
        return why_only_an_adapter(name, path)
    if path.exists():
        return "is a file; give the checkpoint's folder"
    return None if could_be_hub_id(name) else "does not exist; give a checkpoint folder or a Hub id"


def why_only_an_adapter(name: str, folder: Path) -> str | None:
    """What is wrong with a folder of PEFT adapters, which may hold a config.json but no weights of a whole model, and
    what to give instead; None of any other.

    name: of the folder, as the user gave it.
    """
    path = folder / "adapter_config.json"
    if not path.is_file() or any(any(folder.glob(files)) for files in ("model*.safetensors*", "pytorch_model*")):
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or "BASE"
    except (OSError, ValueError, AttributeError):
        base = "BASE"
    what = f"is a PEFT adapter of {base}, not a whole model"
    if (folder / "merged" / "config.json").is_file():  # what a recipe with merge=true writes
        return f"{what}; give {Path(name) / 'merged'}"
    return f"{what}; merge it first, {merging_line(name, folder, base)}, and give {merged_name(name)}"


def merged_name(name: str) -> str:
    """Where `merging_line` writes."""
    return f"{name.rstrip('/')}-merged"


def merging_line(name: str, folder: Path, base: str, fields: str = "") -> str:
    """The command that makes a whole model, with its tokenizer, of a folder of adapters.

    name: of the folder, as the user gave it. fields: further keywords of the base's from_pretrained, ", a=1".
    """
    has_tokenizer = any(any(folder.glob(files)) for files in _TOKENIZER_FILES)
    return (
        'python -c "import ecmoe, peft, transformers as t; '
        f"peft.PeftModel.from_pretrained(t.AutoModelForCausalLM.from_pretrained('{base}'{fields}), '{name}')"
        f".merge_and_unload().save_pretrained('{merged_name(name)}'); "
        f"t.AutoTokenizer.from_pretrained('{name if has_tokenizer else base}').save_pretrained('{merged_name(name)}')\""
    )


def why_no_tokenizer(name: str, folder: Path) -> str | None:
    """What to do about a checkpoint's folder without a file that a tokenizer could be read from; None of any other.

    save_pretrained of a model writes none.
    """
    if not folder.is_dir() or any(any(folder.glob(files)) for files in _TOKENIZER_FILES):
        return None
    return (
        "has no tokenizer; save that of its source there, "
        f"AutoTokenizer.from_pretrained(SOURCE).save_pretrained('{name}')"
    )


def why_not_causal(config: Any) -> str | None:
    """What keeps a config's model from predicting text from left to right; None of one that does.

    Encoders such as BERT have a class for it, in which tokens see later ones all the same unless config.is_decoder.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = f"is of model_type {config.model_type}"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        of_the_hub = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})  # code beside the weights
        return (
            None if of_the_hub else f"{kind}, which has no AutoModelForCausalLM; give a decoder, such as qwen3 or gpt2"
        )
    looks_back = config.is_encoder_decoder or getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not looks_back:
        return (
            f"{kind}, an encoder, whose tokens see the ones they would predict; give a decoder, such as qwen3 or gpt2"
        )
    return None


def why_not_from_hub(error: BaseException) -> str:
    """One clause for an error of `from_pretrained` or of the Hub's client, and of those that led to it."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    causes = _causes(error)

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if any_is(hub.GatedRepoError):
        return "access to it must be asked for on its page (then log in with `hf auth login`)"
    if any_is(hub.RepositoryNotFoundError):
        return "it has no such repository, or a private one (log in with `hf auth login`)"
    if any_is(hub.RevisionNotFoundError):
        return "it has no such revision"
    if any_is(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        if constants.HF_HUB_OFFLINE:
            return "it is not in the cache, and HF_HUB_OFFLINE=1 keeps the Hub out; fetch it once without that"
        reason = first_line(next((cause for cause in causes if not isinstance(cause, OSError)), causes[-1]))
        return f"it is not in the cache, and the Hub cannot be reached ({reason})"
    return first_line(error).rstrip(".")


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those before it, as Python would print them, the last one first."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


def first_line(error: BaseException) -> str:
    """What an error says, of several lines the first; its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
