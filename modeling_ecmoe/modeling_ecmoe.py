"""Expert-choice mixture-of-experts decoders: the dense classes of Transformers with another FFN.

Everything but the FFN (block_ecmoe.py) is inherited. A dense family is declared at the end of the file.
Shapes: B batch, S sequence, T = B * S tokens, D hidden size, E experts.
"""

from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
    MistralPreTrainedModel,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2Model,
    Qwen2PreTrainedModel,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
    Qwen3PreTrainedModel,
)
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .block_ecmoe import EcMoeBlock, announce_tokens, use_inference_routing
from .configuration_ecmoe import EcMoeLlamaConfig, EcMoeMistralConfig, EcMoeQwen2Config, EcMoeQwen3Config
from .experts_ecmoe import EcMoeRaggedExperts
from .parallel_ecmoe import EqualSplitsEP
from .router_ecmoe import EcMoeRouter
from .routing_ecmoe import router_z_loss
from .versions_ecmoe import EPImplementationInterface, slice_logits_to_keep


class EcMoeDecoderLayerMixin:
    """A dense decoder layer whose `mlp` is the sparse block, and which hands the real tokens to it."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.mlp_layer_types[layer_idx] == "sparse":
            self.mlp = EcMoeBlock(config, dense_mlp_class=type(self.mlp))

    def forward(self, hidden_states: Tensor, *args: Any, token_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """token_mask: [B, S] bool, True for real tokens. A keyword, so that a recomputed layer gets it again."""
        if not isinstance(self.mlp, EcMoeBlock) or torch.compiler.is_compiling():
            return super().forward(hidden_states, *args, **kwargs)
        self.mlp.token_mask = token_mask
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self.mlp.token_mask = None


class EcMoePreTrainedMixin:
    """What every class of the family shares: how its own modules are initialised and which names they have."""

    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = ["gate.threshold$"]  # a pattern: the count of updates stays an integer

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Transformers looks for `@use_experts_implementation` in this file's text; it stands in block_ecmoe.py."""
        return True

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As Transformers', which looks for the code to copy where the class is: not torch's class under FSDP2."""
        self.__module__ = next(c.__module__ for c in type(self).__mro__ if not c.__module__.startswith("torch."))
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, EcMoeRaggedExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, EcMoeRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            for buffer in module.buffers():
                init.zeros_(buffer)


class EcMoeModelMixin:
    """The base model: the dense one with other layers, its padding mask handed down to them."""

    decoder_layer_class: type[nn.Module]

    def __init__(self, config: Any) -> None:
        # The dense constructor makes embedding, norm and rotary embedding; its layers give way to ours. Under
        # from_pretrained that happens on the meta device and costs nothing.
        super().__init__(config)
        self.layers = nn.ModuleList(
            self.decoder_layer_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast | tuple:
        """As the dense model's. token_mask [B, S] bool, True for real tokens; read off a 2-D attention_mask."""
        inputs = input_ids if input_ids is not None else inputs_embeds
        if (
            token_mask is None
            and inputs is not None
            and isinstance(attention_mask, Tensor)
            and attention_mask.dim() == 2
        ):
            # With a cache the mask covers past tokens too; the last S columns are the tokens at hand.
            token_mask = attention_mask[:, -inputs.shape[1] :].bool()
        with announce_tokens(self, token_mask):
            outputs = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                token_mask=token_mask,
                **kwargs,
            )
        return outputs if isinstance(outputs, tuple) else MoeModelOutputWithPast(**outputs)


