"""Helium, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, HeliumConfig
from transformers.modeling_layers import GenericForQuestionAnswering
from transformers.models.helium import modeling_helium as dense

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
class EcMoeHeliumConfig(EcMoeConfigMixin, HeliumConfig):
    model_type = "ecmoe_helium"
    dense_ffn = DenseFFN(has_bias="mlp_bias")


class EcMoeHeliumDecoderLayer(EcMoeDecoderLayerMixin, dense.HeliumDecoderLayer): ...


class EcMoeHeliumPreTrainedModel(EcMoePreTrainedMixin, dense.HeliumPreTrainedModel):
    config: EcMoeHeliumConfig
    _no_split_modules = ["EcMoeHeliumDecoderLayer"]
    _can_record_outputs = dense.HeliumPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeHeliumModel(EcMoeModelMixin, EcMoeHeliumPreTrainedModel, dense.HeliumModel):
    decoder_layer_class = EcMoeHeliumDecoderLayer


class EcMoeHeliumForCausalLM(
    EcMoeForCausalLMMixin, EcMoeHeliumPreTrainedModel, dense.HeliumForCausalLM, GenerationMixin
):
    base_model_class = EcMoeHeliumModel


class EcMoeHeliumForSequenceClassification(
    EcMoeHeadMixin, EcMoeHeliumPreTrainedModel, dense.HeliumForSequenceClassification
): ...


class EcMoeHeliumForTokenClassification(
    EcMoeHeadMixin, EcMoeHeliumPreTrainedModel, dense.HeliumForTokenClassification
): ...


class EcMoeHeliumForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeHeliumPreTrainedModel): ...


register_family(
    EcMoeHeliumConfig,
    EcMoeHeliumModel,
    EcMoeHeliumForCausalLM,
    EcMoeHeliumForSequenceClassification,
    EcMoeHeliumForTokenClassification,
    EcMoeHeliumForQuestionAnswering,
)
