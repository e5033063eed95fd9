"""OLMo-hybrid, linear and full attention mixed, with experts that choose their tokens."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, OlmoHybridConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.olmo_hybrid import modeling_olmo_hybrid as dense

from .auto_ecmoe import register_family
from .configuration_ecmoe import EcMoeConfigMixin
from .documents_ecmoe import ByDocument
from .mixins_ecmoe import (
    ROUTER_LOGITS,
    EcMoeDecoderLayerMixin,
    EcMoeForCausalLMMixin,
    EcMoeHeadMixin,
    EcMoeModelMixin,
    EcMoePreTrainedMixin,
)


@strict
class EcMoeOlmoHybridConfig(EcMoeConfigMixin, OlmoHybridConfig):
    model_type = "ecmoe_olmo_hybrid"

    def ffn_norm(self, layer: int) -> str | None:
        """Layers of linear attention have a norm before the FFN, those of full attention one after it."""
        return "post_attention_layernorm" if self.layer_types[layer] == "linear_attention" else None


class EcMoeOlmoHybridAttentionDecoderLayer(EcMoeDecoderLayerMixin, dense.OlmoHybridAttentionDecoderLayer): ...


class EcMoeOlmoHybridGatedDeltaNet(ByDocument, dense.OlmoHybridGatedDeltaNet): ...


class EcMoeOlmoHybridLinearAttentionDecoderLayer(EcMoeDecoderLayerMixin, dense.OlmoHybridLinearAttentionDecoderLayer):
    stateful_mixers = {"linear_attn": EcMoeOlmoHybridGatedDeltaNet}


class EcMoeOlmoHybridPreTrainedModel(EcMoePreTrainedMixin, dense.OlmoHybridPreTrainedModel):
    config: EcMoeOlmoHybridConfig
    _no_split_modules = ["EcMoeOlmoHybridAttentionDecoderLayer", "EcMoeOlmoHybridLinearAttentionDecoderLayer"]
    _can_record_outputs = dense.OlmoHybridPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeOlmoHybridModel(EcMoeModelMixin, EcMoeOlmoHybridPreTrainedModel, dense.OlmoHybridModel):
    carries_state = True

    @staticmethod
    def decoder_layer_class(config: Any, layer_idx: int) -> EcMoeDecoderLayerMixin:
        if config.layer_types[layer_idx] == "linear_attention":
            return EcMoeOlmoHybridLinearAttentionDecoderLayer(config, layer_idx)
        return EcMoeOlmoHybridAttentionDecoderLayer(config, layer_idx)


class EcMoeOlmoHybridForCausalLM(
    EcMoeForCausalLMMixin, EcMoeOlmoHybridPreTrainedModel, dense.OlmoHybridForCausalLM, GenerationMixin
):
    base_model_class = EcMoeOlmoHybridModel


class EcMoeOlmoHybridForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeOlmoHybridPreTrainedModel
): ...


class EcMoeOlmoHybridForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeOlmoHybridPreTrainedModel
): ...


class EcMoeOlmoHybridForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeOlmoHybridPreTrainedModel
): ...


register_family(
    EcMoeOlmoHybridConfig,
    EcMoeOlmoHybridModel,
    EcMoeOlmoHybridForCausalLM,
    EcMoeOlmoHybridForSequenceClassification,
    EcMoeOlmoHybridForTokenClassification,
    EcMoeOlmoHybridForQuestionAnswering,
)
