"""GPT-BigCode (SantaCoder, StarCoder), with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, GPTBigCodeConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.gpt_bigcode import modeling_gpt_bigcode as dense

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
class EcMoeGPTBigCodeConfig(EcMoeConfigMixin, GPTBigCodeConfig):
    model_type = "ecmoe_gpt_bigcode"
    attribute_map = GPTBigCodeConfig.attribute_map | {
        "intermediate_size": "n_inner",
        "hidden_act": "activation_function",
    }
    dense_ffn = DenseFFN(
        into=("c_fc",),
        out="c_proj",
        has_gate=False,
        has_bias=True,
        dropout="resid_pdrop",
        norm="ln_2",
        layers="h",
        has_class=False,
    )


class EcMoeGPTBigCodeDecoderLayer(EcMoeDecoderLayerMixin, dense.GPTBigCodeBlock): ...


class EcMoeGPTBigCodePreTrainedModel(EcMoePreTrainedMixin, dense.GPTBigCodePreTrainedModel):
    config: EcMoeGPTBigCodeConfig
    _no_split_modules = ["EcMoeGPTBigCodeDecoderLayer"]
    base_model_prefix = "transformer"
    supports_pipeline = False  # the pipeline looks for embed_tokens, layers and norm, which have other names here
    _can_record_outputs = {
        name: recorded
        for name, recorded in dense.GPTBigCodePreTrainedModel._can_record_outputs.items()
        if name != "cross_attentions"  # the converter refuses a decoder that looks at an encoder
    } | ROUTER_LOGITS


class EcMoeGPTBigCodeModel(EcMoeModelMixin, EcMoeGPTBigCodePreTrainedModel, dense.GPTBigCodeModel):
    decoder_layer_class = EcMoeGPTBigCodeDecoderLayer


class EcMoeGPTBigCodeForCausalLM(
    EcMoeForCausalLMMixin, EcMoeGPTBigCodePreTrainedModel, dense.GPTBigCodeForCausalLM, GenerationMixin
):
    base_model_class = EcMoeGPTBigCodeModel


class EcMoeGPTBigCodeForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeGPTBigCodePreTrainedModel
):
    base_model_prefix = "transformer"


class EcMoeGPTBigCodeForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeGPTBigCodePreTrainedModel
):
    base_model_prefix = "transformer"


class EcMoeGPTBigCodeForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGPTBigCodePreTrainedModel):
    base_model_prefix = "transformer"


register_family(
    EcMoeGPTBigCodeConfig,
    EcMoeGPTBigCodeModel,
    EcMoeGPTBigCodeForCausalLM,
    EcMoeGPTBigCodeForSequenceClassification,
    EcMoeGPTBigCodeForTokenClassification,
    EcMoeGPTBigCodeForQuestionAnswering,
)
