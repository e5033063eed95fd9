"""GLM-4 of the first release, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, GlmConfig
from transformers.modeling_layers import GenericForQuestionAnswering
from transformers.models.glm import modeling_glm as dense

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
class EcMoeGlmConfig(EcMoeConfigMixin, GlmConfig):
    model_type = "ecmoe_glm"
    dense_ffn = DenseFFN(into=("gate_up_proj",))


class EcMoeGlmDecoderLayer(EcMoeDecoderLayerMixin, dense.GlmDecoderLayer): ...


class EcMoeGlmPreTrainedModel(EcMoePreTrainedMixin, dense.GlmPreTrainedModel):
    config: EcMoeGlmConfig
    _no_split_modules = ["EcMoeGlmDecoderLayer"]
    _can_record_outputs = dense.GlmPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeGlmModel(EcMoeModelMixin, EcMoeGlmPreTrainedModel, dense.GlmModel):
    decoder_layer_class = EcMoeGlmDecoderLayer


class EcMoeGlmForCausalLM(EcMoeForCausalLMMixin, EcMoeGlmPreTrainedModel, dense.GlmForCausalLM, GenerationMixin):
    base_model_class = EcMoeGlmModel


class EcMoeGlmForSequenceClassification(
    EcMoeHeadMixin, EcMoeGlmPreTrainedModel, dense.GlmForSequenceClassification
): ...


class EcMoeGlmForTokenClassification(EcMoeHeadMixin, EcMoeGlmPreTrainedModel, dense.GlmForTokenClassification): ...


class EcMoeGlmForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGlmPreTrainedModel): ...


register_family(
    EcMoeGlmConfig,
    EcMoeGlmModel,
    EcMoeGlmForCausalLM,
    EcMoeGlmForSequenceClassification,
    EcMoeGlmForTokenClassification,
    EcMoeGlmForQuestionAnswering,
)
