"""GPT-NeoX and Pythia, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, GPTNeoXConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.gpt_neox import modeling_gpt_neox as dense

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
class EcMoeGPTNeoXConfig(EcMoeConfigMixin, GPTNeoXConfig):
    model_type = "ecmoe_gpt_neox"
    dense_ffn = DenseFFN(into=("dense_h_to_4h",), out="dense_4h_to_h", has_gate=False, has_bias=True)


class EcMoeGPTNeoXDecoderLayer(EcMoeDecoderLayerMixin, dense.GPTNeoXLayer): ...


class EcMoeGPTNeoXPreTrainedModel(EcMoePreTrainedMixin, dense.GPTNeoXPreTrainedModel):
    config: EcMoeGPTNeoXConfig
    _no_split_modules = ["EcMoeGPTNeoXDecoderLayer"]
    supports_pipeline = False  # the pipeline looks for embed_tokens and norm, which have other names here
    _can_record_outputs = dense.GPTNeoXPreTrainedModel._can_record_outputs | ROUTER_LOGITS
    base_model_prefix = "gpt_neox"


class EcMoeGPTNeoXModel(EcMoeModelMixin, EcMoeGPTNeoXPreTrainedModel, dense.GPTNeoXModel):
    decoder_layer_class = EcMoeGPTNeoXDecoderLayer


class EcMoeGPTNeoXForCausalLM(
    EcMoeForCausalLMMixin, EcMoeGPTNeoXPreTrainedModel, dense.GPTNeoXForCausalLM, GenerationMixin
):
    base_model_class = EcMoeGPTNeoXModel


class EcMoeGPTNeoXForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeGPTNeoXPreTrainedModel
):
    base_model_prefix = "gpt_neox"


class EcMoeGPTNeoXForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeGPTNeoXPreTrainedModel):
    base_model_prefix = "gpt_neox"


class EcMoeGPTNeoXForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGPTNeoXPreTrainedModel):
    base_model_prefix = "gpt_neox"


register_family(
    EcMoeGPTNeoXConfig,
    EcMoeGPTNeoXModel,
    EcMoeGPTNeoXForCausalLM,
    EcMoeGPTNeoXForSequenceClassification,
    EcMoeGPTNeoXForTokenClassification,
    EcMoeGPTNeoXForQuestionAnswering,
)
