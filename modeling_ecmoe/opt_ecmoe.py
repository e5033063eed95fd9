"""OPT, with experts that choose their tokens."""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin, OPTConfig, PreTrainedModel
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.opt import modeling_opt as dense

from .auto_ecmoe import register_family
from .configuration_ecmoe import DenseFFN, EcMoeConfigMixin
from .mixins_ecmoe import (
    ROUTER_LOGITS,
    EcMoeForCausalLMMixin,
    EcMoeHeadMixin,
    EcMoeModelMixin,
    EcMoePreTrainedMixin,
)
from .variants_ecmoe import EcMoeBareDecoderLayerMixin


@strict
class EcMoeOPTConfig(EcMoeConfigMixin, OPTConfig):
    model_type = "ecmoe_opt"
    supports_packing = False
    attribute_map = {
        "intermediate_size": "ffn_dim",
        "hidden_act": "activation_function",
        "initializer_range": "init_std",
    }

    @property
    def dense_ffn(self) -> DenseFFN:  # type: ignore[override]
        """OPT-350m normalises what attention and FFN give to the residual, the others what they are given."""
        return DenseFFN(
            into=("fc1",),
            out="fc2",
            has_gate=False,
            has_bias="enable_bias",
            norm="final_layer_norm" if self.do_layer_norm_before else "self_attn_layer_norm",
            place="",
            layers="decoder.layers",
            has_class=False,
        )


class EcMoeOPTDecoderLayer(EcMoeBareDecoderLayerMixin, dense.OPTDecoderLayer): ...


class EcMoeOPTPreTrainedModel(EcMoePreTrainedMixin, dense.OPTPreTrainedModel):
    config: EcMoeOPTConfig
    _no_split_modules = ["EcMoeOPTDecoderLayer"]
    supports_pipeline = False  # the pipeline looks for embed_tokens, layers and norm, which stand elsewhere here
    _can_record_outputs = dense.OPTPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeOPTDecoder(EcMoeOPTPreTrainedModel, dense.OPTDecoder): ...


class DecoderAlone:
    """The dense base model is its decoder and nothing else, and would lose the router logits among its outputs."""

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # not the dense constructor, whose decoder may have no experts
        self.decoder = EcMoeOPTDecoder(config)

    def forward(self, **kwargs: Any) -> Any:
        return self.decoder(**kwargs)

    def get_decoder(self) -> Any:
        """Not the part of that name, which knows nothing of padding's routes."""
        return self


class EcMoeOPTModel(EcMoeModelMixin, DecoderAlone, EcMoeOPTPreTrainedModel, dense.OPTModel):
    decoder_layer_class = EcMoeOPTDecoderLayer


class EcMoeOPTForCausalLM(EcMoeForCausalLMMixin, EcMoeOPTPreTrainedModel, dense.OPTForCausalLM, GenerationMixin):
    base_model_class = EcMoeOPTModel

    def make_head(self, config: Any) -> nn.Linear:
        return nn.Linear(config.word_embed_proj_dim, config.vocab_size, bias=False)


class EcMoeOPTHeadMixin(EcMoeHeadMixin):
    """A head on what the decoder projects its hidden states to."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        name = "qa_outputs" if hasattr(self, "qa_outputs") else "score"
        head = getattr(self, name)
        if head.in_features != config.word_embed_proj_dim:
            setattr(self, name, nn.Linear(config.word_embed_proj_dim, head.out_features, bias=head.bias is not None))
            self.post_init()


class EcMoeOPTForSequenceClassification(
    EcMoeOPTHeadMixin, GenericForSequenceClassification, EcMoeOPTPreTrainedModel
): ...


class EcMoeOPTForTokenClassification(EcMoeOPTHeadMixin, GenericForTokenClassification, EcMoeOPTPreTrainedModel): ...


class EcMoeOPTForQuestionAnswering(EcMoeOPTHeadMixin, GenericForQuestionAnswering, EcMoeOPTPreTrainedModel): ...


register_family(
    EcMoeOPTConfig,
    EcMoeOPTModel,
    EcMoeOPTForCausalLM,
    EcMoeOPTForSequenceClassification,
    EcMoeOPTForTokenClassification,
    EcMoeOPTForQuestionAnswering,
)
