"""Nemotron, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, NemotronConfig
from transformers.models.nemotron import modeling_nemotron as dense

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
class EcMoeNemotronConfig(EcMoeConfigMixin, NemotronConfig):
    model_type = "ecmoe_nemotron"
    dense_ffn = DenseFFN(into=("up_proj",), has_gate=False, has_bias="mlp_bias", norm_adds_one=True)


class EcMoeNemotronDecoderLayer(EcMoeDecoderLayerMixin, dense.NemotronDecoderLayer): ...


class EcMoeNemotronPreTrainedModel(EcMoePreTrainedMixin, dense.NemotronPreTrainedModel):
    config: EcMoeNemotronConfig
    _no_split_modules = ["EcMoeNemotronDecoderLayer"]
    _can_record_outputs = dense.NemotronPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeNemotronModel(EcMoeModelMixin, EcMoeNemotronPreTrainedModel, dense.NemotronModel):
    decoder_layer_class = EcMoeNemotronDecoderLayer


class EcMoeNemotronForCausalLM(
    EcMoeForCausalLMMixin, EcMoeNemotronPreTrainedModel, dense.NemotronForCausalLM, GenerationMixin
):
    base_model_class = EcMoeNemotronModel


class EcMoeNemotronForSequenceClassification(
    EcMoeHeadMixin, EcMoeNemotronPreTrainedModel, dense.NemotronForSequenceClassification
): ...


class EcMoeNemotronForTokenClassification(
    EcMoeHeadMixin, EcMoeNemotronPreTrainedModel, dense.NemotronForTokenClassification
): ...


class EcMoeNemotronForQuestionAnswering(
    EcMoeHeadMixin, EcMoeNemotronPreTrainedModel, dense.NemotronForQuestionAnswering
): ...


register_family(
    EcMoeNemotronConfig,
    EcMoeNemotronModel,
    EcMoeNemotronForCausalLM,
    EcMoeNemotronForSequenceClassification,
    EcMoeNemotronForTokenClassification,
    EcMoeNemotronForQuestionAnswering,
)
