"""NanoChat, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, NanoChatConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.nanochat import modeling_nanochat as dense

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
from .variants_ecmoe import SoftcappedLogits


@strict
class EcMoeNanoChatConfig(EcMoeConfigMixin, NanoChatConfig):
    model_type = "ecmoe_nanochat"
    dense_ffn = DenseFFN(into=("fc1",), out="fc2", has_gate=False)


class EcMoeNanoChatDecoderLayer(EcMoeDecoderLayerMixin, dense.NanoChatDecoderLayer): ...


class EcMoeNanoChatPreTrainedModel(EcMoePreTrainedMixin, dense.NanoChatPreTrainedModel):
    config: EcMoeNanoChatConfig
    _no_split_modules = ["EcMoeNanoChatDecoderLayer"]
    supports_pipeline = False  # every stage would normalise its input again
    _can_record_outputs = dense.NanoChatPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeNanoChatModel(EcMoeModelMixin, EcMoeNanoChatPreTrainedModel, dense.NanoChatModel):
    decoder_layer_class = EcMoeNanoChatDecoderLayer


class EcMoeNanoChatForCausalLM(
    SoftcappedLogits, EcMoeForCausalLMMixin, EcMoeNanoChatPreTrainedModel, dense.NanoChatForCausalLM, GenerationMixin
):
    base_model_class = EcMoeNanoChatModel


class EcMoeNanoChatForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeNanoChatPreTrainedModel
): ...


class EcMoeNanoChatForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeNanoChatPreTrainedModel
): ...


class EcMoeNanoChatForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeNanoChatPreTrainedModel): ...


register_family(
    EcMoeNanoChatConfig,
    EcMoeNanoChatModel,
    EcMoeNanoChatForCausalLM,
    EcMoeNanoChatForSequenceClassification,
    EcMoeNanoChatForTokenClassification,
    EcMoeNanoChatForQuestionAnswering,
)
