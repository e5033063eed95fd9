"""The families of expert-choice decoders: the dense classes of Transformers with another FFN.

Everything but the FFN (block_ecmoe.py) is inherited; what a family adds to its dense classes is in mixins_ecmoe.py.
"""

import torch
from torch import Tensor
from transformers import AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.cohere2 import modeling_cohere2 as cohere2
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.glm4 import modeling_glm4 as glm4
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.granite import modeling_granite as granite
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.olmo3 import modeling_olmo3 as olmo3
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.smollm3 import modeling_smollm3 as smollm3
from transformers.models.starcoder2 import modeling_starcoder2 as starcoder2

from .configuration_ecmoe import (
    AUTO_CLASSES,
    EcMoeCohere2Config,
    EcMoeGemma2Config,
    EcMoeGemma3TextConfig,
    EcMoeGlm4Config,
    EcMoeGPTNeoXConfig,
    EcMoeGraniteConfig,
    EcMoeLlamaConfig,
    EcMoeMistralConfig,
    EcMoeOlmo2Config,
    EcMoeOlmo3Config,
    EcMoePhi3Config,
    EcMoeQwen2Config,
    EcMoeQwen3Config,
    EcMoeSmolLM3Config,
    EcMoeStarcoder2Config,
)
from .configuration_ecmoe import __all__ as _config_names
from .mixins_ecmoe import (
    ROUTER_LOGITS,
    EcMoeDecoderLayerMixin,
    EcMoeForCausalLMMixin,
    EcMoeHeadMixin,
    EcMoeModelMixin,
    EcMoePreTrainedMixin,
)
from .parallel_ecmoe import EqualSplitsEP
from .versions_ecmoe import EPImplementationInterface


class EcMoeLlamaDecoderLayer(EcMoeDecoderLayerMixin, llama.LlamaDecoderLayer): ...


class EcMoeLlamaPreTrainedModel(EcMoePreTrainedMixin, llama.LlamaPreTrainedModel):
    config: EcMoeLlamaConfig
    _no_split_modules = ["EcMoeLlamaDecoderLayer"]
    _can_record_outputs = llama.LlamaPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeLlamaModel(EcMoeModelMixin, EcMoeLlamaPreTrainedModel, llama.LlamaModel):
    decoder_layer_class = EcMoeLlamaDecoderLayer


class EcMoeLlamaForCausalLM(EcMoeForCausalLMMixin, EcMoeLlamaPreTrainedModel, llama.LlamaForCausalLM, GenerationMixin):
    base_model_class = EcMoeLlamaModel


class EcMoeLlamaForSequenceClassification(
    EcMoeHeadMixin, EcMoeLlamaPreTrainedModel, llama.LlamaForSequenceClassification
): ...


class EcMoeLlamaForTokenClassification(
    EcMoeHeadMixin, EcMoeLlamaPreTrainedModel, llama.LlamaForTokenClassification
): ...


class EcMoeLlamaForQuestionAnswering(EcMoeHeadMixin, EcMoeLlamaPreTrainedModel, llama.LlamaForQuestionAnswering): ...


class EcMoeMistralDecoderLayer(EcMoeDecoderLayerMixin, mistral.MistralDecoderLayer): ...


class EcMoeMistralPreTrainedModel(EcMoePreTrainedMixin, mistral.MistralPreTrainedModel):
    config: EcMoeMistralConfig
    _no_split_modules = ["EcMoeMistralDecoderLayer"]
    _can_record_outputs = mistral.MistralPreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeMistralModel(EcMoeModelMixin, EcMoeMistralPreTrainedModel, mistral.MistralModel):
    decoder_layer_class = EcMoeMistralDecoderLayer


class EcMoeMistralForCausalLM(
    EcMoeForCausalLMMixin, EcMoeMistralPreTrainedModel, mistral.MistralForCausalLM, GenerationMixin
):
    base_model_class = EcMoeMistralModel


