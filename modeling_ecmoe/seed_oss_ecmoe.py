"""Seed-OSS, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, SeedOssConfig
from transformers.models.seed_oss import modeling_seed_oss as dense

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
class EcMoeSeedOssConfig(EcMoeConfigMixin, SeedOssConfig):
    model_type = "ecmoe_seed_oss"
    dense_ffn = DenseFFN(has_bias="mlp_bias", dropout="residual_dropout")


class EcMoeSeedOssDecoderLayer(EcMoeDecoderLayerMixin, dense.SeedOssDecoderLayer): ...


class EcMoeSeedOssPreTrainedModel(EcMoePreTrainedMixin, dense.SeedOssPreTrainedModel):
    config: EcMoeSeedOssConfig
    _no_split_modules = ["EcMoeSeedOssDecoderLayer"]
    _can_record_outputs = dense.SeedOssPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeSeedOssModel(EcMoeModelMixin, EcMoeSeedOssPreTrainedModel, dense.SeedOssModel):
    decoder_layer_class = EcMoeSeedOssDecoderLayer


class EcMoeSeedOssForCausalLM(
    EcMoeForCausalLMMixin, EcMoeSeedOssPreTrainedModel, dense.SeedOssForCausalLM, GenerationMixin
):
    base_model_class = EcMoeSeedOssModel


class EcMoeSeedOssForSequenceClassification(
    EcMoeHeadMixin, EcMoeSeedOssPreTrainedModel, dense.SeedOssForSequenceClassification
): ...


class EcMoeSeedOssForTokenClassification(
    EcMoeHeadMixin, EcMoeSeedOssPreTrainedModel, dense.SeedOssForTokenClassification
): ...


class EcMoeSeedOssForQuestionAnswering(
    EcMoeHeadMixin, EcMoeSeedOssPreTrainedModel, dense.SeedOssForQuestionAnswering
): ...


register_family(
    EcMoeSeedOssConfig,
    EcMoeSeedOssModel,
    EcMoeSeedOssForCausalLM,
    EcMoeSeedOssForSequenceClassification,
    EcMoeSeedOssForTokenClassification,
    EcMoeSeedOssForQuestionAnswering,
)
