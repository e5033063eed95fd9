"""Phi-3 and Phi-4, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Phi3Config
from transformers.modeling_layers import GenericForQuestionAnswering
from transformers.models.phi3 import modeling_phi3 as dense

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
class EcMoePhi3Config(EcMoeConfigMixin, Phi3Config):
    model_type = "ecmoe_phi3"
    dense_ffn = DenseFFN(into=("gate_up_proj",))


class EcMoePhi3DecoderLayer(EcMoeDecoderLayerMixin, dense.Phi3DecoderLayer): ...


class EcMoePhi3PreTrainedModel(EcMoePreTrainedMixin, dense.Phi3PreTrainedModel):
    config: EcMoePhi3Config
    _no_split_modules = ["EcMoePhi3DecoderLayer"]
    _can_record_outputs = dense.Phi3PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoePhi3Model(EcMoeModelMixin, EcMoePhi3PreTrainedModel, dense.Phi3Model):
    decoder_layer_class = EcMoePhi3DecoderLayer


class EcMoePhi3ForCausalLM(EcMoeForCausalLMMixin, EcMoePhi3PreTrainedModel, dense.Phi3ForCausalLM, GenerationMixin):
    base_model_class = EcMoePhi3Model


class EcMoePhi3ForSequenceClassification(
    EcMoeHeadMixin, EcMoePhi3PreTrainedModel, dense.Phi3ForSequenceClassification
): ...


class EcMoePhi3ForTokenClassification(EcMoeHeadMixin, EcMoePhi3PreTrainedModel, dense.Phi3ForTokenClassification): ...


class EcMoePhi3ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoePhi3PreTrainedModel): ...


register_family(
    EcMoePhi3Config,
    EcMoePhi3Model,
    EcMoePhi3ForCausalLM,
    EcMoePhi3ForSequenceClassification,
    EcMoePhi3ForTokenClassification,
    EcMoePhi3ForQuestionAnswering,
)
