"""OLMo-3, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Olmo3Config
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForTokenClassification
from transformers.models.olmo3 import modeling_olmo3 as dense

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
class EcMoeOlmo3Config(EcMoeConfigMixin, Olmo3Config):
    model_type = "ecmoe_olmo3"
    dense_ffn = DenseFFN(norm=None)


class EcMoeOlmo3DecoderLayer(EcMoeDecoderLayerMixin, dense.Olmo3DecoderLayer): ...


class EcMoeOlmo3PreTrainedModel(EcMoePreTrainedMixin, dense.Olmo3PreTrainedModel):
    config: EcMoeOlmo3Config
    _no_split_modules = ["EcMoeOlmo3DecoderLayer"]
    _can_record_outputs = dense.Olmo3PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeOlmo3Model(EcMoeModelMixin, EcMoeOlmo3PreTrainedModel, dense.Olmo3Model):
    decoder_layer_class = EcMoeOlmo3DecoderLayer


class EcMoeOlmo3ForCausalLM(EcMoeForCausalLMMixin, EcMoeOlmo3PreTrainedModel, dense.Olmo3ForCausalLM, GenerationMixin):
    base_model_class = EcMoeOlmo3Model


class EcMoeOlmo3ForSequenceClassification(
    EcMoeHeadMixin, EcMoeOlmo3PreTrainedModel, dense.Olmo3ForSequenceClassification
): ...


class EcMoeOlmo3ForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeOlmo3PreTrainedModel): ...


class EcMoeOlmo3ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeOlmo3PreTrainedModel): ...


register_family(
    EcMoeOlmo3Config,
    EcMoeOlmo3Model,
    EcMoeOlmo3ForCausalLM,
    EcMoeOlmo3ForSequenceClassification,
    EcMoeOlmo3ForTokenClassification,
    EcMoeOlmo3ForQuestionAnswering,
)
