"""Gemma, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GemmaConfig, GenerationMixin
from transformers.modeling_layers import GenericForQuestionAnswering
from transformers.models.gemma import modeling_gemma as dense

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


@strict
class EcMoeGemmaConfig(EcMoeConfigMixin, GemmaConfig):
    model_type = "ecmoe_gemma"
    dense_ffn = DenseFFN(norm_adds_one=True)


class EcMoeGemmaDecoderLayer(EcMoeDecoderLayerMixin, dense.GemmaDecoderLayer): ...


class EcMoeGemmaPreTrainedModel(EcMoePreTrainedMixin, dense.GemmaPreTrainedModel):
    config: EcMoeGemmaConfig
    _no_split_modules = ["EcMoeGemmaDecoderLayer"]
    _can_record_outputs = dense.GemmaPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeGemmaModel(EcMoeModelMixin, EcMoeGemmaPreTrainedModel, dense.GemmaModel):
    decoder_layer_class = EcMoeGemmaDecoderLayer


class EcMoeGemmaForCausalLM(EcMoeForCausalLMMixin, EcMoeGemmaPreTrainedModel, dense.GemmaForCausalLM, GenerationMixin):
    base_model_class = EcMoeGemmaModel


class EcMoeGemmaForSequenceClassification(
    EcMoeHeadMixin, EcMoeGemmaPreTrainedModel, dense.GemmaForSequenceClassification
): ...


class EcMoeGemmaForTokenClassification(
    EcMoeHeadMixin, EcMoeGemmaPreTrainedModel, dense.GemmaForTokenClassification
): ...


class EcMoeGemmaForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGemmaPreTrainedModel): ...


register_family(
    EcMoeGemmaConfig,
    EcMoeGemmaModel,
    EcMoeGemmaForCausalLM,
    EcMoeGemmaForSequenceClassification,
    EcMoeGemmaForTokenClassification,
    EcMoeGemmaForQuestionAnswering,
)