class EcMoeMistralForSequenceClassification(
    EcMoeHeadMixin, EcMoeMistralPreTrainedModel, mistral.MistralForSequenceClassification
): ...


class EcMoeMistralForTokenClassification(
    EcMoeHeadMixin, EcMoeMistralPreTrainedModel, mistral.MistralForTokenClassification
): ...


class EcMoeMistralForQuestionAnswering(
    EcMoeHeadMixin, EcMoeMistralPreTrainedModel, mistral.MistralForQuestionAnswering
): ...


class EcMoeQwen2DecoderLayer(EcMoeDecoderLayerMixin, qwen2.Qwen2DecoderLayer): ...


class EcMoeQwen2PreTrainedModel(EcMoePreTrainedMixin, qwen2.Qwen2PreTrainedModel):
    config: EcMoeQwen2Config
    _no_split_modules = ["EcMoeQwen2DecoderLayer"]
    _can_record_outputs = qwen2.Qwen2PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeQwen2Model(EcMoeModelMixin, EcMoeQwen2PreTrainedModel, qwen2.Qwen2Model):
    decoder_layer_class = EcMoeQwen2DecoderLayer


class EcMoeQwen2ForCausalLM(EcMoeForCausalLMMixin, EcMoeQwen2PreTrainedModel, qwen2.Qwen2ForCausalLM, GenerationMixin):
    base_model_class = EcMoeQwen2Model


class EcMoeQwen2ForSequenceClassification(
    EcMoeHeadMixin, EcMoeQwen2PreTrainedModel, qwen2.Qwen2ForSequenceClassification
): ...


class EcMoeQwen2ForTokenClassification(
    EcMoeHeadMixin, EcMoeQwen2PreTrainedModel, qwen2.Qwen2ForTokenClassification
): ...


class EcMoeQwen2ForQuestionAnswering(EcMoeHeadMixin, EcMoeQwen2PreTrainedModel, qwen2.Qwen2ForQuestionAnswering): ...


class EcMoeQwen3DecoderLayer(EcMoeDecoderLayerMixin, qwen3.Qwen3DecoderLayer): ...


class EcMoeQwen3PreTrainedModel(EcMoePreTrainedMixin, qwen3.Qwen3PreTrainedModel):
    config: EcMoeQwen3Config
    _no_split_modules = ["EcMoeQwen3DecoderLayer"]
    _can_record_outputs = qwen3.Qwen3PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeQwen3Model(EcMoeModelMixin, EcMoeQwen3PreTrainedModel, qwen3.Qwen3Model):
    decoder_layer_class = EcMoeQwen3DecoderLayer


class EcMoeQwen3ForCausalLM(EcMoeForCausalLMMixin, EcMoeQwen3PreTrainedModel, qwen3.Qwen3ForCausalLM, GenerationMixin):
    base_model_class = EcMoeQwen3Model


class EcMoeQwen3ForSequenceClassification(
    EcMoeHeadMixin, EcMoeQwen3PreTrainedModel, qwen3.Qwen3ForSequenceClassification
): ...


class EcMoeQwen3ForTokenClassification(
    EcMoeHeadMixin, EcMoeQwen3PreTrainedModel, qwen3.Qwen3ForTokenClassification
): ...


class EcMoeQwen3ForQuestionAnswering(EcMoeHeadMixin, EcMoeQwen3PreTrainedModel, qwen3.Qwen3ForQuestionAnswering): ...


class EcMoePhi3DecoderLayer(EcMoeDecoderLayerMixin, phi3.Phi3DecoderLayer): ...


class EcMoePhi3PreTrainedModel(EcMoePreTrainedMixin, phi3.Phi3PreTrainedModel):
    config: EcMoePhi3Config
    _no_split_modules = ["EcMoePhi3DecoderLayer"]
    _can_record_outputs = phi3.Phi3PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoePhi3Model(EcMoeModelMixin, EcMoePhi3PreTrainedModel, phi3.Phi3Model):
    decoder_layer_class = EcMoePhi3DecoderLayer


