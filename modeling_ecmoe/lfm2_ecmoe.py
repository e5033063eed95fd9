"""LFM2, attention and short convolutions mixed, with experts that choose their tokens."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Lfm2Config
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.lfm2 import modeling_lfm2 as dense

from .auto_ecmoe import register_family
from .configuration_ecmoe import DenseFFN, EcMoeConfigMixin
from .documents_ecmoe import ByDocument
from .mixins_ecmoe import (
    ROUTER_LOGITS,
    EcMoeForCausalLMMixin,
    EcMoeHeadMixin,
    EcMoeModelMixin,
    EcMoePreTrainedMixin,
)
from .variants_ecmoe import EcMoeFeedForwardDecoderLayerMixin


@strict
class EcMoeLfm2Config(EcMoeConfigMixin, Lfm2Config):
    model_type = "ecmoe_lfm2"
    dense_ffn = DenseFFN(into=("w1", "w3"), out="w2", norm="ffn_norm", place="feed_forward")

    hidden_act: str = "silu"  # which the dense class takes without asking

    def __post_init__(self, **kwargs: Any) -> None:
        """The width that its FFNs have, as the dense class works it out."""
        self.intermediate_size = kwargs.pop("block_ff_dim", self.intermediate_size)
        self.intermediate_size = self.dense_width(self)
        self.block_auto_adjust_ff_dim = False
        super().__post_init__(**kwargs)

    @classmethod
    def dense_width(cls, dense: Any) -> int:
        if not dense.block_auto_adjust_ff_dim:
            return int(dense.intermediate_size)
        width = int(2 * dense.intermediate_size / 3)
        if dense.block_ffn_dim_multiplier is None:
            return width
        multiple = dense.block_multiple_of
        return multiple * math.ceil(int(dense.block_ffn_dim_multiplier * width) / multiple)


class EcMoeLfm2ShortConv(ByDocument, dense.Lfm2ShortConv): ...


class EcMoeLfm2DecoderLayer(EcMoeFeedForwardDecoderLayerMixin, dense.Lfm2DecoderLayer):
    stateful_mixers = {"conv": EcMoeLfm2ShortConv}


class EcMoeLfm2PreTrainedModel(EcMoePreTrainedMixin, dense.Lfm2PreTrainedModel):
    config: EcMoeLfm2Config
    _no_split_modules = ["EcMoeLfm2DecoderLayer"]
    supports_pipeline = False  # the pipeline looks for norm, which has another name here
    _can_record_outputs = dense.Lfm2PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeLfm2Model(EcMoeModelMixin, EcMoeLfm2PreTrainedModel, dense.Lfm2Model):
    decoder_layer_class = EcMoeLfm2DecoderLayer
    carries_state = True


class EcMoeLfm2ForCausalLM(EcMoeForCausalLMMixin, EcMoeLfm2PreTrainedModel, dense.Lfm2ForCausalLM, GenerationMixin):
    base_model_class = EcMoeLfm2Model


class EcMoeLfm2ForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeLfm2PreTrainedModel
): ...


class EcMoeLfm2ForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeLfm2PreTrainedModel): ...


class EcMoeLfm2ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeLfm2PreTrainedModel): ...


register_family(
    EcMoeLfm2Config,
    EcMoeLfm2Model,
    EcMoeLfm2ForCausalLM,
    EcMoeLfm2ForSequenceClassification,
    EcMoeLfm2ForTokenClassification,
    EcMoeLfm2ForQuestionAnswering,
)
