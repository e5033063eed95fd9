"""Youtu-LLM, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, YoutuConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.youtu import modeling_youtu as dense

from .auto_ecmoe import register_family
from .configuration_ecmoe import EcMoeConfigMixin
from .mixins_ecmoe import (
    ROUTER_LOGITS,
    EcMoeDecoderLayerMixin,
    EcMoeForCausalLMMixin,
    EcMoeHeadMixin,
    EcMoeModelMixin,
    EcMoePreTrainedMixin,
)


@strict
class EcMoeYoutuConfig(EcMoeConfigMixin, YoutuConfig):
    model_type = "ecmoe_youtu"


class EcMoeYoutuDecoderLayer(EcMoeDecoderLayerMixin, dense.YoutuDecoderLayer): ...


class EcMoeYoutuPreTrainedModel(EcMoePreTrainedMixin, dense.YoutuPreTrainedModel):
    config: EcMoeYoutuConfig
    _no_split_modules = ["EcMoeYoutuDecoderLayer"]
    _can_record_outputs = dense.YoutuPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeYoutuModel(EcMoeModelMixin, EcMoeYoutuPreTrainedModel, dense.YoutuModel):
    decoder_layer_class = EcMoeYoutuDecoderLayer


class EcMoeYoutuForCausalLM(EcMoeForCausalLMMixin, EcMoeYoutuPreTrainedModel, dense.YoutuForCausalLM, GenerationMixin):
    base_model_class = EcMoeYoutuModel


class EcMoeYoutuForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeYoutuPreTrainedModel
): ...


class EcMoeYoutuForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeYoutuPreTrainedModel): ...


class EcMoeYoutuForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeYoutuPreTrainedModel): ...


register_family(
    EcMoeYoutuConfig,
    EcMoeYoutuModel,
    EcMoeYoutuForCausalLM,
    EcMoeYoutuForSequenceClassification,
    EcMoeYoutuForTokenClassification,
    EcMoeYoutuForQuestionAnswering,
)
