"""HyperCLOVA X, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import GenerationMixin, HyperCLOVAXConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.hyperclovax import modeling_hyperclovax as dense

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
class EcMoeHyperCLOVAXConfig(EcMoeConfigMixin, HyperCLOVAXConfig):
    model_type = "ecmoe_hyperclovax"
    dense_ffn = DenseFFN(has_bias="mlp_bias")


class EcMoeHyperCLOVAXDecoderLayer(EcMoeDecoderLayerMixin, dense.HyperCLOVAXDecoderLayer): ...


class EcMoeHyperCLOVAXPreTrainedModel(EcMoePreTrainedMixin, dense.HyperCLOVAXPreTrainedModel):
    config: EcMoeHyperCLOVAXConfig
    _no_split_modules = ["EcMoeHyperCLOVAXDecoderLayer"]
    supports_pipeline = False  # every stage would scale by embedding_multiplier again
    _can_record_outputs = dense.HyperCLOVAXPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeHyperCLOVAXModel(EcMoeModelMixin, EcMoeHyperCLOVAXPreTrainedModel, dense.HyperCLOVAXModel):
    decoder_layer_class = EcMoeHyperCLOVAXDecoderLayer


class EcMoeHyperCLOVAXForCausalLM(
    EcMoeForCausalLMMixin, EcMoeHyperCLOVAXPreTrainedModel, dense.HyperCLOVAXForCausalLM, GenerationMixin
):
    base_model_class = EcMoeHyperCLOVAXModel

    def scale_logits(self, logits: Tensor) -> Tensor:
        return logits * self.config.logits_scaling


class EcMoeHyperCLOVAXForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeHyperCLOVAXPreTrainedModel
): ...


class EcMoeHyperCLOVAXForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeHyperCLOVAXPreTrainedModel
): ...


class EcMoeHyperCLOVAXForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeHyperCLOVAXPreTrainedModel
): ...


register_family(
    EcMoeHyperCLOVAXConfig,
    EcMoeHyperCLOVAXModel,
    EcMoeHyperCLOVAXForCausalLM,
    EcMoeHyperCLOVAXForSequenceClassification,
    EcMoeHyperCLOVAXForTokenClassification,
    EcMoeHyperCLOVAXForQuestionAnswering,
)
