"""GLM-4, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Glm4Config
from transformers.modeling_layers import GenericForQuestionAnswering
from transformers.models.glm4 import modeling_glm4 as dense

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
class EcMoeGlm4Config(EcMoeConfigMixin, Glm4Config):
    model_type = "ecmoe_glm4"
    dense_ffn = DenseFFN(into=("gate_up_proj",))


class EcMoeGlm4DecoderLayer(EcMoeDecoderLayerMixin, dense.Glm4DecoderLayer): ...


class EcMoeGlm4PreTrainedModel(EcMoePreTrainedMixin, dense.Glm4PreTrainedModel):
    config: EcMoeGlm4Config
    _no_split_modules = ["EcMoeGlm4DecoderLayer"]
    _can_record_outputs = dense.Glm4PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeGlm4Model(EcMoeModelMixin, EcMoeGlm4PreTrainedModel, dense.Glm4Model):
    decoder_layer_class = EcMoeGlm4DecoderLayer


class EcMoeGlm4ForCausalLM(EcMoeForCausalLMMixin, EcMoeGlm4PreTrainedModel, dense.Glm4ForCausalLM, GenerationMixin):
    base_model_class = EcMoeGlm4Model


class EcMoeGlm4ForSequenceClassification(
    EcMoeHeadMixin, EcMoeGlm4PreTrainedModel, dense.Glm4ForSequenceClassification
): ...


class EcMoeGlm4ForTokenClassification(EcMoeHeadMixin, EcMoeGlm4PreTrainedModel, dense.Glm4ForTokenClassification): ...


class EcMoeGlm4ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGlm4PreTrainedModel): ...


register_family(
    EcMoeGlm4Config,
    EcMoeGlm4Model,
    EcMoeGlm4ForCausalLM,
    EcMoeGlm4ForSequenceClassification,
    EcMoeGlm4ForTokenClassification,
    EcMoeGlm4ForQuestionAnswering,
)
