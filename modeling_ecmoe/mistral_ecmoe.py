"""Mistral, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, MistralConfig
from transformers.models.mistral import modeling_mistral as dense

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
class EcMoeMistralConfig(EcMoeConfigMixin, MistralConfig):
    model_type = "ecmoe_mistral"


class EcMoeMistralDecoderLayer(EcMoeDecoderLayerMixin, dense.MistralDecoderLayer): ...


class EcMoeMistralPreTrainedModel(EcMoePreTrainedMixin, dense.MistralPreTrainedModel):
    config: EcMoeMistralConfig
    _no_split_modules = ["EcMoeMistralDecoderLayer"]
    _can_record_outputs = dense.MistralPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeMistralModel(EcMoeModelMixin, EcMoeMistralPreTrainedModel, dense.MistralModel):
    decoder_layer_class = EcMoeMistralDecoderLayer


class EcMoeMistralForCausalLM(
    EcMoeForCausalLMMixin, EcMoeMistralPreTrainedModel, dense.MistralForCausalLM, GenerationMixin
):
    base_model_class = EcMoeMistralModel


class EcMoeMistralForSequenceClassification(
    EcMoeHeadMixin, EcMoeMistralPreTrainedModel, dense.MistralForSequenceClassification
): ...


class EcMoeMistralForTokenClassification(
    EcMoeHeadMixin, EcMoeMistralPreTrainedModel, dense.MistralForTokenClassification
): ...


class EcMoeMistralForQuestionAnswering(
    EcMoeHeadMixin, EcMoeMistralPreTrainedModel, dense.MistralForQuestionAnswering
): ...


register_family(
    EcMoeMistralConfig,
    EcMoeMistralModel,
    EcMoeMistralForCausalLM,
    EcMoeMistralForSequenceClassification,
    EcMoeMistralForTokenClassification,
    EcMoeMistralForQuestionAnswering,
)
