"""ERNIE-4.5, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import Ernie4_5Config, GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.ernie4_5 import modeling_ernie4_5 as dense

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
class EcMoeErnie4_5Config(EcMoeConfigMixin, Ernie4_5Config):
    model_type = "ecmoe_ernie4_5"
    dense_ffn = DenseFFN(has_bias="use_bias")


class EcMoeErnie4_5DecoderLayer(EcMoeDecoderLayerMixin, dense.Ernie4_5DecoderLayer): ...


class EcMoeErnie4_5PreTrainedModel(EcMoePreTrainedMixin, dense.Ernie4_5PreTrainedModel):
    config: EcMoeErnie4_5Config
    _no_split_modules = ["EcMoeErnie4_5DecoderLayer"]
    _can_record_outputs = dense.Ernie4_5PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeErnie4_5Model(EcMoeModelMixin, EcMoeErnie4_5PreTrainedModel, dense.Ernie4_5Model):
    decoder_layer_class = EcMoeErnie4_5DecoderLayer


class EcMoeErnie4_5ForCausalLM(
    EcMoeForCausalLMMixin, EcMoeErnie4_5PreTrainedModel, dense.Ernie4_5ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeErnie4_5Model


class EcMoeErnie4_5ForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeErnie4_5PreTrainedModel
): ...


class EcMoeErnie4_5ForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeErnie4_5PreTrainedModel
): ...


class EcMoeErnie4_5ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeErnie4_5PreTrainedModel): ...


register_family(
    EcMoeErnie4_5Config,
    EcMoeErnie4_5Model,
    EcMoeErnie4_5ForCausalLM,
    EcMoeErnie4_5ForSequenceClassification,
    EcMoeErnie4_5ForTokenClassification,
    EcMoeErnie4_5ForQuestionAnswering,
)
