"""OLMoE, with experts that choose their tokens; the dense class is a mixture whose tokens choose."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, LlamaConfig, OlmoeConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.olmoe import modeling_olmoe as dense

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
class EcMoeOlmoeConfig(EcMoeConfigMixin, LlamaConfig):
    model_type = "ecmoe_olmoe"
    attribute_map = {"num_local_experts": "num_experts"}
    base_model_tp_plan = {name: style for name, style in OlmoeConfig.base_model_tp_plan.items() if ".mlp." not in name}

    clip_qkv: float | None = None

    @property
    def norm_topk_prob(self) -> bool:
        """Read by the block that gives way to ours."""
        return self.normalize_combine_weights


class EcMoeOlmoeDecoderLayer(EcMoeDecoderLayerMixin, dense.OlmoeDecoderLayer):
    ffn_class = dense.OlmoeMLP


class EcMoeOlmoePreTrainedModel(EcMoePreTrainedMixin, dense.OlmoePreTrainedModel):
    config: EcMoeOlmoeConfig
    _no_split_modules = ["EcMoeOlmoeDecoderLayer"]
    _can_record_outputs = dense.OlmoePreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeOlmoeModel(EcMoeModelMixin, EcMoeOlmoePreTrainedModel, dense.OlmoeModel):
    decoder_layer_class = EcMoeOlmoeDecoderLayer


class EcMoeOlmoeForCausalLM(EcMoeForCausalLMMixin, EcMoeOlmoePreTrainedModel, dense.OlmoeForCausalLM, GenerationMixin):
    base_model_class = EcMoeOlmoeModel


class EcMoeOlmoeForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeOlmoePreTrainedModel
): ...


class EcMoeOlmoeForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeOlmoePreTrainedModel): ...


class EcMoeOlmoeForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeOlmoePreTrainedModel): ...


register_family(
    EcMoeOlmoeConfig,
    EcMoeOlmoeModel,
    EcMoeOlmoeForCausalLM,
    EcMoeOlmoeForSequenceClassification,
    EcMoeOlmoeForTokenClassification,
    EcMoeOlmoeForQuestionAnswering,
)
