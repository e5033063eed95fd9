"""StarCoder-2, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Starcoder2Config
from transformers.modeling_layers import GenericForQuestionAnswering
from transformers.models.starcoder2 import modeling_starcoder2 as dense

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
class EcMoeStarcoder2Config(EcMoeConfigMixin, Starcoder2Config):
    model_type = "ecmoe_starcoder2"
    dense_ffn = DenseFFN(into=("c_fc",), out="c_proj", has_gate=False, has_bias="use_bias", dropout="residual_dropout")


class EcMoeStarcoder2DecoderLayer(EcMoeDecoderLayerMixin, dense.Starcoder2DecoderLayer): ...


class EcMoeStarcoder2PreTrainedModel(EcMoePreTrainedMixin, dense.Starcoder2PreTrainedModel):
    config: EcMoeStarcoder2Config
    _no_split_modules = ["EcMoeStarcoder2DecoderLayer"]
    _can_record_outputs = dense.Starcoder2PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeStarcoder2Model(EcMoeModelMixin, EcMoeStarcoder2PreTrainedModel, dense.Starcoder2Model):
    decoder_layer_class = EcMoeStarcoder2DecoderLayer


class EcMoeStarcoder2ForCausalLM(
    EcMoeForCausalLMMixin, EcMoeStarcoder2PreTrainedModel, dense.Starcoder2ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeStarcoder2Model


class EcMoeStarcoder2ForSequenceClassification(
    EcMoeHeadMixin, EcMoeStarcoder2PreTrainedModel, dense.Starcoder2ForSequenceClassification
): ...


class EcMoeStarcoder2ForTokenClassification(
    EcMoeHeadMixin, EcMoeStarcoder2PreTrainedModel, dense.Starcoder2ForTokenClassification
): ...


class EcMoeStarcoder2ForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeStarcoder2PreTrainedModel
): ...


register_family(
    EcMoeStarcoder2Config,
    EcMoeStarcoder2Model,
    EcMoeStarcoder2ForCausalLM,
    EcMoeStarcoder2ForSequenceClassification,
    EcMoeStarcoder2ForTokenClassification,
    EcMoeStarcoder2ForQuestionAnswering,
)
