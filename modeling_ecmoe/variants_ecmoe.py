"""Mixins of families that are built otherwise than Llama: layers, base models and logits.

Shapes: B batch, S sequence, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import capture_outputs

from .block_ecmoe import EcMoeBlock
from .mixins_ecmoe import ROUTER_LOGITS, EcMoeDecoderLayerMixin


class EcMoeAloofDecoderLayerMixin(EcMoeDecoderLayerMixin):
    """Of families whose base model hands nothing on to its layers: it takes the real tokens off its block, which was
    told of them, before it may be set up for recomputing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.mlp, EcMoeBlock):
            kwargs["token_mask"] = self.mlp.token_mask
        return super().__call__(*args, **kwargs)


class EcMoeBareDecoderLayerMixin(EcMoeDecoderLayerMixin):
    """Of families whose FFN is no module but `fc1` and `fc2` of the layer: in a sparse layer these let everything
    through, and the block stands where the activation between them does."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if hasattr(self, "mlp"):
            self.fc1, self.fc2 = nn.Identity(), nn.Identity()

    @property
    def activation_fn(self) -> Any:
        return self._modules.get("mlp") or self._modules["activation_fn"]


class EcMoeFeedForwardDecoderLayerMixin(EcMoeDecoderLayerMixin):
    """Of families whose layer calls its FFN `feed_forward`: in a sparse layer that is the block."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if "mlp" in self._modules:
            del self._modules["feed_forward"]

    @property
    def feed_forward(self) -> Any:
        return self._modules.get("mlp") or self._modules["feed_forward"]


def recorded_of(dense_class: Any) -> dict[str, Any]:
    """What is recorded of a pass: the router logits, and what the dense class has recorded. A newer Transformers may
    rewrite a class that collects its outputs by itself into one that records them."""
    return (dense_class._can_record_outputs or {}) | ROUTER_LOGITS


class RecordedForward:
    """Before a dense base model that collects its outputs by itself: those that it does not know are recorded."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "hidden_states" in self._can_record_outputs:  # by the dense class, which hands on all that it is given
            return super().forward(*args, **kwargs)
        return self._recorded_forward(*args, **kwargs)

    @capture_outputs
    def _recorded_forward(self, *args: Any, token_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """token_mask: read by the layers off their blocks."""
        kwargs.pop("output_router_logits", None)
        return super().forward(*args, return_dict=True, **kwargs)


class SoftcappedLogits:
    """Before a language model whose config bounds its logits by `final_logit_softcapping`; None is no bound."""

    def scale_logits(self, logits: Tensor) -> Tensor:
        """[B, S, V] -> [B, S, V]."""
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)
