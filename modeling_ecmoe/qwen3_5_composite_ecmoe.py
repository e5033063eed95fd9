"""Qwen3.5, with experts in its text decoder that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config

from .auto_ecmoe import register_family
from .composites_ecmoe import (
    EcMoeCompositeConfigMixin,
    EcMoeCompositeModelMixin,
    EcMoeForConditionalGenerationMixin,
    with_router_losses,
)
from .mixins_ecmoe import EcMoePreTrainedMixin
from .qwen3_5_text_ecmoe import EcMoeQwen3_5TextConfig


@strict
class EcMoeQwen3_5Config(EcMoeCompositeConfigMixin, Qwen3_5Config):
    model_type = "ecmoe_qwen3_5"
    text_config_classes = (EcMoeQwen3_5TextConfig,)


class EcMoeQwen3_5PreTrainedModel(EcMoePreTrainedMixin, dense.Qwen3_5PreTrainedModel):
    config: EcMoeQwen3_5Config


class EcMoeQwen3_5Model(EcMoeCompositeModelMixin, EcMoeQwen3_5PreTrainedModel, dense.Qwen3_5Model):
    config: EcMoeQwen3_5Config


class EcMoeQwen3_5ForConditionalGeneration(
    EcMoeForConditionalGenerationMixin,
    EcMoeQwen3_5PreTrainedModel,
    dense.Qwen3_5ForConditionalGeneration,
    GenerationMixin,
):
    config: EcMoeQwen3_5Config
    base_model_class = EcMoeQwen3_5Model
    forward = with_router_losses(dense.Qwen3_5ForConditionalGeneration.forward)


register_family(EcMoeQwen3_5Config, EcMoeQwen3_5Model, EcMoeQwen3_5ForConditionalGeneration)
