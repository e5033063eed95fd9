"""Qwen3, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Qwen3Config
from transformers.models.qwen3 import modeling_qwen3 as dense

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
class EcMoeQwen3Config(EcMoeConfigMixin, Qwen3Config):
    model_type = "ecmoe_qwen3"


class EcMoeQwen3DecoderLayer(EcMoeDecoderLayerMixin, dense.Qwen3DecoderLayer): ...


class EcMoeQwen3PreTrainedModel(EcMoePreTrainedMixin, dense.Qwen3PreTrainedModel):
    config: EcMoeQwen3Config
    _no_split_modules = ["EcMoeQwen3DecoderLayer"]
    _can_record_outputs = dense.Qwen3PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeQwen3Model(EcMoeModelMixin, EcMoeQwen3PreTrainedModel, dense.Qwen3Model):
    decoder_layer_class = EcMoeQwen3DecoderLayer


class EcMoeQwen3ForCausalLM(EcMoeForCausalLMMixin, EcMoeQwen3PreTrainedModel, dense.Qwen3ForCausalLM, GenerationMixin):
    base_model_class = EcMoeQwen3Model


class EcMoeQwen3ForSequenceClassification(
    EcMoeHeadMixin, EcMoeQwen3PreTrainedModel, dense.Qwen3ForSequenceClassification
): ...


class EcMoeQwen3ForTokenClassification(
    EcMoeHeadMixin, EcMoeQwen3PreTrainedModel, dense.Qwen3ForTokenClassification
): ...


class EcMoeQwen3ForQuestionAnswering(EcMoeHeadMixin, EcMoeQwen3PreTrainedModel, dense.Qwen3ForQuestionAnswering): ...


register_family(
    EcMoeQwen3Config,
    EcMoeQwen3Model,
    EcMoeQwen3ForCausalLM,
    EcMoeQwen3ForSequenceClassification,
    EcMoeQwen3ForTokenClassification,
    EcMoeQwen3ForQuestionAnswering,
)
