"""Gemma-3, its text decoder, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import Gemma3TextConfig, GenerationMixin
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForTokenClassification
from transformers.models.gemma3 import modeling_gemma3 as dense

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
class EcMoeGemma3TextConfig(EcMoeConfigMixin, Gemma3TextConfig):
    model_type = "ecmoe_gemma3_text"
    dense_ffn = DenseFFN(norm="pre_feedforward_layernorm", norm_adds_one=True)


class EcMoeGemma3TextDecoderLayer(EcMoeDecoderLayerMixin, dense.Gemma3DecoderLayer): ...


class EcMoeGemma3TextPreTrainedModel(EcMoePreTrainedMixin, dense.Gemma3PreTrainedModel):
    config: EcMoeGemma3TextConfig
    _no_split_modules = ["EcMoeGemma3TextDecoderLayer"]
    _can_record_outputs = dense.Gemma3PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeGemma3TextModel(EcMoeModelMixin, EcMoeGemma3TextPreTrainedModel, dense.Gemma3TextModel):
    decoder_layer_class = EcMoeGemma3TextDecoderLayer


class EcMoeGemma3TextForCausalLM(
    SoftcappedLogits, EcMoeForCausalLMMixin, EcMoeGemma3TextPreTrainedModel, dense.Gemma3ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeGemma3TextModel


class EcMoeGemma3TextForSequenceClassification(
    EcMoeHeadMixin, EcMoeGemma3TextPreTrainedModel, dense.Gemma3TextForSequenceClassification
): ...


class EcMoeGemma3TextForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeGemma3TextPreTrainedModel
): ...


class EcMoeGemma3TextForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGemma3TextPreTrainedModel
): ...


register_family(
    EcMoeGemma3TextConfig,
    EcMoeGemma3TextModel,
    EcMoeGemma3TextForCausalLM,
    EcMoeGemma3TextForSequenceClassification,
    EcMoeGemma3TextForTokenClassification,
    EcMoeGemma3TextForQuestionAnswering,
)
