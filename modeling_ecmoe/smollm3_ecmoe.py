"""SmolLM3, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, SmolLM3Config
from transformers.models.smollm3 import modeling_smollm3 as dense

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
class EcMoeSmolLM3Config(EcMoeConfigMixin, SmolLM3Config):
    model_type = "ecmoe_smollm3"
    dense_ffn = DenseFFN(has_bias="mlp_bias")


class EcMoeSmolLM3DecoderLayer(EcMoeDecoderLayerMixin, dense.SmolLM3DecoderLayer): ...


class EcMoeSmolLM3PreTrainedModel(EcMoePreTrainedMixin, dense.SmolLM3PreTrainedModel):
    config: EcMoeSmolLM3Config
    _no_split_modules = ["EcMoeSmolLM3DecoderLayer"]
    _can_record_outputs = dense.SmolLM3PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeSmolLM3Model(EcMoeModelMixin, EcMoeSmolLM3PreTrainedModel, dense.SmolLM3Model):
    decoder_layer_class = EcMoeSmolLM3DecoderLayer


class EcMoeSmolLM3ForCausalLM(
    EcMoeForCausalLMMixin, EcMoeSmolLM3PreTrainedModel, dense.SmolLM3ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeSmolLM3Model


class EcMoeSmolLM3ForSequenceClassification(
    EcMoeHeadMixin, EcMoeSmolLM3PreTrainedModel, dense.SmolLM3ForSequenceClassification
): ...


class EcMoeSmolLM3ForTokenClassification(
    EcMoeHeadMixin, EcMoeSmolLM3PreTrainedModel, dense.SmolLM3ForTokenClassification
): ...


class EcMoeSmolLM3ForQuestionAnswering(
    EcMoeHeadMixin, EcMoeSmolLM3PreTrainedModel, dense.SmolLM3ForQuestionAnswering
): ...


register_family(
    EcMoeSmolLM3Config,
    EcMoeSmolLM3Model,
    EcMoeSmolLM3ForCausalLM,
    EcMoeSmolLM3ForSequenceClassification,
    EcMoeSmolLM3ForTokenClassification,
    EcMoeSmolLM3ForQuestionAnswering,
)
