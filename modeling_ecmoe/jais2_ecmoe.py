"""Jais-2, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Jais2Config
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.jais2 import modeling_jais2 as dense

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
class EcMoeJais2Config(EcMoeConfigMixin, Jais2Config):
    model_type = "ecmoe_jais2"
    dense_ffn = DenseFFN(into=("up_proj",), has_gate=False, has_bias="mlp_bias")


class EcMoeJais2DecoderLayer(EcMoeDecoderLayerMixin, dense.Jais2DecoderLayer): ...


class EcMoeJais2PreTrainedModel(EcMoePreTrainedMixin, dense.Jais2PreTrainedModel):
    config: EcMoeJais2Config
    _no_split_modules = ["EcMoeJais2DecoderLayer"]
    _can_record_outputs = dense.Jais2PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeJais2Model(EcMoeModelMixin, EcMoeJais2PreTrainedModel, dense.Jais2Model):
    decoder_layer_class = EcMoeJais2DecoderLayer


class EcMoeJais2ForCausalLM(EcMoeForCausalLMMixin, EcMoeJais2PreTrainedModel, dense.Jais2ForCausalLM, GenerationMixin):
    base_model_class = EcMoeJais2Model


class EcMoeJais2ForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeJais2PreTrainedModel
): ...


class EcMoeJais2ForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeJais2PreTrainedModel): ...


class EcMoeJais2ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeJais2PreTrainedModel): ...


register_family(
    EcMoeJais2Config,
    EcMoeJais2Model,
    EcMoeJais2ForCausalLM,
    EcMoeJais2ForSequenceClassification,
    EcMoeJais2ForTokenClassification,
    EcMoeJais2ForQuestionAnswering,
)
