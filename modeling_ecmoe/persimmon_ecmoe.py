"""Persimmon, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, PersimmonConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.persimmon import modeling_persimmon as dense

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
class EcMoePersimmonConfig(EcMoeConfigMixin, PersimmonConfig):
    model_type = "ecmoe_persimmon"
    dense_ffn = DenseFFN(into=("dense_h_to_4h",), out="dense_4h_to_h", has_gate=False, has_bias=True)


class EcMoePersimmonDecoderLayer(EcMoeDecoderLayerMixin, dense.PersimmonDecoderLayer): ...


class EcMoePersimmonPreTrainedModel(EcMoePreTrainedMixin, dense.PersimmonPreTrainedModel):
    config: EcMoePersimmonConfig
    _no_split_modules = ["EcMoePersimmonDecoderLayer"]
    supports_pipeline = False  # the pipeline looks for norm, which is final_layernorm here
    _can_record_outputs = dense.PersimmonPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoePersimmonModel(EcMoeModelMixin, EcMoePersimmonPreTrainedModel, dense.PersimmonModel):
    decoder_layer_class = EcMoePersimmonDecoderLayer


class EcMoePersimmonForCausalLM(
    EcMoeForCausalLMMixin, EcMoePersimmonPreTrainedModel, dense.PersimmonForCausalLM, GenerationMixin
):
    base_model_class = EcMoePersimmonModel


class EcMoePersimmonForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoePersimmonPreTrainedModel
): ...


class EcMoePersimmonForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoePersimmonPreTrainedModel
): ...


class EcMoePersimmonForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoePersimmonPreTrainedModel
): ...


register_family(
    EcMoePersimmonConfig,
    EcMoePersimmonModel,
    EcMoePersimmonForCausalLM,
    EcMoePersimmonForSequenceClassification,
    EcMoePersimmonForTokenClassification,
    EcMoePersimmonForQuestionAnswering,
)
