"""CWM, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import CwmConfig, GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.cwm import modeling_cwm as dense

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
class EcMoeCwmConfig(EcMoeConfigMixin, CwmConfig):
    model_type = "ecmoe_cwm"
    dense_ffn = DenseFFN(has_bias="mlp_bias")


class EcMoeCwmDecoderLayer(EcMoeDecoderLayerMixin, dense.CwmDecoderLayer): ...


class EcMoeCwmPreTrainedModel(EcMoePreTrainedMixin, dense.CwmPreTrainedModel):
    config: EcMoeCwmConfig
    _no_split_modules = ["EcMoeCwmDecoderLayer"]
    _can_record_outputs = dense.CwmPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeCwmModel(EcMoeModelMixin, EcMoeCwmPreTrainedModel, dense.CwmModel):
    decoder_layer_class = EcMoeCwmDecoderLayer


class EcMoeCwmForCausalLM(EcMoeForCausalLMMixin, EcMoeCwmPreTrainedModel, dense.CwmForCausalLM, GenerationMixin):
    base_model_class = EcMoeCwmModel


class EcMoeCwmForSequenceClassification(EcMoeHeadMixin, GenericForSequenceClassification, EcMoeCwmPreTrainedModel): ...


class EcMoeCwmForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeCwmPreTrainedModel): ...


class EcMoeCwmForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeCwmPreTrainedModel): ...


register_family(
    EcMoeCwmConfig,
    EcMoeCwmModel,
    EcMoeCwmForCausalLM,
    EcMoeCwmForSequenceClassification,
    EcMoeCwmForTokenClassification,
    EcMoeCwmForQuestionAnswering,
)
