"""Ministral-3, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Ministral3Config
from transformers.models.ministral3 import modeling_ministral3 as dense

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
class EcMoeMinistral3Config(EcMoeConfigMixin, Ministral3Config):
    model_type = "ecmoe_ministral3"


class EcMoeMinistral3DecoderLayer(EcMoeDecoderLayerMixin, dense.Ministral3DecoderLayer): ...


class EcMoeMinistral3PreTrainedModel(EcMoePreTrainedMixin, dense.Ministral3PreTrainedModel):
    config: EcMoeMinistral3Config
    _no_split_modules = ["EcMoeMinistral3DecoderLayer"]
    _can_record_outputs = dense.Ministral3PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeMinistral3Model(EcMoeModelMixin, EcMoeMinistral3PreTrainedModel, dense.Ministral3Model):
    decoder_layer_class = EcMoeMinistral3DecoderLayer


class EcMoeMinistral3ForCausalLM(
    EcMoeForCausalLMMixin, EcMoeMinistral3PreTrainedModel, dense.Ministral3ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeMinistral3Model


class EcMoeMinistral3ForSequenceClassification(
    EcMoeHeadMixin, EcMoeMinistral3PreTrainedModel, dense.Ministral3ForSequenceClassification
): ...


class EcMoeMinistral3ForTokenClassification(
    EcMoeHeadMixin, EcMoeMinistral3PreTrainedModel, dense.Ministral3ForTokenClassification
): ...


class EcMoeMinistral3ForQuestionAnswering(
    EcMoeHeadMixin, EcMoeMinistral3PreTrainedModel, dense.Ministral3ForQuestionAnswering
): ...


register_family(
    EcMoeMinistral3Config,
    EcMoeMinistral3Model,
    EcMoeMinistral3ForCausalLM,
    EcMoeMinistral3ForSequenceClassification,
    EcMoeMinistral3ForTokenClassification,
    EcMoeMinistral3ForQuestionAnswering,
)
