"""Gemma-2, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import Gemma2Config, GenerationMixin
from transformers.modeling_layers import GenericForQuestionAnswering
from transformers.models.gemma2 import modeling_gemma2 as dense

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
class EcMoeGemma2Config(EcMoeConfigMixin, Gemma2Config):
    model_type = "ecmoe_gemma2"
    dense_ffn = DenseFFN(norm="pre_feedforward_layernorm", norm_adds_one=True)


class EcMoeGemma2DecoderLayer(EcMoeDecoderLayerMixin, dense.Gemma2DecoderLayer): ...


class EcMoeGemma2PreTrainedModel(EcMoePreTrainedMixin, dense.Gemma2PreTrainedModel):
    config: EcMoeGemma2Config
    _no_split_modules = ["EcMoeGemma2DecoderLayer"]
    _can_record_outputs = dense.Gemma2PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeGemma2Model(EcMoeModelMixin, EcMoeGemma2PreTrainedModel, dense.Gemma2Model):
    decoder_layer_class = EcMoeGemma2DecoderLayer


class EcMoeGemma2ForCausalLM(
    SoftcappedLogits, EcMoeForCausalLMMixin, EcMoeGemma2PreTrainedModel, dense.Gemma2ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeGemma2Model


class EcMoeGemma2ForSequenceClassification(
    EcMoeHeadMixin, EcMoeGemma2PreTrainedModel, dense.Gemma2ForSequenceClassification
): ...


class EcMoeGemma2ForTokenClassification(
    EcMoeHeadMixin, EcMoeGemma2PreTrainedModel, dense.Gemma2ForTokenClassification
): ...


class EcMoeGemma2ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGemma2PreTrainedModel): ...


register_family(
    EcMoeGemma2Config,
    EcMoeGemma2Model,
    EcMoeGemma2ForCausalLM,
    EcMoeGemma2ForSequenceClassification,
    EcMoeGemma2ForTokenClassification,
    EcMoeGemma2ForQuestionAnswering,
)
