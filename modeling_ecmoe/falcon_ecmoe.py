"""Falcon, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import FalconConfig, GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.falcon import modeling_falcon as dense

from .auto_ecmoe import register_family
from .configuration_ecmoe import DenseFFN, EcMoeConfigMixin
from .mixins_ecmoe import (
    EcMoeForCausalLMMixin,
    EcMoeHeadMixin,
    EcMoeModelMixin,
    EcMoePreTrainedMixin,
)
from .variants_ecmoe import EcMoeAloofDecoderLayerMixin, RecordedForward, recorded_of
from .versions_ecmoe import is_at_least


@strict
class EcMoeFalconConfig(EcMoeConfigMixin, FalconConfig):
    model_type = "ecmoe_falcon"
    supports_packing = is_at_least("5.24.0")  # before, its mask knew no positions
    attribute_map = {"intermediate_size": "ffn_hidden_size", "hidden_act": "activation"}

    @property
    def dense_ffn(self) -> DenseFFN:  # type: ignore[override]
        """Its input's norm has as many names as the family has architectures."""
        norm = "input_layernorm" if self.parallel_attn else "post_attention_layernorm"
        if self.parallel_attn and (self.num_ln_in_parallel_attn or 1 + bool(self.new_decoder_architecture)) == 2:
            norm = "ln_mlp"
        return DenseFFN(
            into=("dense_h_to_4h",), out="dense_4h_to_h", has_gate=False, has_bias="bias", norm=norm, layers="h"
        )


class EcMoeFalconDecoderLayer(EcMoeAloofDecoderLayerMixin, dense.FalconDecoderLayer): ...


class EcMoeFalconPreTrainedModel(EcMoePreTrainedMixin, dense.FalconPreTrainedModel):
    config: EcMoeFalconConfig
    _no_split_modules = ["EcMoeFalconDecoderLayer"]
    base_model_prefix = "transformer"
    supports_pipeline = False  # the pipeline looks for embed_tokens, layers and norm, which have other names here
    _can_record_outputs = recorded_of(dense.FalconPreTrainedModel)


class EcMoeFalconModel(EcMoeModelMixin, RecordedForward, EcMoeFalconPreTrainedModel, dense.FalconModel):
    decoder_layer_class = EcMoeFalconDecoderLayer


class EcMoeFalconForCausalLM(
    EcMoeForCausalLMMixin, EcMoeFalconPreTrainedModel, dense.FalconForCausalLM, GenerationMixin
):
    base_model_class = EcMoeFalconModel


class EcMoeFalconForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeFalconPreTrainedModel
):
    base_model_prefix = "transformer"


class EcMoeFalconForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeFalconPreTrainedModel):
    base_model_prefix = "transformer"


class EcMoeFalconForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeFalconPreTrainedModel):
    base_model_prefix = "transformer"


register_family(
    EcMoeFalconConfig,
    EcMoeFalconModel,
    EcMoeFalconForCausalLM,
    EcMoeFalconForSequenceClassification,
    EcMoeFalconForTokenClassification,
    EcMoeFalconForQuestionAnswering,
)
