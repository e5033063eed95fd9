"""Arcee's AFM, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import ArceeConfig, GenerationMixin
from transformers.models.arcee import modeling_arcee as dense

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
class EcMoeArceeConfig(EcMoeConfigMixin, ArceeConfig):
    model_type = "ecmoe_arcee"
    dense_ffn = DenseFFN(into=("up_proj",), has_gate=False, has_bias="mlp_bias")


class EcMoeArceeDecoderLayer(EcMoeDecoderLayerMixin, dense.ArceeDecoderLayer): ...


class EcMoeArceePreTrainedModel(EcMoePreTrainedMixin, dense.ArceePreTrainedModel):
    config: EcMoeArceeConfig
    _no_split_modules = ["EcMoeArceeDecoderLayer"]
    _can_record_outputs = dense.ArceePreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeArceeModel(EcMoeModelMixin, EcMoeArceePreTrainedModel, dense.ArceeModel):
    decoder_layer_class = EcMoeArceeDecoderLayer


class EcMoeArceeForCausalLM(EcMoeForCausalLMMixin, EcMoeArceePreTrainedModel, dense.ArceeForCausalLM, GenerationMixin):
    base_model_class = EcMoeArceeModel


class EcMoeArceeForSequenceClassification(
    EcMoeHeadMixin, EcMoeArceePreTrainedModel, dense.ArceeForSequenceClassification
): ...


class EcMoeArceeForTokenClassification(
    EcMoeHeadMixin, EcMoeArceePreTrainedModel, dense.ArceeForTokenClassification
): ...


class EcMoeArceeForQuestionAnswering(EcMoeHeadMixin, EcMoeArceePreTrainedModel, dense.ArceeForQuestionAnswering): ...


register_family(
    EcMoeArceeConfig,
    EcMoeArceeModel,
    EcMoeArceeForCausalLM,
    EcMoeArceeForSequenceClassification,
    EcMoeArceeForTokenClassification,
    EcMoeArceeForQuestionAnswering,
)