class EcMoePhi3ForCausalLM(EcMoeForCausalLMMixin, EcMoePhi3PreTrainedModel, phi3.Phi3ForCausalLM, GenerationMixin):
    base_model_class = EcMoePhi3Model


class EcMoePhi3ForSequenceClassification(
    EcMoeHeadMixin, EcMoePhi3PreTrainedModel, phi3.Phi3ForSequenceClassification
): ...


class EcMoePhi3ForTokenClassification(EcMoeHeadMixin, EcMoePhi3PreTrainedModel, phi3.Phi3ForTokenClassification): ...


class EcMoePhi3ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoePhi3PreTrainedModel): ...


class EcMoeSmolLM3DecoderLayer(EcMoeDecoderLayerMixin, smollm3.SmolLM3DecoderLayer): ...


class EcMoeSmolLM3PreTrainedModel(EcMoePreTrainedMixin, smollm3.SmolLM3PreTrainedModel):
    config: EcMoeSmolLM3Config
    _no_split_modules = ["EcMoeSmolLM3DecoderLayer"]
    _can_record_outputs = smollm3.SmolLM3PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeSmolLM3Model(EcMoeModelMixin, EcMoeSmolLM3PreTrainedModel, smollm3.SmolLM3Model):
    decoder_layer_class = EcMoeSmolLM3DecoderLayer


class EcMoeSmolLM3ForCausalLM(
    EcMoeForCausalLMMixin, EcMoeSmolLM3PreTrainedModel, smollm3.SmolLM3ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeSmolLM3Model


class EcMoeSmolLM3ForSequenceClassification(
    EcMoeHeadMixin, EcMoeSmolLM3PreTrainedModel, smollm3.SmolLM3ForSequenceClassification
): ...


class EcMoeSmolLM3ForTokenClassification(
    EcMoeHeadMixin, EcMoeSmolLM3PreTrainedModel, smollm3.SmolLM3ForTokenClassification
): ...


class EcMoeSmolLM3ForQuestionAnswering(
    EcMoeHeadMixin, EcMoeSmolLM3PreTrainedModel, smollm3.SmolLM3ForQuestionAnswering
): ...


class EcMoeOlmo2DecoderLayer(EcMoeDecoderLayerMixin, olmo2.Olmo2DecoderLayer): ...


class EcMoeOlmo2PreTrainedModel(EcMoePreTrainedMixin, olmo2.Olmo2PreTrainedModel):
    config: EcMoeOlmo2Config
    _no_split_modules = ["EcMoeOlmo2DecoderLayer"]
    _can_record_outputs = olmo2.Olmo2PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeOlmo2Model(EcMoeModelMixin, EcMoeOlmo2PreTrainedModel, olmo2.Olmo2Model):
    decoder_layer_class = EcMoeOlmo2DecoderLayer


class EcMoeOlmo2ForCausalLM(EcMoeForCausalLMMixin, EcMoeOlmo2PreTrainedModel, olmo2.Olmo2ForCausalLM, GenerationMixin):
    base_model_class = EcMoeOlmo2Model


class EcMoeOlmo2ForSequenceClassification(
    EcMoeHeadMixin, EcMoeOlmo2PreTrainedModel, olmo2.Olmo2ForSequenceClassification
): ...


class EcMoeOlmo2ForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeOlmo2PreTrainedModel): ...


class EcMoeOlmo2ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeOlmo2PreTrainedModel): ...


class EcMoeOlmo3DecoderLayer(EcMoeDecoderLayerMixin, olmo3.Olmo3DecoderLayer): ...


class EcMoeOlmo3PreTrainedModel(EcMoePreTrainedMixin, olmo3.Olmo3PreTrainedModel):
    config: EcMoeOlmo3Config
    _no_split_modules = ["EcMoeOlmo3DecoderLayer"]
    _can_record_outputs = olmo3.Olmo3PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeOlmo3Model(EcMoeModelMixin, EcMoeOlmo3PreTrainedModel, olmo3.Olmo3Model):
    decoder_layer_class = EcMoeOlmo3DecoderLayer


