"""The text decoder of Gemma-4-unified, where it is dense, with experts that choose their tokens."""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.gemma4_unified import modeling_gemma4_unified as dense
from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedTextConfig

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
class EcMoeGemma4UnifiedTextConfig(EcMoeConfigMixin, Gemma4UnifiedTextConfig):
    model_type = "ecmoe_gemma4_unified_text"
    dense_ffn = DenseFFN(norm="pre_feedforward_layernorm")

    def ffn_width_multiple(self, layer: int) -> int:
        """Layers that read the keys and values of another one may be twice as wide."""
        return 2 if self.use_double_wide_mlp and self.kv_sharing_modes[layer] == "reuse" else 1


class EcMoeGemma4UnifiedTextDecoderLayer(EcMoeDecoderLayerMixin, dense.Gemma4UnifiedTextDecoderLayer):
    def make_ffn(self, config: Any) -> nn.Module:
        return dense.Gemma4UnifiedTextMLP(config, self.layer_idx)


class EcMoeGemma4UnifiedTextPreTrainedModel(EcMoePreTrainedMixin, dense.Gemma4UnifiedPreTrainedModel):
    config: EcMoeGemma4UnifiedTextConfig
    _no_split_modules = ["EcMoeGemma4UnifiedTextDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": EcMoeGemma4UnifiedTextDecoderLayer,
        "attentions": dense.Gemma4UnifiedTextAttention,
    } | ROUTER_LOGITS


class EcMoeGemma4UnifiedTextModel(EcMoeModelMixin, EcMoeGemma4UnifiedTextPreTrainedModel, dense.Gemma4UnifiedTextModel):
    config: EcMoeGemma4UnifiedTextConfig
    decoder_layer_class = EcMoeGemma4UnifiedTextDecoderLayer
    _can_record_outputs = EcMoeGemma4UnifiedTextPreTrainedModel._can_record_outputs


class EcMoeGemma4UnifiedTextForCausalLM(
    SoftcappedLogits,
    EcMoeForCausalLMMixin,
    EcMoeGemma4UnifiedTextPreTrainedModel,
    dense.Gemma4UnifiedForCausalLM,
    GenerationMixin,
):
    config: EcMoeGemma4UnifiedTextConfig
    base_model_class = EcMoeGemma4UnifiedTextModel


class EcMoeGemma4UnifiedTextForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeGemma4UnifiedTextPreTrainedModel
): ...


class EcMoeGemma4UnifiedTextForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeGemma4UnifiedTextPreTrainedModel
): ...


class EcMoeGemma4UnifiedTextForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGemma4UnifiedTextPreTrainedModel
): ...


register_family(
    EcMoeGemma4UnifiedTextConfig,
    EcMoeGemma4UnifiedTextModel,
    EcMoeGemma4UnifiedTextForCausalLM,
    EcMoeGemma4UnifiedTextForSequenceClassification,
    EcMoeGemma4UnifiedTextForTokenClassification,
    EcMoeGemma4UnifiedTextForQuestionAnswering,
)
