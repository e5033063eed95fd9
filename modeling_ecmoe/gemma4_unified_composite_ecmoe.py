"""Gemma-4-unified that reads images and sound, with experts in its text decoder that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin
from transformers.models.gemma4_unified import modeling_gemma4_unified as dense
from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedConfig

from .auto_ecmoe import register_family
from .composites_ecmoe import (
    EcMoeCompositeConfigMixin,
    EcMoeCompositeModelMixin,
    EcMoeForConditionalGenerationMixin,
    hands_token_mask,
    with_router_losses,
)
from .gemma4_unified_text_ecmoe import EcMoeGemma4UnifiedTextConfig
from .mixins_ecmoe import EcMoePreTrainedMixin


@strict
class EcMoeGemma4UnifiedConfig(EcMoeCompositeConfigMixin, Gemma4UnifiedConfig):
    model_type = "ecmoe_gemma4_unified"
    text_config_classes = (EcMoeGemma4UnifiedTextConfig,)


class EcMoeGemma4UnifiedPreTrainedModel(EcMoePreTrainedMixin, dense.Gemma4UnifiedPreTrainedModel):
    config: EcMoeGemma4UnifiedConfig


class EcMoeGemma4UnifiedModel(EcMoeCompositeModelMixin, EcMoeGemma4UnifiedPreTrainedModel, dense.Gemma4UnifiedModel):
    config: EcMoeGemma4UnifiedConfig
    forward = hands_token_mask(dense.Gemma4UnifiedModel.forward)


class EcMoeGemma4UnifiedForConditionalGeneration(
    EcMoeForConditionalGenerationMixin,
    EcMoeGemma4UnifiedPreTrainedModel,
    dense.Gemma4UnifiedForConditionalGeneration,
    GenerationMixin,
):
    config: EcMoeGemma4UnifiedConfig
    base_model_class = EcMoeGemma4UnifiedModel
    forward = with_router_losses(dense.Gemma4UnifiedForConditionalGeneration.forward)


register_family(EcMoeGemma4UnifiedConfig, EcMoeGemma4UnifiedModel, EcMoeGemma4UnifiedForConditionalGeneration)
