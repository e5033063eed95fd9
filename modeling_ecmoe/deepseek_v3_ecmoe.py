"""DeepSeek-V3, with experts that choose their tokens; the dense class is a mixture whose tokens choose."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV3Config, GenerationMixin, LlamaConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as dense

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
class EcMoeDeepseekV3Config(EcMoeConfigMixin, LlamaConfig):
    model_type = "ecmoe_deepseek_v3"
    """The layers that have no experts are the dense class's; it builds all of them so, and ours put experts in."""

    base_model_tp_plan = {
        name: style for name, style in DeepseekV3Config.base_model_tp_plan.items() if "experts" not in name
    }
    base_model_pp_plan = DeepseekV3Config.base_model_pp_plan

    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int | None = 128
    qk_nope_head_dim: int = 128
    rope_interleave: bool | None = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.head_dim = self.qk_rope_head_dim
        super().__post_init__(**kwargs)

    @property
    def first_k_dense_replace(self) -> int:
        """Read by the layer, to which all are dense."""
        return self.num_hidden_layers


class EcMoeDeepseekV3DecoderLayer(EcMoeDecoderLayerMixin, dense.DeepseekV3DecoderLayer): ...


class EcMoeDeepseekV3PreTrainedModel(EcMoePreTrainedMixin, dense.DeepseekV3PreTrainedModel):
    config: EcMoeDeepseekV3Config
    _no_split_modules = ["EcMoeDeepseekV3DecoderLayer"]
    _can_record_outputs = dense.DeepseekV3PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeDeepseekV3Model(EcMoeModelMixin, EcMoeDeepseekV3PreTrainedModel, dense.DeepseekV3Model):
    decoder_layer_class = EcMoeDeepseekV3DecoderLayer


class EcMoeDeepseekV3ForCausalLM(
    EcMoeForCausalLMMixin, EcMoeDeepseekV3PreTrainedModel, dense.DeepseekV3ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeDeepseekV3Model


class EcMoeDeepseekV3ForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeDeepseekV3PreTrainedModel
): ...


class EcMoeDeepseekV3ForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeDeepseekV3PreTrainedModel
): ...


class EcMoeDeepseekV3ForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeDeepseekV3PreTrainedModel
): ...


register_family(
    EcMoeDeepseekV3Config,
    EcMoeDeepseekV3Model,
    EcMoeDeepseekV3ForCausalLM,
    EcMoeDeepseekV3ForSequenceClassification,
    EcMoeDeepseekV3ForTokenClassification,
    EcMoeDeepseekV3ForQuestionAnswering,
)
