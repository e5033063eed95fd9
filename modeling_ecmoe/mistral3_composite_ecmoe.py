"""Mistral-3 that reads images, with experts in its text decoder that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Mistral3Config
from transformers.models.mistral3 import modeling_mistral3 as dense

from .auto_ecmoe import register_family
from .composites_ecmoe import (
    EcMoeCompositeConfigMixin,
    EcMoeCompositeModelMixin,
    EcMoeForConditionalGenerationMixin,
    with_router_losses,
)
from .mistral_ecmoe import EcMoeMistralConfig
from .mixins_ecmoe import EcMoePreTrainedMixin


@strict
class EcMoeMistral3Config(EcMoeCompositeConfigMixin, Mistral3Config):
    model_type = "ecmoe_mistral3"
    text_config_classes = (EcMoeMistralConfig,)


class EcMoeMistral3PreTrainedModel(EcMoePreTrainedMixin, dense.Mistral3PreTrainedModel):
    config: EcMoeMistral3Config


class EcMoeMistral3Model(EcMoeCompositeModelMixin, EcMoeMistral3PreTrainedModel, dense.Mistral3Model): ...


class EcMoeMistral3ForConditionalGeneration(
    EcMoeForConditionalGenerationMixin,
    EcMoeMistral3PreTrainedModel,
    dense.Mistral3ForConditionalGeneration,
    GenerationMixin,
):
    base_model_class = EcMoeMistral3Model
    forward = with_router_losses(dense.Mistral3ForConditionalGeneration.forward)


register_family(EcMoeMistral3Config, EcMoeMistral3Model, EcMoeMistral3ForConditionalGeneration)
