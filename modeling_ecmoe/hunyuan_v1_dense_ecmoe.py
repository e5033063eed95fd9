"""Hunyuan's dense models, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, HunYuanDenseV1Config
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForTokenClassification
from transformers.models.hunyuan_v1_dense import modeling_hunyuan_v1_dense as dense

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
class EcMoeHunYuanDenseV1Config(EcMoeConfigMixin, HunYuanDenseV1Config):
    model_type = "ecmoe_hunyuan_v1_dense"


class EcMoeHunYuanDenseV1DecoderLayer(EcMoeDecoderLayerMixin, dense.HunYuanDenseV1DecoderLayer): ...


class EcMoeHunYuanDenseV1PreTrainedModel(EcMoePreTrainedMixin, dense.HunYuanDenseV1PreTrainedModel):
    config: EcMoeHunYuanDenseV1Config
    _no_split_modules = ["EcMoeHunYuanDenseV1DecoderLayer"]
    _can_record_outputs = dense.HunYuanDenseV1PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeHunYuanDenseV1Model(EcMoeModelMixin, EcMoeHunYuanDenseV1PreTrainedModel, dense.HunYuanDenseV1Model):
    decoder_layer_class = EcMoeHunYuanDenseV1DecoderLayer


class EcMoeHunYuanDenseV1ForCausalLM(
    EcMoeForCausalLMMixin, EcMoeHunYuanDenseV1PreTrainedModel, dense.HunYuanDenseV1ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeHunYuanDenseV1Model


class EcMoeHunYuanDenseV1ForSequenceClassification(
    EcMoeHeadMixin, EcMoeHunYuanDenseV1PreTrainedModel, dense.HunYuanDenseV1ForSequenceClassification
): ...


class EcMoeHunYuanDenseV1ForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeHunYuanDenseV1PreTrainedModel
): ...


class EcMoeHunYuanDenseV1ForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeHunYuanDenseV1PreTrainedModel
): ...


register_family(
    EcMoeHunYuanDenseV1Config,
    EcMoeHunYuanDenseV1Model,
    EcMoeHunYuanDenseV1ForCausalLM,
    EcMoeHunYuanDenseV1ForSequenceClassification,
    EcMoeHunYuanDenseV1ForTokenClassification,
    EcMoeHunYuanDenseV1ForQuestionAnswering,
)