class EcMoeOlmo3ForCausalLM(EcMoeForCausalLMMixin, EcMoeOlmo3PreTrainedModel, olmo3.Olmo3ForCausalLM, GenerationMixin):
    base_model_class = EcMoeOlmo3Model


class EcMoeOlmo3ForSequenceClassification(
    EcMoeHeadMixin, EcMoeOlmo3PreTrainedModel, olmo3.Olmo3ForSequenceClassification
): ...


class EcMoeOlmo3ForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeOlmo3PreTrainedModel): ...


class EcMoeOlmo3ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeOlmo3PreTrainedModel): ...


class EcMoeGemma2DecoderLayer(EcMoeDecoderLayerMixin, gemma2.Gemma2DecoderLayer): ...


class EcMoeGemma2PreTrainedModel(EcMoePreTrainedMixin, gemma2.Gemma2PreTrainedModel):
    config: EcMoeGemma2Config
    _no_split_modules = ["EcMoeGemma2DecoderLayer"]
    _can_record_outputs = gemma2.Gemma2PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeGemma2Model(EcMoeModelMixin, EcMoeGemma2PreTrainedModel, gemma2.Gemma2Model):
    decoder_layer_class = EcMoeGemma2DecoderLayer


class EcMoeGemma2ForCausalLM(
    EcMoeForCausalLMMixin, EcMoeGemma2PreTrainedModel, gemma2.Gemma2ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeGemma2Model

    def scale_logits(self, logits: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)


class EcMoeGemma2ForSequenceClassification(
    EcMoeHeadMixin, EcMoeGemma2PreTrainedModel, gemma2.Gemma2ForSequenceClassification
): ...


class EcMoeGemma2ForTokenClassification(
    EcMoeHeadMixin, EcMoeGemma2PreTrainedModel, gemma2.Gemma2ForTokenClassification
): ...


class EcMoeGemma2ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGemma2PreTrainedModel): ...


class EcMoeGemma3TextDecoderLayer(EcMoeDecoderLayerMixin, gemma3.Gemma3DecoderLayer): ...


class EcMoeGemma3TextPreTrainedModel(EcMoePreTrainedMixin, gemma3.Gemma3PreTrainedModel):
    config: EcMoeGemma3TextConfig
    _no_split_modules = ["EcMoeGemma3TextDecoderLayer"]
    _can_record_outputs = gemma3.Gemma3PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeGemma3TextModel(EcMoeModelMixin, EcMoeGemma3TextPreTrainedModel, gemma3.Gemma3TextModel):
    decoder_layer_class = EcMoeGemma3TextDecoderLayer


class EcMoeGemma3TextForCausalLM(
    EcMoeForCausalLMMixin, EcMoeGemma3TextPreTrainedModel, gemma3.Gemma3ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeGemma3TextModel

    def scale_logits(self, logits: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)


class EcMoeGemma3TextForSequenceClassification(
    EcMoeHeadMixin, EcMoeGemma3TextPreTrainedModel, gemma3.Gemma3TextForSequenceClassification
): ...


class EcMoeGemma3TextForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeGemma3TextPreTrainedModel
): ...


class EcMoeGemma3TextForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGemma3TextPreTrainedModel
): ...


class EcMoeGraniteDecoderLayer(EcMoeDecoderLayerMixin, granite.GraniteDecoderLayer): ...


class EcMoeGranitePreTrainedModel(EcMoePreTrainedMixin, granite.GranitePreTrainedModel):
    config: EcMoeGraniteConfig
    _no_split_modules = ["EcMoeGraniteDecoderLayer"]
    supports_pipeline = False  # every stage would scale by embedding_multiplier again
    _can_record_outputs = granite.GranitePreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeGraniteModel(EcMoeModelMixin, EcMoeGranitePreTrainedModel, granite.GraniteModel):
    decoder_layer_class = EcMoeGraniteDecoderLayer


