"""Ministral, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, MinistralConfig
from transformers.models.ministral import modeling_ministral as dense

from .auto_ecmoe import register_family
from .configuration_ecmoe import EcMoeConfigMixin
from .mixins_ecmoe import (
    ROUTER_LOGITS,
    EcMoeDecoderLayerMixin,
    EcMoeForCausalLMMixin,
    EcMoeHeadMixin,
    EcMoeModelMixin,
    EcMoePreTrainedMixin,
)


@strict
class EcMoeMinistralConfig(EcMoeConfigMixin, MinistralConfig):
    model_type = "ecmoe_ministral"


class EcMoeMinistralDecoderLayer(EcMoeDecoderLayerMixin, dense.MinistralDecoderLayer): ...


class EcMoeMinistralPreTrainedModel(EcMoePreTrainedMixin, dense.MinistralPreTrainedModel):
    config: EcMoeMinistralConfig
    _no_split_modules = ["EcMoeMinistralDecoderLayer"]
    _can_record_outputs = dense.MinistralPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeMinistralModel(EcMoeModelMixin, EcMoeMinistralPreTrainedModel, dense.MinistralModel):
    decoder_layer_class = EcMoeMinistralDecoderLayer


class EcMoeMinistralForCausalLM(
    EcMoeForCausalLMMixin, EcMoeMinistralPreTrainedModel, dense.MinistralForCausalLM, GenerationMixin
):
    base_model_class = EcMoeMinistralModel


class EcMoeMinistralForSequenceClassification(
    EcMoeHeadMixin, EcMoeMinistralPreTrainedModel, dense.MinistralForSequenceClassification
): ...


class EcMoeMinistralForTokenClassification(
    EcMoeHeadMixin, EcMoeMinistralPreTrainedModel, dense.MinistralForTokenClassification
): ...


class EcMoeMinistralForQuestionAnswering(
    EcMoeHeadMixin, EcMoeMinistralPreTrainedModel, dense.MinistralForQuestionAnswering
): ...


register_family(
    EcMoeMinistralConfig,
    EcMoeMinistralModel,
    EcMoeMinistralForCausalLM,
    EcMoeMinistralForSequenceClassification,
    EcMoeMinistralForTokenClassification,
    EcMoeMinistralForQuestionAnswering,
)