class EcMoeForCausalLMMixin:
    """The language model: the dense head, the router logits among the outputs, causal routes in `generate`."""

    base_model_class: type[PreTrainedModel]

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # not the dense constructor, which would build the dense model
        self.model = self.base_model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As the dense model's, with `router_logits` (one [B * S, E] per sparse layer) when they are asked for.

        In training the z-loss and, for token choice, the balance loss join the loss by their coefficients;
        `aux_loss` is the balance loss by itself.
        """
        asked = kwargs.pop("output_router_logits", None)
        asked = self.config.output_router_logits if asked is None else asked
        adds_loss = self.training and labels is not None and self._has_router_loss()
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=asked or adds_loss,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss: Any = None
        aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if asked or adds_loss:
            mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
            aux_loss, router_loss = self._router_losses(outputs.router_logits, kwargs.get("token_mask", mask))
            if adds_loss and labels is not None:
                items = kwargs.get("num_items_in_batch")
                # Over several micro-batches the loss is a share of the step's predicted tokens, and so is this.
                predicted = labels != -100  # the first label of a row is predicted by nothing
                share = 1 if items is None else predicted[..., 1:].sum() / items
                loss = loss + share * router_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if asked else None,
        )

    def _has_router_loss(self) -> bool:
        return self.config.router_z_loss_coef > 0 or self.config.router_aux_loss_coef > 0

    def _router_losses(
        self, router_logits: tuple[Tensor, ...], token_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Token choice's balance loss (None otherwise), and what the coefficients add to the loss."""
        config = self.config
        routers = [module for module in self.modules() if isinstance(module, EcMoeRouter)]
        learns = torch.is_grad_enabled() and any(router.weight.requires_grad for router in routers)
        if self.training and self._has_router_loss() and learns and not router_logits[0].requires_grad:
            raise ValueError(
                "router_z_loss_coef and router_aux_loss_coef have no gradient under reentrant gradient checkpointing; "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        added = router_logits[0].new_zeros(())
        if config.router_z_loss_coef:
            added = added + config.router_z_loss_coef * router_z_loss(
                router_logits, None if token_mask is None else token_mask.flatten()
            )
        if config.routing != "token_choice":
            return None, added
        balance: Any = load_balancing_loss_func(
            router_logits, config.num_experts, int(config.capacity_factor), token_mask
        )
        return balance, added + config.router_aux_loss_coef * balance

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' `generate`, routed causally also when the model was left in train mode."""
        with use_inference_routing(self):
            return super().generate(*args, **kwargs)


class EcMoeHeadMixin:
    """A head on the base model, which Transformers builds through AutoModel.

    As remote code a head's config may come from another copy of the configuration module than the one that this file
    registered, so the class at hand is registered before it is needed.
    """

    def __init__(self, config: Any) -> None:
        for registered, models in MODEL_CLASSES.items():
            if registered.model_type == config.model_type:
                AutoModel.register(type(config), models["AutoModel"], exist_ok=True)
        super().__init__(config)


_ROUTER_LOGITS = {"router_logits": OutputRecorder(EcMoeRouter, index=0)}


class EcMoeLlamaDecoderLayer(EcMoeDecoderLayerMixin, LlamaDecoderLayer):
    pass


class EcMoeLlamaPreTrainedModel(EcMoePreTrainedMixin, LlamaPreTrainedModel):
    config: EcMoeLlamaConfig
    _no_split_modules = ["EcMoeLlamaDecoderLayer"]
    _can_record_outputs = LlamaPreTrainedModel._can_record_outputs | _ROUTER_LOGITS


class EcMoeLlamaModel(EcMoeModelMixin, EcMoeLlamaPreTrainedModel, LlamaModel):
    decoder_layer_class = EcMoeLlamaDecoderLayer


class EcMoeLlamaForCausalLM(EcMoeForCausalLMMixin, EcMoeLlamaPreTrainedModel, LlamaForCausalLM, GenerationMixin):
    base_model_class = EcMoeLlamaModel


class EcMoeLlamaForSequenceClassification(EcMoeHeadMixin, EcMoeLlamaPreTrainedModel, LlamaForSequenceClassification):
    pass


class EcMoeLlamaForTokenClassification(EcMoeHeadMixin, EcMoeLlamaPreTrainedModel, LlamaForTokenClassification):
    pass


class EcMoeLlamaForQuestionAnswering(EcMoeHeadMixin, EcMoeLlamaPreTrainedModel, LlamaForQuestionAnswering):
    pass


class EcMoeMistralDecoderLayer(EcMoeDecoderLayerMixin, MistralDecoderLayer):
    pass


class EcMoeMistralPreTrainedModel(EcMoePreTrainedMixin, MistralPreTrainedModel):
    config: EcMoeMistralConfig
    _no_split_modules = ["EcMoeMistralDecoderLayer"]
    _can_record_outputs = MistralPreTrainedModel._can_record_outputs | _ROUTER_LOGITS


class EcMoeMistralModel(EcMoeModelMixin, EcMoeMistralPreTrainedModel, MistralModel):
    decoder_layer_class = EcMoeMistralDecoderLayer


class EcMoeMistralForCausalLM(EcMoeForCausalLMMixin, EcMoeMistralPreTrainedModel, MistralForCausalLM, GenerationMixin):
    base_model_class = EcMoeMistralModel


class EcMoeMistralForSequenceClassification(
    EcMoeHeadMixin, EcMoeMistralPreTrainedModel, MistralForSequenceClassification
):
    pass


class EcMoeMistralForTokenClassification(EcMoeHeadMixin, EcMoeMistralPreTrainedModel, MistralForTokenClassification):
    pass


class EcMoeMistralForQuestionAnswering(EcMoeHeadMixin, EcMoeMistralPreTrainedModel, MistralForQuestionAnswering):
    pass


class EcMoeQwen2DecoderLayer(EcMoeDecoderLayerMixin, Qwen2DecoderLayer):
    pass


class EcMoeQwen2PreTrainedModel(EcMoePreTrainedMixin, Qwen2PreTrainedModel):
    config: EcMoeQwen2Config
    _no_split_modules = ["EcMoeQwen2DecoderLayer"]
    _can_record_outputs = Qwen2PreTrainedModel._can_record_outputs | _ROUTER_LOGITS


class EcMoeQwen2Model(EcMoeModelMixin, EcMoeQwen2PreTrainedModel, Qwen2Model):
    decoder_layer_class = EcMoeQwen2DecoderLayer


class EcMoeQwen2ForCausalLM(EcMoeForCausalLMMixin, EcMoeQwen2PreTrainedModel, Qwen2ForCausalLM, GenerationMixin):
    base_model_class = EcMoeQwen2Model


class EcMoeQwen2ForSequenceClassification(EcMoeHeadMixin, EcMoeQwen2PreTrainedModel, Qwen2ForSequenceClassification):
    pass


class EcMoeQwen2ForTokenClassification(EcMoeHeadMixin, EcMoeQwen2PreTrainedModel, Qwen2ForTokenClassification):
    pass


class EcMoeQwen2ForQuestionAnswering(EcMoeHeadMixin, EcMoeQwen2PreTrainedModel, Qwen2ForQuestionAnswering):
    pass


class EcMoeQwen3DecoderLayer(EcMoeDecoderLayerMixin, Qwen3DecoderLayer):
    pass


class EcMoeQwen3PreTrainedModel(EcMoePreTrainedMixin, Qwen3PreTrainedModel):
    config: EcMoeQwen3Config
    _no_split_modules = ["EcMoeQwen3DecoderLayer"]
    _can_record_outputs = Qwen3PreTrainedModel._can_record_outputs | _ROUTER_LOGITS


class EcMoeQwen3Model(EcMoeModelMixin, EcMoeQwen3PreTrainedModel, Qwen3Model):
    decoder_layer_class = EcMoeQwen3DecoderLayer


class EcMoeQwen3ForCausalLM(EcMoeForCausalLMMixin, EcMoeQwen3PreTrainedModel, Qwen3ForCausalLM, GenerationMixin):
    base_model_class = EcMoeQwen3Model


class EcMoeQwen3ForSequenceClassification(EcMoeHeadMixin, EcMoeQwen3PreTrainedModel, Qwen3ForSequenceClassification):
    pass


class EcMoeQwen3ForTokenClassification(EcMoeHeadMixin, EcMoeQwen3PreTrainedModel, Qwen3ForTokenClassification):
    pass


class EcMoeQwen3ForQuestionAnswering(EcMoeHeadMixin, EcMoeQwen3PreTrainedModel, Qwen3ForQuestionAnswering):
    pass


MODEL_CLASSES: dict[type[PreTrainedConfig], dict[str, type[PreTrainedModel]]] = {
    EcMoeLlamaConfig: {
        "AutoModel": EcMoeLlamaModel,
        "AutoModelForCausalLM": EcMoeLlamaForCausalLM,
        "AutoModelForSequenceClassification": EcMoeLlamaForSequenceClassification,
        "AutoModelForTokenClassification": EcMoeLlamaForTokenClassification,
        "AutoModelForQuestionAnswering": EcMoeLlamaForQuestionAnswering,
    },
    EcMoeMistralConfig: {
        "AutoModel": EcMoeMistralModel,
        "AutoModelForCausalLM": EcMoeMistralForCausalLM,
        "AutoModelForSequenceClassification": EcMoeMistralForSequenceClassification,
        "AutoModelForTokenClassification": EcMoeMistralForTokenClassification,
        "AutoModelForQuestionAnswering": EcMoeMistralForQuestionAnswering,
    },
    EcMoeQwen2Config: {
        "AutoModel": EcMoeQwen2Model,
        "AutoModelForCausalLM": EcMoeQwen2ForCausalLM,
        "AutoModelForSequenceClassification": EcMoeQwen2ForSequenceClassification,
        "AutoModelForTokenClassification": EcMoeQwen2ForTokenClassification,
        "AutoModelForQuestionAnswering": EcMoeQwen2ForQuestionAnswering,
    },
    EcMoeQwen3Config: {
        "AutoModel": EcMoeQwen3Model,
        "AutoModelForCausalLM": EcMoeQwen3ForCausalLM,
        "AutoModelForSequenceClassification": EcMoeQwen3ForSequenceClassification,
        "AutoModelForTokenClassification": EcMoeQwen3ForTokenClassification,
        "AutoModelForQuestionAnswering": EcMoeQwen3ForQuestionAnswering,
    },
}

# Here and not in __init__.py, which is not copied beside a checkpoint: with remote code the heads build their base
# model through AutoModel, and a model that is saved again copies its code only if its class says which Auto class
# it belongs to.
for _config_class, _model_classes in MODEL_CLASSES.items():
    AutoModel.register(_config_class, _model_classes["AutoModel"], exist_ok=True)
    _config_class.register_for_auto_class()
    for _auto_class, _model_class in _model_classes.items():
        _model_class.register_for_auto_class(_auto_class)

if EPImplementationInterface is not None:
    EPImplementationInterface.register("equal_splits", EqualSplitsEP)

__all__ = [model.__name__ for models in MODEL_CLASSES.values() for model in models.values()]
