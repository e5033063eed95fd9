"""The text decoder of Gemma-4, where it is dense, with experts that choose their tokens."""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.gemma4 import modeling_gemma4 as dense
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

from .auto_ecmoe import register_family
from .configuration_ecmoe import DenseFFN, EcMoeConfigMixin
from .mixins_ecmoe import (
    ROUTER_LOGITS,
    EcMoeDecoderLayerMixin,
    EcMoeForCausalLMMixin,
    EcMoeHeadMixin,
    EcMoeModelMixin,
    EcMoePreTrainedMixin,
)
from .variants_ecmoe import SoftcappedLogits


@strict
class EcMoeGemma4TextConfig(EcMoeConfigMixin, Gemma4TextConfig):
    model_type = "ecmoe_gemma4_text"
    dense_ffn = DenseFFN(norm="pre_feedforward_layernorm")

    def ffn_width_multiple(self, layer: int) -> int:
        """Layers that read the keys and values of another one may be twice as wide."""
        return 2 if self.use_double_wide_mlp and self.kv_sharing_modes[layer] == "reuse" else 1


class EcMoeGemma4TextDecoderLayer(EcMoeDecoderLayerMixin, dense.Gemma4TextDecoderLayer):
    def make_ffn(self, config: Any) -> nn.Module:
        return dense.Gemma4TextMLP(config, self.layer_idx)


class EcMoeGemma4TextPreTrainedModel(EcMoePreTrainedMixin, dense.Gemma4PreTrainedModel):
    config: EcMoeGemma4TextConfig
    _no_split_modules = ["EcMoeGemma4TextDecoderLayer"]
    supports_pipeline = False  # later stages have neither the token ids, which each layer embeds, nor shared keys
    _can_record_outputs = {
        "hidden_states": EcMoeGemma4TextDecoderLayer,
        "attentions": dense.Gemma4TextAttention,
    } | ROUTER_LOGITS


class EcMoeGemma4TextModel(EcMoeModelMixin, EcMoeGemma4TextPreTrainedModel, dense.Gemma4TextModel):
    config: EcMoeGemma4TextConfig
    decoder_layer_class = EcMoeGemma4TextDecoderLayer
    _can_record_outputs = EcMoeGemma4TextPreTrainedModel._can_record_outputs


class EcMoeGemma4TextForCausalLM(
    SoftcappedLogits, EcMoeForCausalLMMixin, EcMoeGemma4TextPreTrainedModel, dense.Gemma4ForCausalLM, GenerationMixin
):
    config: EcMoeGemma4TextConfig
    base_model_class = EcMoeGemma4TextModel


class EcMoeGemma4TextForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeGemma4TextPreTrainedModel
): ...


class EcMoeGemma4TextForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeGemma4TextPreTrainedModel
): ...


class EcMoeGemma4TextForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGemma4TextPreTrainedModel
): ...


register_family(
    EcMoeGemma4TextConfig,
    EcMoeGemma4TextModel,
    EcMoeGemma4TextForCausalLM,
    EcMoeGemma4TextForSequenceClassification,
    EcMoeGemma4TextForTokenClassification,
    EcMoeGemma4TextForQuestionAnswering,
)
