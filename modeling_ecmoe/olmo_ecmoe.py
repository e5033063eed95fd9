"""OLMo, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, OlmoConfig
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForTokenClassification
from transformers.models.olmo import modeling_olmo as dense

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
class EcMoeOlmoConfig(EcMoeConfigMixin, OlmoConfig):
    model_type = "ecmoe_olmo"


class EcMoeOlmoDecoderLayer(EcMoeDecoderLayerMixin, dense.OlmoDecoderLayer): ...


class EcMoeOlmoPreTrainedModel(EcMoePreTrainedMixin, dense.OlmoPreTrainedModel):
    config: EcMoeOlmoConfig
    _no_split_modules = ["EcMoeOlmoDecoderLayer"]
    _can_record_outputs = dense.OlmoPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeOlmoModel(EcMoeModelMixin, EcMoeOlmoPreTrainedModel, dense.OlmoModel):
    decoder_layer_class = EcMoeOlmoDecoderLayer


class EcMoeOlmoForCausalLM(EcMoeForCausalLMMixin, EcMoeOlmoPreTrainedModel, dense.OlmoForCausalLM, GenerationMixin):
    base_model_class = EcMoeOlmoModel


class EcMoeOlmoForSequenceClassification(
    EcMoeHeadMixin, EcMoeOlmoPreTrainedModel, dense.OlmoForSequenceClassification
): ...


class EcMoeOlmoForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeOlmoPreTrainedModel): ...


class EcMoeOlmoForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeOlmoPreTrainedModel): ...


register_family(
    EcMoeOlmoConfig,
    EcMoeOlmoModel,
    EcMoeOlmoForCausalLM,
    EcMoeOlmoForSequenceClassification,
    EcMoeOlmoForTokenClassification,
    EcMoeOlmoForQuestionAnswering,
)
