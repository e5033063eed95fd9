"""LLaVA, with experts in its text decoder that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin
from transformers.models.llava import modeling_llava as dense
from transformers.models.llava.configuration_llava import LlavaConfig

from .auto_ecmoe import register_family
from .composites_ecmoe import (
    EcMoeCompositeConfigMixin,
    EcMoeCompositeModelMixin,
    EcMoeForConditionalGenerationMixin,
    with_router_losses,
)
from .llama_ecmoe import EcMoeLlamaConfig
from .mistral_ecmoe import EcMoeMistralConfig
from .mixins_ecmoe import EcMoePreTrainedMixin
from .qwen2_ecmoe import EcMoeQwen2Config
from .qwen3_ecmoe import EcMoeQwen3Config


@strict
class EcMoeLlavaConfig(EcMoeCompositeConfigMixin, LlavaConfig):
    model_type = "ecmoe_llava"
    text_config_classes = (
        EcMoeLlamaConfig,
        EcMoeMistralConfig,
        EcMoeQwen2Config,
        EcMoeQwen3Config,
    )


class EcMoeLlavaPreTrainedModel(EcMoePreTrainedMixin, dense.LlavaPreTrainedModel):
    config: EcMoeLlavaConfig


class EcMoeLlavaModel(EcMoeCompositeModelMixin, EcMoeLlavaPreTrainedModel, dense.LlavaModel):
    config: EcMoeLlavaConfig


class EcMoeLlavaForConditionalGeneration(
    EcMoeForConditionalGenerationMixin,
    EcMoeLlavaPreTrainedModel,
    dense.LlavaForConditionalGeneration,
    GenerationMixin,
):
    config: EcMoeLlavaConfig
    base_model_class = EcMoeLlavaModel
    forward = with_router_losses(dense.LlavaForConditionalGeneration.forward)


register_family(EcMoeLlavaConfig, EcMoeLlavaModel, EcMoeLlavaForConditionalGeneration)