class EcMoeGraniteForCausalLM(
    EcMoeForCausalLMMixin, EcMoeGranitePreTrainedModel, granite.GraniteForCausalLM, GenerationMixin
):
    base_model_class = EcMoeGraniteModel

    def scale_logits(self, logits: Tensor) -> Tensor:
        return logits / self.config.logits_scaling


class EcMoeGraniteForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeGranitePreTrainedModel
): ...


class EcMoeGraniteForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeGranitePreTrainedModel
): ...


class EcMoeGraniteForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGranitePreTrainedModel): ...


class EcMoeGlm4DecoderLayer(EcMoeDecoderLayerMixin, glm4.Glm4DecoderLayer): ...


class EcMoeGlm4PreTrainedModel(EcMoePreTrainedMixin, glm4.Glm4PreTrainedModel):
    config: EcMoeGlm4Config
    _no_split_modules = ["EcMoeGlm4DecoderLayer"]
    _can_record_outputs = glm4.Glm4PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeGlm4Model(EcMoeModelMixin, EcMoeGlm4PreTrainedModel, glm4.Glm4Model):
    decoder_layer_class = EcMoeGlm4DecoderLayer


class EcMoeGlm4ForCausalLM(EcMoeForCausalLMMixin, EcMoeGlm4PreTrainedModel, glm4.Glm4ForCausalLM, GenerationMixin):
    base_model_class = EcMoeGlm4Model


class EcMoeGlm4ForSequenceClassification(
    EcMoeHeadMixin, EcMoeGlm4PreTrainedModel, glm4.Glm4ForSequenceClassification
): ...


class EcMoeGlm4ForTokenClassification(EcMoeHeadMixin, EcMoeGlm4PreTrainedModel, glm4.Glm4ForTokenClassification): ...


class EcMoeGlm4ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGlm4PreTrainedModel): ...


class EcMoeCohere2DecoderLayer(EcMoeDecoderLayerMixin, cohere2.Cohere2DecoderLayer): ...


class EcMoeCohere2PreTrainedModel(EcMoePreTrainedMixin, cohere2.Cohere2PreTrainedModel):
    config: EcMoeCohere2Config
    _no_split_modules = ["EcMoeCohere2DecoderLayer"]
    _can_record_outputs = cohere2.Cohere2PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeCohere2Model(EcMoeModelMixin, EcMoeCohere2PreTrainedModel, cohere2.Cohere2Model):
    decoder_layer_class = EcMoeCohere2DecoderLayer


class EcMoeCohere2ForCausalLM(
    EcMoeForCausalLMMixin, EcMoeCohere2PreTrainedModel, cohere2.Cohere2ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeCohere2Model

    def scale_logits(self, logits: Tensor) -> Tensor:
        return logits * self.config.logit_scale


class EcMoeCohere2ForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeCohere2PreTrainedModel
): ...


class EcMoeCohere2ForTokenClassification(
    EcMoeHeadMixin, GenericForTokenClassification, EcMoeCohere2PreTrainedModel
): ...


class EcMoeCohere2ForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeCohere2PreTrainedModel): ...


class EcMoeStarcoder2DecoderLayer(EcMoeDecoderLayerMixin, starcoder2.Starcoder2DecoderLayer): ...


class EcMoeStarcoder2PreTrainedModel(EcMoePreTrainedMixin, starcoder2.Starcoder2PreTrainedModel):
    config: EcMoeStarcoder2Config
    _no_split_modules = ["EcMoeStarcoder2DecoderLayer"]
    _can_record_outputs = starcoder2.Starcoder2PreTrainedModel._can_record_outputs | ROUTER_LOGITS


class EcMoeStarcoder2Model(EcMoeModelMixin, EcMoeStarcoder2PreTrainedModel, starcoder2.Starcoder2Model):
    decoder_layer_class = EcMoeStarcoder2DecoderLayer


