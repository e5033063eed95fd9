"""Gemma-4 that reads images and sound, with experts in its text decoder that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin
from transformers.models.gemma4 import modeling_gemma4 as dense
from transformers.models.gemma4.configuration_gemma4 import Gemma4Config

from .auto_ecmoe import register_family
from .composites_ecmoe import (
    EcMoeCompositeConfigMixin,
    EcMoeCompositeModelMixin,
    EcMoeForConditionalGenerationMixin,
    hands_token_mask,
    with_router_losses,
)
from .gemma4_text_ecmoe import EcMoeGemma4TextConfig
from .mixins_ecmoe import EcMoePreTrainedMixin


@strict
class EcMoeGemma4Config(EcMoeCompositeConfigMixin, Gemma4Config):
    model_type = "ecmoe_gemma4"
    text_config_classes = (EcMoeGemma4TextConfig,)


class EcMoeGemma4PreTrainedModel(EcMoePreTrainedMixin, dense.Gemma4PreTrainedModel):
    config: EcMoeGemma4Config


class EcMoeGemma4Model(EcMoeCompositeModelMixin, EcMoeGemma4PreTrainedModel, dense.Gemma4Model):
    config: EcMoeGemma4Config
    forward = hands_token_mask(dense.Gemma4Model.forward)


class EcMoeGemma4ForConditionalGeneration(
    EcMoeForConditionalGenerationMixin,
    EcMoeGemma4PreTrainedModel,
    dense.Gemma4ForConditionalGeneration,
    GenerationMixin,
):
    config: EcMoeGemma4Config
    base_model_class = EcMoeGemma4Model
    forward = with_router_losses(dense.Gemma4ForConditionalGeneration.forward)


register_family(EcMoeGemma4Config, EcMoeGemma4Model, EcMoeGemma4ForConditionalGeneration)
