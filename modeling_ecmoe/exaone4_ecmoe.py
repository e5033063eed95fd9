"""EXAONE-4, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import Exaone4Config, GenerationMixin
from transformers.models.exaone4 import modeling_exaone4 as dense

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
class EcMoeExaone4Config(EcMoeConfigMixin, Exaone4Config):
    model_type = "ecmoe_exaone4"
    dense_ffn = DenseFFN(norm=None)


class EcMoeExaone4DecoderLayer(EcMoeDecoderLayerMixin, dense.Exaone4DecoderLayer): ...


class EcMoeExaone4PreTrainedModel(EcMoePreTrainedMixin, dense.Exaone4PreTrainedModel):
    config: EcMoeExaone4Config
    _no_split_modules = ["EcMoeExaone4DecoderLayer"]
    _can_record_outputs = dense.Exaone4PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeExaone4Model(EcMoeModelMixin, EcMoeExaone4PreTrainedModel, dense.Exaone4Model):
    decoder_layer_class = EcMoeExaone4DecoderLayer


class EcMoeExaone4ForCausalLM(
    EcMoeForCausalLMMixin, EcMoeExaone4PreTrainedModel, dense.Exaone4ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeExaone4Model


class EcMoeExaone4ForSequenceClassification(
    EcMoeHeadMixin, EcMoeExaone4PreTrainedModel, dense.Exaone4ForSequenceClassification
): ...


class EcMoeExaone4ForTokenClassification(
    EcMoeHeadMixin, EcMoeExaone4PreTrainedModel, dense.Exaone4ForTokenClassification
): ...


class EcMoeExaone4ForQuestionAnswering(
    EcMoeHeadMixin, EcMoeExaone4PreTrainedModel, dense.Exaone4ForQuestionAnswering
): ...


register_family(
    EcMoeExaone4Config,
    EcMoeExaone4Model,
    EcMoeExaone4ForCausalLM,
    EcMoeExaone4ForSequenceClassification,
    EcMoeExaone4ForTokenClassification,
    EcMoeExaone4ForQuestionAnswering,
)
