"""LFM3, attention and short convolutions mixed, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Lfm3Config
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.lfm3 import modeling_lfm3 as dense

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
class EcMoeLfm3Config(EcMoeConfigMixin, Lfm3Config):
    model_type = "ecmoe_lfm3"
    dense_ffn = DenseFFN(into=("w1", "w3"), out="w2", norm="ffn_norm", place="feed_forward")

    hidden_act: str = "silu"  # which the dense class takes without asking


class EcMoeLfm3ShortConv(ByDocument, dense.Lfm3ShortConv): ...


class EcMoeLfm3DecoderLayer(EcMoeFeedForwardDecoderLayerMixin, dense.Lfm3DecoderLayer):
    stateful_mixers = {"conv": EcMoeLfm3ShortConv}


class EcMoeLfm3PreTrainedModel(EcMoePreTrainedMixin, dense.Lfm3PreTrainedModel):
    config: EcMoeLfm3Config
    _no_split_modules = ["EcMoeLfm3DecoderLayer"]
    supports_pipeline = False  # the pipeline looks for norm, which has another name here
    _can_record_outputs = dense.Lfm3PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeLfm3Model(EcMoeModelMixin, EcMoeLfm3PreTrainedModel, dense.Lfm3Model):
    decoder_layer_class = EcMoeLfm3DecoderLayer
    carries_state = True


class EcMoeLfm3ForCausalLM(EcMoeForCausalLMMixin, EcMoeLfm3PreTrainedModel, dense.Lfm3ForCausalLM, GenerationMixin):
    base_model_class = EcMoeLfm3Model


class EcMoeLfm3ForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeLfm3PreTrainedModel
): ...


class EcMoeLfm3ForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeLfm3PreTrainedModel): ...


class EcMoeLfm3ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeLfm3PreTrainedModel): ...


register_family(
    EcMoeLfm3Config,
    EcMoeLfm3Model,
    EcMoeLfm3ForCausalLM,
    EcMoeLfm3ForSequenceClassification,
    EcMoeLfm3ForTokenClassification,
    EcMoeLfm3ForQuestionAnswering,
)
