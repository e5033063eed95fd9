"""Cohere-2, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import Cohere2Config, GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.cohere2 import modeling_cohere2 as dense

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
class EcMoeCohere2Config(EcMoeConfigMixin, Cohere2Config):
    model_type = "ecmoe_cohere2"
    dense_ffn = DenseFFN(norm="input_layernorm")


class EcMoeCohere2DecoderLayer(EcMoeDecoderLayerMixin, dense.Cohere2DecoderLayer): ...


class EcMoeCohere2PreTrainedModel(EcMoePreTrainedMixin, dense.Cohere2PreTrainedModel):
    config: EcMoeCohere2Config
    _no_split_modules = ["EcMoeCohere2DecoderLayer"]
    _can_record_outputs = dense.Cohere2PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeCohere2Model(EcMoeModelMixin, EcMoeCohere2PreTrainedModel, dense.Cohere2Model):
    decoder_layer_class = EcMoeCohere2DecoderLayer


class EcMoeCohere2ForCausalLM(
    EcMoeForCausalLMMixin, EcMoeCohere2PreTrainedModel, dense.Cohere2ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeCohere2Model

    def scale_logits(self, logits: Tensor) -> Tensor:
        return logits * self.config.logit_scale


class EcMoeCohere2ForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeCohere2PreTrainedModel
): ...


class EcMoeCohere2ForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeCohere2PreTrainedModel
): ...


class EcMoeCohere2ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeCohere2PreTrainedModel): ...


register_family(
    EcMoeCohere2Config,
    EcMoeCohere2Model,
    EcMoeCohere2ForCausalLM,
    EcMoeCohere2ForSequenceClassification,
    EcMoeCohere2ForTokenClassification,
    EcMoeCohere2ForQuestionAnswering,
)
