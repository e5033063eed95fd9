"""Qwen2, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Qwen2Config
from transformers.models.qwen2 import modeling_qwen2 as dense

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
class EcMoeQwen2Config(EcMoeConfigMixin, Qwen2Config):
    model_type = "ecmoe_qwen2"


class EcMoeQwen2DecoderLayer(EcMoeDecoderLayerMixin, dense.Qwen2DecoderLayer): ...


class EcMoeQwen2PreTrainedModel(EcMoePreTrainedMixin, dense.Qwen2PreTrainedModel):
    config: EcMoeQwen2Config
    _no_split_modules = ["EcMoeQwen2DecoderLayer"]
    _can_record_outputs = dense.Qwen2PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeQwen2Model(EcMoeModelMixin, EcMoeQwen2PreTrainedModel, dense.Qwen2Model):
    decoder_layer_class = EcMoeQwen2DecoderLayer


class EcMoeQwen2ForCausalLM(EcMoeForCausalLMMixin, EcMoeQwen2PreTrainedModel, dense.Qwen2ForCausalLM, GenerationMixin):
    base_model_class = EcMoeQwen2Model


class EcMoeQwen2ForSequenceClassification(
    EcMoeHeadMixin, EcMoeQwen2PreTrainedModel, dense.Qwen2ForSequenceClassification
): ...


class EcMoeQwen2ForTokenClassification(
    EcMoeHeadMixin, EcMoeQwen2PreTrainedModel, dense.Qwen2ForTokenClassification
): ...


class EcMoeQwen2ForQuestionAnswering(EcMoeHeadMixin, EcMoeQwen2PreTrainedModel, dense.Qwen2ForQuestionAnswering): ...


register_family(
    EcMoeQwen2Config,
    EcMoeQwen2Model,
    EcMoeQwen2ForCausalLM,
    EcMoeQwen2ForSequenceClassification,
    EcMoeQwen2ForTokenClassification,
    EcMoeQwen2ForQuestionAnswering,
)
