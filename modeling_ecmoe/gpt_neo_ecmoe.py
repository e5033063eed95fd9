"""GPT-Neo, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, GPTNeoConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.gpt_neo import modeling_gpt_neo as dense

from .auto_ecmoe import register_family
from .configuration_ecmoe import DenseFFN, EcMoeConfigMixin
from .mixins_ecmoe import (
    EcMoeForCausalLMMixin,
    EcMoeHeadMixin,
    EcMoeModelMixin,
    EcMoePreTrainedMixin,
)
from .variants_ecmoe import EcMoeAloofDecoderLayerMixin, RecordedForward, recorded_of


@strict
class EcMoeGPTNeoConfig(EcMoeConfigMixin, GPTNeoConfig):
    model_type = "ecmoe_gpt_neo"
    attribute_map = GPTNeoConfig.attribute_map | {"hidden_act": "activation_function"}
    dense_ffn = DenseFFN(
        into=("c_fc",),
        out="c_proj",
        has_gate=False,
        has_bias=True,
        dropout="resid_dropout",
        norm="ln_2",
        layers="h",
        has_class=False,
    )


class EcMoeGPTNeoDecoderLayer(EcMoeAloofDecoderLayerMixin, dense.GPTNeoBlock): ...


class EcMoeGPTNeoPreTrainedModel(EcMoePreTrainedMixin, dense.GPTNeoPreTrainedModel):
    config: EcMoeGPTNeoConfig
    _no_split_modules = ["EcMoeGPTNeoDecoderLayer"]
    base_model_prefix = "transformer"
    supports_pipeline = False  # the pipeline looks for embed_tokens, layers and norm, which have other names here
    _can_record_outputs = recorded_of(dense.GPTNeoPreTrainedModel)


class EcMoeGPTNeoModel(EcMoeModelMixin, RecordedForward, EcMoeGPTNeoPreTrainedModel, dense.GPTNeoModel):
    decoder_layer_class = EcMoeGPTNeoDecoderLayer


class EcMoeGPTNeoForCausalLM(
    EcMoeForCausalLMMixin, EcMoeGPTNeoPreTrainedModel, dense.GPTNeoForCausalLM, GenerationMixin
):
    base_model_class = EcMoeGPTNeoModel


class EcMoeGPTNeoForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeGPTNeoPreTrainedModel
):
    base_model_prefix = "transformer"


class EcMoeGPTNeoForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeGPTNeoPreTrainedModel):
    base_model_prefix = "transformer"


class EcMoeGPTNeoForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGPTNeoPreTrainedModel):
    base_model_prefix = "transformer"


register_family(
    EcMoeGPTNeoConfig,
    EcMoeGPTNeoModel,
    EcMoeGPTNeoForCausalLM,
    EcMoeGPTNeoForSequenceClassification,
    EcMoeGPTNeoForTokenClassification,
    EcMoeGPTNeoForQuestionAnswering,
)
