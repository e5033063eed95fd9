"""Cohere's Command R, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import CohereConfig, GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.cohere import modeling_cohere as dense

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
class EcMoeCohereConfig(EcMoeConfigMixin, CohereConfig):
    model_type = "ecmoe_cohere"
    dense_ffn = DenseFFN(norm="input_layernorm")


class EcMoeCohereDecoderLayer(EcMoeDecoderLayerMixin, dense.CohereDecoderLayer): ...


class EcMoeCoherePreTrainedModel(EcMoePreTrainedMixin, dense.CoherePreTrainedModel):
    config: EcMoeCohereConfig
    _no_split_modules = ["EcMoeCohereDecoderLayer"]
    _can_record_outputs = dense.CoherePreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeCohereModel(EcMoeModelMixin, EcMoeCoherePreTrainedModel, dense.CohereModel):
    decoder_layer_class = EcMoeCohereDecoderLayer


class EcMoeCohereForCausalLM(
    EcMoeForCausalLMMixin, EcMoeCoherePreTrainedModel, dense.CohereForCausalLM, GenerationMixin
):
    base_model_class = EcMoeCohereModel

    def scale_logits(self, logits: Tensor) -> Tensor:
        return logits * self.config.logit_scale


class EcMoeCohereForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeCoherePreTrainedModel
): ...


class EcMoeCohereForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeCoherePreTrainedModel): ...


class EcMoeCohereForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeCoherePreTrainedModel): ...


register_family(
    EcMoeCohereConfig,
    EcMoeCohereModel,
    EcMoeCohereForCausalLM,
    EcMoeCohereForSequenceClassification,
    EcMoeCohereForTokenClassification,
    EcMoeCohereForQuestionAnswering,
)
