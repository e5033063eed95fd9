"""Granite with sliding windows, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import GenerationMixin, GraniteSWAConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.granite_swa import modeling_granite_swa as dense

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
class EcMoeGraniteSWAConfig(EcMoeConfigMixin, GraniteSWAConfig):
    model_type = "ecmoe_granite_swa"
    dense_ffn = DenseFFN(has_bias="mlp_bias")


class EcMoeGraniteSWADecoderLayer(EcMoeDecoderLayerMixin, dense.GraniteSWADecoderLayer): ...


class EcMoeGraniteSWAPreTrainedModel(EcMoePreTrainedMixin, dense.GraniteSWAPreTrainedModel):
    config: EcMoeGraniteSWAConfig
    _no_split_modules = ["EcMoeGraniteSWADecoderLayer"]
    supports_pipeline = False  # every stage would scale by embedding_multiplier again
    _can_record_outputs = dense.GraniteSWAPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeGraniteSWAModel(EcMoeModelMixin, EcMoeGraniteSWAPreTrainedModel, dense.GraniteSWAModel):
    decoder_layer_class = EcMoeGraniteSWADecoderLayer


class EcMoeGraniteSWAForCausalLM(
    EcMoeForCausalLMMixin, EcMoeGraniteSWAPreTrainedModel, dense.GraniteSWAForCausalLM, GenerationMixin
):
    base_model_class = EcMoeGraniteSWAModel

    def scale_logits(self, logits: Tensor) -> Tensor:
        return logits / self.config.logits_scaling


class EcMoeGraniteSWAForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeGraniteSWAPreTrainedModel
): ...


class EcMoeGraniteSWAForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeGraniteSWAPreTrainedModel
): ...


class EcMoeGraniteSWAForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGraniteSWAPreTrainedModel
): ...


register_family(
    EcMoeGraniteSWAConfig,
    EcMoeGraniteSWAModel,
    EcMoeGraniteSWAForCausalLM,
    EcMoeGraniteSWAForSequenceClassification,
    EcMoeGraniteSWAForTokenClassification,
    EcMoeGraniteSWAForQuestionAnswering,
)
