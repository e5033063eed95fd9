"""What the oldest supported Transformers does not have yet."""

from typing import Any

from torch import Tensor

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

__all__ = ["AutoEP", "EPImplementationInterface", "slice_logits_to_keep"]
