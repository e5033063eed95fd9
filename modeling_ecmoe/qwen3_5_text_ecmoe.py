"""The text decoder of Qwen3.5, linear and full attention mixed, with experts that choose their tokens."""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_layers import GenericForQuestionAnswering
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from .auto_ecmoe import register_family
from .configuration_ecmoe import DenseFFN, EcMoeConfigMixin
from .documents_ecmoe import ByDocument
from .mixins_ecmoe import (
    ROUTER_LOGITS,
    EcMoeDecoderLayerMixin,
    EcMoeForCausalLMMixin,
    EcMoeHeadMixin,
    EcMoeModelMixin,
    EcMoePreTrainedMixin,
)


@strict
class EcMoeQwen3_5TextConfig(EcMoeConfigMixin, Qwen3_5TextConfig):
    model_type = "ecmoe_qwen3_5_text"
    dense_ffn = DenseFFN(norm_adds_one=True)


class EcMoeQwen3_5TextGatedDeltaNet(ByDocument, dense.Qwen3_5GatedDeltaNet): ...


class EcMoeQwen3_5TextDecoderLayer(EcMoeDecoderLayerMixin, dense.Qwen3_5DecoderLayer):
    stateful_mixers = {"linear_attn": EcMoeQwen3_5TextGatedDeltaNet}

    def make_ffn(self, config: Any) -> nn.Module:
        return dense.Qwen3_5MLP(config, config.intermediate_size)


class EcMoeQwen3_5TextPreTrainedModel(EcMoePreTrainedMixin, dense.Qwen3_5PreTrainedModel):
    config: EcMoeQwen3_5TextConfig
    _no_split_modules = ["EcMoeQwen3_5TextDecoderLayer"]
    _can_record_outputs = dense.Qwen3_5PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeQwen3_5TextModel(EcMoeModelMixin, EcMoeQwen3_5TextPreTrainedModel, dense.Qwen3_5TextModel):
    config: EcMoeQwen3_5TextConfig
    decoder_layer_class = EcMoeQwen3_5TextDecoderLayer
    carries_state = True


class EcMoeQwen3_5TextForCausalLM(
    EcMoeForCausalLMMixin, EcMoeQwen3_5TextPreTrainedModel, dense.Qwen3_5ForCausalLM, GenerationMixin
):
    config: EcMoeQwen3_5TextConfig
    base_model_class = EcMoeQwen3_5TextModel


class EcMoeQwen3_5TextForSequenceClassification(
    EcMoeHeadMixin, EcMoeQwen3_5TextPreTrainedModel, dense.Qwen3_5TextForSequenceClassification
):
    config: EcMoeQwen3_5TextConfig


class EcMoeQwen3_5TextForTokenClassification(
    EcMoeHeadMixin, EcMoeQwen3_5TextPreTrainedModel, dense.Qwen3_5ForTokenClassification
): ...


class EcMoeQwen3_5TextForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeQwen3_5TextPreTrainedModel
): ...


register_family(
    EcMoeQwen3_5TextConfig,
    EcMoeQwen3_5TextModel,
    EcMoeQwen3_5TextForCausalLM,
    EcMoeQwen3_5TextForSequenceClassification,
    EcMoeQwen3_5TextForTokenClassification,
    EcMoeQwen3_5TextForQuestionAnswering,
)
