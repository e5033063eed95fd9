"""VaultGemma, with experts that choose their tokens."""

from huggingface_hub.dataclasses import strict
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
from .variants_ecmoe import SoftcappedLogits


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
    SoftcappedLogits,
    EcMoeForCausalLMMixin,
    EcMoeVaultGemmaPreTrainedModel,
    dense.VaultGemmaForCausalLM,
    GenerationMixin,
):
    base_model_class = EcMoeVaultGemmaModel


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
