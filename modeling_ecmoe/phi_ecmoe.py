"""Phi-1 and Phi-2, with experts that choose their tokens."""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin, PhiConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.phi import modeling_phi as dense

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
class EcMoePhiConfig(EcMoeConfigMixin, PhiConfig):
    model_type = "ecmoe_phi"
    dense_ffn = DenseFFN(into=("fc1",), out="fc2", has_gate=False, has_bias=True, norm="input_layernorm")


class EcMoePhiDecoderLayer(EcMoeDecoderLayerMixin, dense.PhiDecoderLayer): ...


class EcMoePhiPreTrainedModel(EcMoePreTrainedMixin, dense.PhiPreTrainedModel):
    config: EcMoePhiConfig
    _no_split_modules = ["EcMoePhiDecoderLayer"]
    supports_pipeline = False  # the pipeline looks for norm, which is final_layernorm here
    _can_record_outputs = dense.PhiPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoePhiModel(EcMoeModelMixin, EcMoePhiPreTrainedModel, dense.PhiModel):
    decoder_layer_class = EcMoePhiDecoderLayer


class EcMoePhiForCausalLM(EcMoeForCausalLMMixin, EcMoePhiPreTrainedModel, dense.PhiForCausalLM, GenerationMixin):
    base_model_class = EcMoePhiModel

    def make_head(self, config: Any) -> nn.Linear:
        return nn.Linear(config.hidden_size, config.vocab_size, bias=True)


class EcMoePhiForSequenceClassification(EcMoeHeadMixin, GenericForSequenceClassification, EcMoePhiPreTrainedModel): ...


class EcMoePhiForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoePhiPreTrainedModel): ...


class EcMoePhiForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoePhiPreTrainedModel): ...


register_family(
    EcMoePhiConfig,
    EcMoePhiModel,
    EcMoePhiForCausalLM,
    EcMoePhiForSequenceClassification,
    EcMoePhiForTokenClassification,
    EcMoePhiForQuestionAnswering,
)
