"""Granite, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import GenerationMixin, GraniteConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.granite import modeling_granite as dense

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
class EcMoeGraniteConfig(EcMoeConfigMixin, GraniteConfig):
    model_type = "ecmoe_granite"
    dense_ffn = DenseFFN(has_bias="mlp_bias")


class EcMoeGraniteDecoderLayer(EcMoeDecoderLayerMixin, dense.GraniteDecoderLayer): ...


class EcMoeGranitePreTrainedModel(EcMoePreTrainedMixin, dense.GranitePreTrainedModel):
    config: EcMoeGraniteConfig
    _no_split_modules = ["EcMoeGraniteDecoderLayer"]
    supports_pipeline = False  # every stage would scale by embedding_multiplier again
    _can_record_outputs = dense.GranitePreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeGraniteModel(EcMoeModelMixin, EcMoeGranitePreTrainedModel, dense.GraniteModel):
    decoder_layer_class = EcMoeGraniteDecoderLayer


class EcMoeGraniteForCausalLM(
    EcMoeForCausalLMMixin, EcMoeGranitePreTrainedModel, dense.GraniteForCausalLM, GenerationMixin
):
    base_model_class = EcMoeGraniteModel

    def scale_logits(self, logits: Tensor) -> Tensor:
        return logits / self.config.logits_scaling


class EcMoeGraniteForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeGranitePreTrainedModel
): ...


class EcMoeGraniteForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeGranitePreTrainedModel
): ...


class EcMoeGraniteForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGranitePreTrainedModel): ...


register_family(
    EcMoeGraniteConfig,
    EcMoeGraniteModel,
    EcMoeGraniteForCausalLM,
    EcMoeGraniteForSequenceClassification,
    EcMoeGraniteForTokenClassification,
    EcMoeGraniteForQuestionAnswering,
)
