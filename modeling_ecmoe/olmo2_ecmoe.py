"""OLMo-2, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Olmo2Config
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForTokenClassification
from transformers.models.olmo2 import modeling_olmo2 as dense

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
class EcMoeOlmo2Config(EcMoeConfigMixin, Olmo2Config):
    model_type = "ecmoe_olmo2"
    dense_ffn = DenseFFN(norm=None)


class EcMoeOlmo2DecoderLayer(EcMoeDecoderLayerMixin, dense.Olmo2DecoderLayer): ...


class EcMoeOlmo2PreTrainedModel(EcMoePreTrainedMixin, dense.Olmo2PreTrainedModel):
    config: EcMoeOlmo2Config
    _no_split_modules = ["EcMoeOlmo2DecoderLayer"]
    _can_record_outputs = dense.Olmo2PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeOlmo2Model(EcMoeModelMixin, EcMoeOlmo2PreTrainedModel, dense.Olmo2Model):
    decoder_layer_class = EcMoeOlmo2DecoderLayer


class EcMoeOlmo2ForCausalLM(EcMoeForCausalLMMixin, EcMoeOlmo2PreTrainedModel, dense.Olmo2ForCausalLM, GenerationMixin):
    base_model_class = EcMoeOlmo2Model


class EcMoeOlmo2ForSequenceClassification(
    EcMoeHeadMixin, EcMoeOlmo2PreTrainedModel, dense.Olmo2ForSequenceClassification
): ...


class EcMoeOlmo2ForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeOlmo2PreTrainedModel): ...


class EcMoeOlmo2ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeOlmo2PreTrainedModel): ...


register_family(
    EcMoeOlmo2Config,
    EcMoeOlmo2Model,
    EcMoeOlmo2ForCausalLM,
    EcMoeOlmo2ForSequenceClassification,
    EcMoeOlmo2ForTokenClassification,
    EcMoeOlmo2ForQuestionAnswering,
)
