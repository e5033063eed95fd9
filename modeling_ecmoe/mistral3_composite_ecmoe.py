"""Mistral-3 and Ministral-3 that read images, with experts in its text decoder that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin
from transformers.models.mistral3 import modeling_mistral3 as dense
from transformers.models.mistral3.configuration_mistral3 import Mistral3Config

from .auto_ecmoe import register_family
from .composites_ecmoe import (
    EcMoeCompositeConfigMixin,
    EcMoeCompositeModelMixin,
    EcMoeForConditionalGenerationMixin,
    with_router_losses,
)
from .ministral3_ecmoe import EcMoeMinistral3Config
from .mistral_ecmoe import EcMoeMistralConfig
from .mixins_ecmoe import EcMoePreTrainedMixin


@strict
class EcMoeMistral3Config(EcMoeCompositeConfigMixin, Mistral3Config):
    model_type = "ecmoe_mistral3"
    text_config_classes = (
        EcMoeMistralConfig,
        EcMoeMinistral3Config,
    )


class EcMoeMistral3PreTrainedModel(EcMoePreTrainedMixin, dense.Mistral3PreTrainedModel):
    config: EcMoeMistral3Config


class EcMoeMistral3Model(EcMoeCompositeModelMixin, EcMoeMistral3PreTrainedModel, dense.Mistral3Model):
    config: EcMoeMistral3Config


class EcMoeMistral3ForConditionalGeneration(
    EcMoeForConditionalGenerationMixin,
    EcMoeMistral3PreTrainedModel,
    dense.Mistral3ForConditionalGeneration,
    GenerationMixin,
):
    config: EcMoeMistral3Config
    base_model_class = EcMoeMistral3Model
    forward = with_router_losses(dense.Mistral3ForConditionalGeneration.forward)


register_family(EcMoeMistral3Config, EcMoeMistral3Model, EcMoeMistral3ForConditionalGeneration)
