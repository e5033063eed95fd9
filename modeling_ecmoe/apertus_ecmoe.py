"""Apertus, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import ApertusConfig, GenerationMixin
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForSequenceClassification
from transformers.models.apertus import modeling_apertus as dense

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
class EcMoeApertusConfig(EcMoeConfigMixin, ApertusConfig):
    model_type = "ecmoe_apertus"
    dense_ffn = DenseFFN(into=("up_proj",), has_gate=False, norm="feedforward_layernorm")


class EcMoeApertusDecoderLayer(EcMoeDecoderLayerMixin, dense.ApertusDecoderLayer): ...


class EcMoeApertusPreTrainedModel(EcMoePreTrainedMixin, dense.ApertusPreTrainedModel):
    config: EcMoeApertusConfig
    _no_split_modules = ["EcMoeApertusDecoderLayer"]
    _can_record_outputs = dense.ApertusPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeApertusModel(EcMoeModelMixin, EcMoeApertusPreTrainedModel, dense.ApertusModel):
    decoder_layer_class = EcMoeApertusDecoderLayer


class EcMoeApertusForCausalLM(
    EcMoeForCausalLMMixin, EcMoeApertusPreTrainedModel, dense.ApertusForCausalLM, GenerationMixin
):
    base_model_class = EcMoeApertusModel


class EcMoeApertusForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeApertusPreTrainedModel
): ...


class EcMoeApertusForTokenClassification(
    EcMoeHeadMixin, EcMoeApertusPreTrainedModel, dense.ApertusForTokenClassification
): ...


class EcMoeApertusForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeApertusPreTrainedModel): ...


register_family(
    EcMoeApertusConfig,
    EcMoeApertusModel,
    EcMoeApertusForCausalLM,
    EcMoeApertusForSequenceClassification,
    EcMoeApertusForTokenClassification,
    EcMoeApertusForQuestionAnswering,
)
