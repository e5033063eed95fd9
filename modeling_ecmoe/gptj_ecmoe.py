"""GPT-J, with experts that choose their tokens."""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin, GPTJConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.gptj import modeling_gptj as dense

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
class EcMoeGPTJConfig(EcMoeConfigMixin, GPTJConfig):
    model_type = "ecmoe_gptj"
    attribute_map = GPTJConfig.attribute_map | {"intermediate_size": "n_inner", "hidden_act": "activation_function"}
    dense_ffn = DenseFFN(
        into=("fc_in",),
        out="fc_out",
        has_gate=False,
        has_bias=True,
        dropout="resid_pdrop",
        norm="ln_1",
        layers="h",
        has_class=False,
    )


class EcMoeGPTJDecoderLayer(EcMoeAloofDecoderLayerMixin, dense.GPTJBlock): ...


class EcMoeGPTJPreTrainedModel(EcMoePreTrainedMixin, dense.GPTJPreTrainedModel):
    config: EcMoeGPTJConfig
    _no_split_modules = ["EcMoeGPTJDecoderLayer"]
    base_model_prefix = "transformer"
    supports_pipeline = False  # the pipeline looks for embed_tokens, layers and norm, which have other names here
    _can_record_outputs = recorded_of(dense.GPTJPreTrainedModel)


class EcMoeGPTJModel(EcMoeModelMixin, RecordedForward, EcMoeGPTJPreTrainedModel, dense.GPTJModel):
    decoder_layer_class = EcMoeGPTJDecoderLayer


class EcMoeGPTJForCausalLM(EcMoeForCausalLMMixin, EcMoeGPTJPreTrainedModel, dense.GPTJForCausalLM, GenerationMixin):
    base_model_class = EcMoeGPTJModel

    def make_head(self, config: Any) -> nn.Linear:
        return nn.Linear(config.hidden_size, config.vocab_size, bias=True)


class EcMoeGPTJForSequenceClassification(EcMoeHeadMixin, GenericForSequenceClassification, EcMoeGPTJPreTrainedModel):
    base_model_prefix = "transformer"


class EcMoeGPTJForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeGPTJPreTrainedModel):
    base_model_prefix = "transformer"


class EcMoeGPTJForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGPTJPreTrainedModel):
    base_model_prefix = "transformer"


register_family(
    EcMoeGPTJConfig,
    EcMoeGPTJModel,
    EcMoeGPTJForCausalLM,
    EcMoeGPTJForSequenceClassification,
    EcMoeGPTJForTokenClassification,
    EcMoeGPTJForQuestionAnswering,
)
