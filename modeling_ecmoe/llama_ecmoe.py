"""Llama, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, LlamaConfig
from transformers.models.llama import modeling_llama as dense

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
class EcMoeLlamaConfig(EcMoeConfigMixin, LlamaConfig):
    model_type = "ecmoe_llama"
    dense_ffn = DenseFFN(has_bias="mlp_bias")


class EcMoeLlamaDecoderLayer(EcMoeDecoderLayerMixin, dense.LlamaDecoderLayer): ...


class EcMoeLlamaPreTrainedModel(EcMoePreTrainedMixin, dense.LlamaPreTrainedModel):
    config: EcMoeLlamaConfig
    _no_split_modules = ["EcMoeLlamaDecoderLayer"]
    _can_record_outputs = dense.LlamaPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeLlamaModel(EcMoeModelMixin, EcMoeLlamaPreTrainedModel, dense.LlamaModel):
    decoder_layer_class = EcMoeLlamaDecoderLayer


class EcMoeLlamaForCausalLM(EcMoeForCausalLMMixin, EcMoeLlamaPreTrainedModel, dense.LlamaForCausalLM, GenerationMixin):
    base_model_class = EcMoeLlamaModel


class EcMoeLlamaForSequenceClassification(
    EcMoeHeadMixin, EcMoeLlamaPreTrainedModel, dense.LlamaForSequenceClassification
): ...


class EcMoeLlamaForTokenClassification(
    EcMoeHeadMixin, EcMoeLlamaPreTrainedModel, dense.LlamaForTokenClassification
): ...


class EcMoeLlamaForQuestionAnswering(EcMoeHeadMixin, EcMoeLlamaPreTrainedModel, dense.LlamaForQuestionAnswering): ...


register_family(
    EcMoeLlamaConfig,
    EcMoeLlamaModel,
    EcMoeLlamaForCausalLM,
    EcMoeLlamaForSequenceClassification,
    EcMoeLlamaForTokenClassification,
    EcMoeLlamaForQuestionAnswering,
)
