"""The oldest supported Transformers, and what it does not have yet."""

import re
from typing import Any

import transformers
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

# What a model calls the keys and values of past tokens, among the arguments of its forward and among its outputs.
CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"  # before 5.24

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # before 5.22

    def slice_logits_to_keep(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        """hidden_states [B, S, D] at the last `logits_to_keep` positions (0 is all), or at these positions [N]."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept]


# The base of an expert-parallel dispatch, and where it is registered; None where Transformers has no such interface.
AutoEP: Any
EPImplementationInterface: Any
try:
    from transformers.distributed.expert_parallel import AutoEP, EPImplementationInterface
except ImportError:  # before 5.23
    AutoEP, EPImplementationInterface = object, None

OLDEST_TRANSFORMERS = "5.16.1"  # as in pyproject.toml, which remote code does not have beside it


def require_transformers() -> None:
    """Before the family's other files import names that an older version does not have.

    Raises:
        ImportError: where the installed Transformers is older than the oldest supported one.
    """
    if not is_at_least(OLDEST_TRANSFORMERS):
        found = transformers.__version__
        raise ImportError(
            f"expert-choice models need transformers>={OLDEST_TRANSFORMERS}, and {found} is installed: "
            f'pip install --upgrade "transformers>={OLDEST_TRANSFORMERS}"'
        )


def is_at_least(version: str) -> bool:
    """Whether the installed Transformers is of that release or a newer one."""
    return _release(transformers.__version__) >= _release(version)


def _release(version: str) -> tuple[int, ...]:
    """ "5.24.0.dev0" -> (5, 24, 0): a development version counts as its release."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


require_transformers()

__all__ = ["CACHE", "AutoEP", "EPImplementationInterface", "is_at_least", "slice_logits_to_keep"]