class EcMoeStarcoder2ForCausalLM(
    EcMoeForCausalLMMixin, EcMoeStarcoder2PreTrainedModel, starcoder2.Starcoder2ForCausalLM, GenerationMixin
):
    base_model_class = EcMoeStarcoder2Model


class EcMoeStarcoder2ForSequenceClassification(
    EcMoeHeadMixin, EcMoeStarcoder2PreTrainedModel, starcoder2.Starcoder2ForSequenceClassification
): ...


class EcMoeStarcoder2ForTokenClassification(
    EcMoeHeadMixin, EcMoeStarcoder2PreTrainedModel, starcoder2.Starcoder2ForTokenClassification
): ...


class EcMoeStarcoder2ForQuestionAnswering(
    EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeStarcoder2PreTrainedModel
): ...


class EcMoeGPTNeoXDecoderLayer(EcMoeDecoderLayerMixin, gpt_neox.GPTNeoXLayer): ...


class EcMoeGPTNeoXPreTrainedModel(EcMoePreTrainedMixin, gpt_neox.GPTNeoXPreTrainedModel):
    config: EcMoeGPTNeoXConfig
    _no_split_modules = ["EcMoeGPTNeoXDecoderLayer"]
    supports_pipeline = False  # the pipeline looks for embed_tokens and norm, which have other names here
    _can_record_outputs = gpt_neox.GPTNeoXPreTrainedModel._can_record_outputs | ROUTER_LOGITS
    base_model_prefix = "gpt_neox"


class EcMoeGPTNeoXModel(EcMoeModelMixin, EcMoeGPTNeoXPreTrainedModel, gpt_neox.GPTNeoXModel):
    decoder_layer_class = EcMoeGPTNeoXDecoderLayer


class EcMoeGPTNeoXForCausalLM(
    EcMoeForCausalLMMixin, EcMoeGPTNeoXPreTrainedModel, gpt_neox.GPTNeoXForCausalLM, GenerationMixin
):
    base_model_class = EcMoeGPTNeoXModel


class EcMoeGPTNeoXForSequenceClassification(
    EcMoeHeadMixin, GenericForSequenceClassification, EcMoeGPTNeoXPreTrainedModel
):
    base_model_prefix = "gpt_neox"


class EcMoeGPTNeoXForTokenClassification(EcMoeHeadMixin, GenericForTokenClassification, EcMoeGPTNeoXPreTrainedModel):
    base_model_prefix = "gpt_neox"


class EcMoeGPTNeoXForQuestionAnswering(EcMoeHeadMixin, GenericForQuestionAnswering, EcMoeGPTNeoXPreTrainedModel):
    base_model_prefix = "gpt_neox"


MODEL_CLASSES: dict[type[PreTrainedConfig], dict[str, type[PreTrainedModel]]] = {
    globals()[name]: {
        auto_class: globals()[name.removesuffix("Config") + suffix] for auto_class, suffix in AUTO_CLASSES.items()
    }
    for name in _config_names
}
EcMoeHeadMixin.base_models = {config.model_type: models["AutoModel"] for config, models in MODEL_CLASSES.items()}

# Here and not in __init__.py, which is not copied beside a checkpoint: with remote code the heads build their base
# model through AutoModel, and a model that is saved again copies its code only if its class says which Auto class
# it belongs to.
for _config_class, _model_classes in MODEL_CLASSES.items():
    AutoModel.register(_config_class, _model_classes["AutoModel"], exist_ok=True)
    _config_class.register_for_auto_class()
    for _auto_class, _model_class in _model_classes.items():
        _model_class.register_for_auto_class(_auto_class)
    # By these names Trainer's label smoothing and `transformers serve` know a language model.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config_class.model_type] = _model_classes["AutoModelForCausalLM"].__name__

if EPImplementationInterface is not None:
    EPImplementationInterface.register("equal_splits", EqualSplitsEP)

__all__ = [model.__name__ for models in MODEL_CLASSES.values() for model in models.values()]
