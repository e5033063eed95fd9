"""StableLM, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, StableLmConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.stablelm import modeling_stablelm as dense

from .auto_ecmoe import register_family
from .configuration_ecmoe import DenseFFN, EcMoeConfigMixin
from .mixins_ecmoe import (
    ROUTER_LOGITS,
    EcMoeDecoderLayerMixin,
    EcMoeForCausalLMMixin,
    EcMoeHeadMixin,
    EcMoeModelMixin,
    EcMoePreTrainedMixin,
)


@strict
class EcMoeStableLmConfig(EcMoeConfigMixin, StableLmConfig):
    model_type = "ecmoe_stablelm"

    @property
    def dense_ffn(self) -> DenseFFN:  # type: ignore[override]
        return DenseFFN(norm="input_layernorm" if self.use_parallel_residual else "post_attention_layernorm")


class EcMoeStableLmDecoderLayer(EcMoeDecoderLayerMixin, dense.StableLmDecoderLayer): ...


class EcMoeStableLmPreTrainedModel(EcMoePreTrainedMixin, dense.StableLmPreTrainedModel):
    config: EcMoeStableLmConfig
    _no_split_modules = ["EcMoeStableLmDecoderLayer"]
    _can_record_outputs = dense.StableLmPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeStableLmModel(EcMoeModelMixin, EcMoeStableLmPreTrainedModel, dense.StableLmModel):
    decoder_layer_class = EcMoeStableLmDecoderLayer


class EcMoeStableLmForCausalLM(
    EcMoeForCausalLMMixin, EcMoeStableLmPreTrainedModel, dense.StableLmForCausalLM, GenerationMixin
):
    base_model_class = EcMoeStableLmModel


class EcMoeStableLmForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeStableLmPreTrainedModel
): ...


class EcMoeStableLmForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeStableLmPreTrainedModel
): ...


class EcMoeStableLmForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeStableLmPreTrainedModel): ...


register_family(
    EcMoeStableLmConfig,
    EcMoeStableLmModel,
    EcMoeStableLmForCausalLM,
    EcMoeStableLmForSequenceClassification,
    EcMoeStableLmForTokenClassification,
    EcMoeStableLmForQuestionAnswering,
)
