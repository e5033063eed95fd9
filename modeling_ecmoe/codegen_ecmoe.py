"""CodeGen, with experts that choose their tokens."""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import CodeGenConfig, GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.codegen import modeling_codegen as dense

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
class EcMoeCodeGenConfig(EcMoeConfigMixin, CodeGenConfig):
    model_type = "ecmoe_codegen"
    attribute_map = CodeGenConfig.attribute_map | {"intermediate_size": "n_inner", "hidden_act": "activation_function"}
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


class EcMoeCodeGenDecoderLayer(EcMoeAloofDecoderLayerMixin, dense.CodeGenBlock): ...


class EcMoeCodeGenPreTrainedModel(EcMoePreTrainedMixin, dense.CodeGenPreTrainedModel):
    config: EcMoeCodeGenConfig
    _no_split_modules = ["EcMoeCodeGenDecoderLayer"]
    base_model_prefix = "transformer"
    supports_pipeline = False  # the pipeline looks for embed_tokens, layers and norm, which have other names here
    _can_record_outputs = recorded_of(dense.CodeGenPreTrainedModel)


class EcMoeCodeGenModel(EcMoeModelMixin, RecordedForward, EcMoeCodeGenPreTrainedModel, dense.CodeGenModel):
    decoder_layer_class = EcMoeCodeGenDecoderLayer


class EcMoeCodeGenForCausalLM(
    EcMoeForCausalLMMixin, EcMoeCodeGenPreTrainedModel, dense.CodeGenForCausalLM, GenerationMixin
):
    base_model_class = EcMoeCodeGenModel

    def make_head(self, config: Any) -> nn.Linear:
        return nn.Linear(config.hidden_size, config.vocab_size, bias=True)


class EcMoeCodeGenForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeCodeGenPreTrainedModel
):
    base_model_prefix = "transformer"


class EcMoeCodeGenForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeCodeGenPreTrainedModel):
    base_model_prefix = "transformer"


class EcMoeCodeGenForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeCodeGenPreTrainedModel):
    base_model_prefix = "transformer"


register_family(
    EcMoeCodeGenConfig,
    EcMoeCodeGenModel,
    EcMoeCodeGenForCausalLM,
    EcMoeCodeGenForSequenceClassification,
    EcMoeCodeGenForTokenClassification,
    EcMoeCodeGenForQuestionAnswering,
)
