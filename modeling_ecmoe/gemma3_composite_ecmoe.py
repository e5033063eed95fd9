"""Gemma-3 that reads images, with experts in its text decoder that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin
from transformers.models.gemma3 import modeling_gemma3 as dense
from transformers.models.gemma3.configuration_gemma3 import Gemma3Config

from .auto_ecmoe import register_family
from .composites_ecmoe import (
    EcMoeCompositeConfigMixin,
    EcMoeCompositeModelMixin,
    EcMoeForConditionalGenerationMixin,
    hands_token_mask,
    with_router_losses,
)
from .gemma3_text_ecmoe import EcMoeGemma3TextConfig
from .mixins_ecmoe import EcMoePreTrainedMixin


@strict
class EcMoeGemma3Config(EcMoeCompositeConfigMixin, Gemma3Config):
    model_type = "ecmoe_gemma3"
    text_config_classes = (EcMoeGemma3TextConfig,)


class EcMoeGemma3PreTrainedModel(EcMoePreTrainedMixin, dense.Gemma3PreTrainedModel):
    config: EcMoeGemma3Config


class EcMoeGemma3Model(EcMoeCompositeModelMixin, EcMoeGemma3PreTrainedModel, dense.Gemma3Model):
    config: EcMoeGemma3Config
    forward = hands_token_mask(dense.Gemma3Model.forward)


class EcMoeGemma3ForConditionalGeneration(
    EcMoeForConditionalGenerationMixin,
    EcMoeGemma3PreTrainedModel,
    dense.Gemma3ForConditionalGeneration,
    GenerationMixin,
):
    config: EcMoeGemma3Config
    base_model_class = EcMoeGemma3Model
    forward = with_router_losses(dense.Gemma3ForConditionalGeneration.forward)


register_family(EcMoeGemma3Config, EcMoeGemma3Model, EcMoeGemma3ForConditionalGeneration)
