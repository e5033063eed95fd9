"""VaultGemma, with experts that choose their tokens."""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import GenerationMixin, VaultGemmaConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.vaultgemma import modeling_vaultgemma as dense

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
class EcMoeVaultGemmaConfig(EcMoeConfigMixin, VaultGemmaConfig):
    model_type = "ecmoe_vaultgemma"
    dense_ffn = DenseFFN(norm="pre_feedforward_layernorm", norm_adds_one=True)


class EcMoeVaultGemmaDecoderLayer(EcMoeDecoderLayerMixin, dense.VaultGemmaDecoderLayer): ...


class EcMoeVaultGemmaPreTrainedModel(EcMoePreTrainedMixin, dense.VaultGemmaPreTrainedModel):
    config: EcMoeVaultGemmaConfig
    _no_split_modules = ["EcMoeVaultGemmaDecoderLayer"]
    _can_record_outputs = dense.VaultGemmaPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeVaultGemmaModel(EcMoeModelMixin, EcMoeVaultGemmaPreTrainedModel, dense.VaultGemmaModel):
    decoder_layer_class = EcMoeVaultGemmaDecoderLayer


class EcMoeVaultGemmaForCausalLM(
    EcMoeForCausalLMMixin, EcMoeVaultGemmaPreTrainedModel, dense.VaultGemmaForCausalLM, GenerationMixin
):
    base_model_class = EcMoeVaultGemmaModel

    def scale_logits(self, logits: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)


class EcMoeVaultGemmaForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeVaultGemmaPreTrainedModel
): ...


class EcMoeVaultGemmaForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeVaultGemmaPreTrainedModel
): ...


class EcMoeVaultGemmaForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeVaultGemmaPreTrainedModel
): ...


register_family(
    EcMoeVaultGemmaConfig,
    EcMoeVaultGemmaModel,
    EcMoeVaultGemmaForCausalLM,
    EcMoeVaultGemmaForSequenceClassification,
    EcMoeVaultGemmaForTokenClassification,
    EcMoeVaultGemmaForQuestionAnswering,
)
