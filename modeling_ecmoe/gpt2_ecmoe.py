"""GPT-2, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, GPT2Config
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.gpt2 import modeling_gpt2 as dense

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
class EcMoeGPT2Config(EcMoeConfigMixin, GPT2Config):
    model_type = "ecmoe_gpt2"
    attribute_map = GPT2Config.attribute_map | {"intermediate_size": "n_inner", "hidden_act": "activation_function"}
    dense_ffn = DenseFFN(
        into=("c_fc",),
        out="c_proj",
        has_gate=False,
        has_bias=True,
        dropout="resid_pdrop",
        norm="ln_2",
        layers="h",
        is_transposed=True,
        has_class=False,
    )


class EcMoeGPT2DecoderLayer(EcMoeDecoderLayerMixin, dense.GPT2Block): ...


class EcMoeGPT2PreTrainedModel(EcMoePreTrainedMixin, dense.GPT2PreTrainedModel):
    config: EcMoeGPT2Config
    _no_split_modules = ["EcMoeGPT2DecoderLayer"]
    base_model_prefix = "transformer"
    supports_pipeline = False  # the pipeline looks for embed_tokens, layers and norm, which have other names here
    _can_record_outputs = {
        name: recorded
        for name, recorded in dense.GPT2PreTrainedModel._can_record_outputs.items()
        if name != "cross_attentions"  # the converter refuses a decoder that looks at an encoder
    } | ROUTER_LOGITS


class EcMoeGPT2Model(EcMoeModelMixin, EcMoeGPT2PreTrainedModel, dense.GPT2Model):
    decoder_layer_class = EcMoeGPT2DecoderLayer


class EcMoeGPT2ForCausalLM(EcMoeForCausalLMMixin, EcMoeGPT2PreTrainedModel, dense.GPT2LMHeadModel, GenerationMixin):
    base_model_class = EcMoeGPT2Model


class EcMoeGPT2ForSequenceClassification(EcMoeHeadMixin, GenericForSequenceClassification, EcMoeGPT2PreTrainedModel):
    base_model_prefix = "transformer"


class EcMoeGPT2ForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeGPT2PreTrainedModel):
    base_model_prefix = "transformer"


class EcMoeGPT2ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGPT2PreTrainedModel):
    base_model_prefix = "transformer"


register_family(
    EcMoeGPT2Config,
    EcMoeGPT2Model,
    EcMoeGPT2ForCausalLM,
    EcMoeGPT2ForSequenceClassification,
    EcMoeGPT2ForTokenClassification,
    EcMoeGPT2ForQuestionAnswering,
)
