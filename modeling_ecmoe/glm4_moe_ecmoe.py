"""GLM-4-MoE, with experts that choose their tokens; the dense class is a mixture whose tokens choose."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Glm4MoeConfig, LlamaConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.glm4_moe import modeling_glm4_moe as dense

from .auto_ecmoe import register_family
from .configuration_ecmoe import EcMoeConfigMixin
from .mixins_ecmoe import (
    ROUTER_LOGITS,
    EcMoeDecoderLayerMixin,
    EcMoeForCausalLMMixin,
    EcMoeHeadMixin,
    EcMoeModelMixin,
    EcMoePreTrainedMixin,
)


@strict
class EcMoeGlm4MoeConfig(EcMoeConfigMixin, LlamaConfig):
    model_type = "ecmoe_glm4_moe"
    """The layers that have no experts are the dense class's; it builds all of them so, and ours put experts in."""

    base_model_tp_plan = {
        name: style for name, style in Glm4MoeConfig.base_model_tp_plan.items() if "experts" not in name
    }
    base_model_pp_plan = Glm4MoeConfig.base_model_pp_plan

    attention_bias: bool = False
    use_qk_norm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("partial_rotary_factor", 0.5)  # as Glm4MoeConfig
        super().__post_init__(**kwargs)

    @property
    def first_k_dense_replace(self) -> int:
        """Read by the layer, to which all are dense."""
        return self.num_hidden_layers


class EcMoeGlm4MoeDecoderLayer(EcMoeDecoderLayerMixin, dense.Glm4MoeDecoderLayer): ...


class EcMoeGlm4MoePreTrainedModel(EcMoePreTrainedMixin, dense.Glm4MoePreTrainedModel):
    config: EcMoeGlm4MoeConfig
    _no_split_modules = ["EcMoeGlm4MoeDecoderLayer"]
    _can_record_outputs = dense.Glm4MoePreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeGlm4MoeModel(EcMoeModelMixin, EcMoeGlm4MoePreTrainedModel, dense.Glm4MoeModel):
    decoder_layer_class = EcMoeGlm4MoeDecoderLayer


class EcMoeGlm4MoeForCausalLM(
    EcMoeForCausalLMMixin, EcMoeGlm4MoePreTrainedModel, dense.Glm4MoeForCausalLM, GenerationMixin
):
    base_model_class = EcMoeGlm4MoeModel


class EcMoeGlm4MoeForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeGlm4MoePreTrainedModel
): ...


class EcMoeGlm4MoeForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeGlm4MoePreTrainedModel
): ...


class EcMoeGlm4MoeForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGlm4MoePreTrainedModel): ...


register_family(
    EcMoeGlm4MoeConfig,
    EcMoeGlm4MoeModel,
    EcMoeGlm4MoeForCausalLM,
    EcMoeGlm4MoeForSequenceClassification,
    EcMoeGlm4MoeForTokenClassification,
    EcMoeGlm4MoeForQuestionAnswering,
)
