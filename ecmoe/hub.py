"""Why a checkpoint could not be had from the Hub, in words that say what to do.

Transformers and the Hub's client say it in several lines, in which a wrong name, a machine without a network and a
setting that forbids the network look alike. Imported by conversion, finetune and analysis; it imports none of them.
"""

import re
from pathlib import Path

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@.+)?")


def could_be_hub_id(name: str) -> bool:
    """Whether a name that is no folder may be one of the Hub's: gpt2, Qwen/Qwen3-0.6B, me/model@v2."""
    return bool(_ID.fullmatch(name)) and not name.startswith((".", "~"))


def why_no_checkpoint(name: str) -> str | None:
    """What is wrong with a name that is neither a folder nor may be one of the Hub's; None of a good one."""
    path = Path(name).expanduser()
    if path.is_dir():
        return None
    if path.exists():
        return "is a file; give the checkpoint's folder"
    return None if could_be_hub_id(name) else "does not exist; give a checkpoint folder or a Hub id"


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
