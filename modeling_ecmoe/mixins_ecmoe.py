"""What every expert-choice family adds to its dense classes, as mixins: layer, base model, heads.

Shapes: B batch, S sequence, D hidden size, E experts.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import OutputRecorder

from .adapters_ecmoe import forget_text
from .block_ecmoe import EcMoeBlock
from .context_ecmoe import announce_tokens, use_inference_routing
from .documents_ecmoe import lengths_of_documents, tell_documents
from .experts_ecmoe import EcMoeFFN, EcMoeRaggedExperts
from .notices_ecmoe import (
    refuse_reentrant_checkpointing,
    require_experts,
    require_own_config,
    require_own_folder,
    warn_frozen_experts,
    warn_training_loss,
    warn_unquantized,
)
from .quantized_ecmoe import Stacked4bit
from .quantizer_ecmoe import Bnb4BitHfQuantizer, allow_saving, close, make_room, prepare
from .router_ecmoe import EcMoeRouter
from .routing_ecmoe import router_z_loss
from .versions_ecmoe import CACHE, slice_logits_to_keep

logger = logging.get_logger(__name__)


_loss_function: Any = PreTrainedModel.loss_function.fget  # type: ignore[attr-defined]  # a compiler traces no super()'s


class EcMoeDecoderLayerMixin:
    """A dense decoder layer whose `mlp` is the sparse block, and which hands the real tokens to it.

    ffn_class: the dense FFN, where the layer's own class builds a mixture; None where it builds the FFN.
    stateful_mixers: by their names in a layer, the token mixers that carry a state from token to token, each a
        `ByDocument`.
    """

    ffn_class: type[nn.Module] | None = None
    stateful_mixers: dict[str, type[nn.Module]] = {}

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.mlp_layer_types[layer_idx] == "sparse":
            self.mlp = EcMoeBlock(config, self.make_ffn, config.ffn_width_multiple(layer_idx))
        elif self.ffn_class is not None:
            self.mlp = self.make_ffn(config)
        for name, mixer_class in self.stateful_mixers.items():
            if hasattr(self, name):
                setattr(self, name, mixer_class(config, layer_idx))

    def make_ffn(self, config: Any) -> nn.Module:
        """A dense FFN of this layer; the shared expert is one of its own width."""
        if self.ffn_class is not None:
            return self.ffn_class(config)
        return (
            type(self.get_submodule(config.dense_ffn.place))(config) if config.dense_ffn.has_class else EcMoeFFN(config)
        )

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        token_mask: Tensor | None = None,
        document_lengths: list[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """token_mask: [B, S] bool, True for real tokens. document_lengths: of all rows, where documents are packed and
        a layer carries a state. Keywords, so that a recomputed layer gets them again."""
        if document_lengths is not None:
            with tell_documents(self, document_lengths, kwargs.get(CACHE)):
                return self._forward(hidden_states, token_mask, *args, **kwargs)
        return self._forward(hidden_states, token_mask, *args, **kwargs)

    def _forward(self, hidden_states: Tensor, token_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(getattr(self, "mlp", None), EcMoeBlock) or torch.compiler.is_compiling():
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

    supports_pipeline = True  # whether Transformers' pipeline computes the same, for the dense family to begin with

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any) -> Any:
        """As Transformers', which would cut any model into stages; here and not later, where other ranks wait."""
        if distributed_config is not None and distributed_config.pp_size > 1 and not model.supports_pipeline:
            raise ValueError(
                f"pp_size={distributed_config.pp_size}: Transformers' pipeline computes something else for "
                f"{model.config.model_type.removeprefix('ecmoe_')} models, the dense ones too; use tp_size or fsdp_size"
            )
        if distributed_config is not None and any(getattr(m, "loads_in_4bit", None) for m in model.modules()):
            raise ValueError(
                "quantization_config with load_in_4bit=True: experts in 4 bits are whole on one device; leave "
                "distributed_config out"
            )
        return super().maybe_distribute_model(model, distributed_config, *args)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Transformers looks for `@use_experts_implementation` in the family's file; it stands in experts_ecmoe.py."""
        return True

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As Transformers', which looks for the code to copy where the class is: not torch's class under FSDP2."""
        self.__module__ = next(c.__module__ for c in type(self).__mro__ if not c.__module__.startswith("torch."))
        super().save_pretrained(*args, **kwargs)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """As Transformers', asked before weights are given to devices by their size, which in 4 bits is another one."""
        config = getattr(self.config, "quantization_config", None)
        if getattr(self, "is_quantized", False) and getattr(config, "load_in_4bit", False):
            make_room(self, config)
        return super()._get_dtype_plan(dtype)

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As Transformers'; refuses a checkpoint without experts; says which text the thresholds were measured on, at
        the level "info", for a model is loaded often; and where a quantiser passes the experts by, says so while there
        is memory left."""
        require_own_folder(model)
        measured_on = model.config.get_text_config().thresholds_from
        logger.info(f"Thresholds from: {measured_on or 'training, or never calibrated'}")
        quantizer = load_config.hf_quantizer
        in_4bit = isinstance(quantizer, Bnb4BitHfQuantizer)
        if in_4bit:
            prepare(model, quantizer, checkpoint_files, state_dict)
        if quantizer is not None:
            warn_unquantized(model, quantizer, load_config.dtype)
        loaded = super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        if in_4bit:
            close(model, quantizer.quantization_config)
        if quantizer is not None:
            allow_saving(model)
        require_experts(model, loaded[0].missing_keys, loaded[0].unexpected_keys)
        for module in model.modules():  # of adapters, which come this way too
            if isinstance(module, EcMoeBlock):
                forget_text(module)
        return loaded

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """As Transformers', in bytes, experts in 4 bits by what they are made of."""
        size: int = super().get_memory_footprint(return_buffers)
        stacks = [weight for weight in self.parameters() if isinstance(weight, Stacked4bit)]
        return size + sum(stack.nbytes - stack.numel() * stack.element_size() for stack in stacks)

    def num_parameters(
        self, only_trainable: bool = False, exclude_embeddings: bool = False, only_active: bool = False
    ) -> int:
        """As Transformers'. only_active: those that a token meets on average: of the routed experts'
        capacity_factor / num_experts, of all else everything."""
        total: int = super().num_parameters(only_trainable, exclude_embeddings)
        if not only_active:
            return total
        experts = [module for module in self.modules() if isinstance(module, EcMoeRaggedExperts)]
        held = [parameter for module in experts for parameter in module.parameters()]
        routed = sum(parameter.numel() for parameter in held if parameter.requires_grad or not only_trainable)
        config = self.config.get_text_config()
        return total - round(routed * (1 - config.mean_experts_per_token / config.num_experts))

    @property
    def loss_function(self) -> Any:
        """As Transformers', asked for where labels are given; in train mode without gradients says what it is not."""
        if not torch.compiler.is_compiling():
            warn_training_loss(self)
        return _loss_function(self)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    def train(self, mode: bool = True) -> Any:
        """As torch's; where PEFT's adapters leave the experts frozen, says so."""
        if mode:
            warn_frozen_experts(self)
        return super().train(mode)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """As for Transformers' own classes: it passes by what holds no parameter itself in classes of others, and with
        it GPT-2's initialisation of what is added to the residual."""
        super()._initialize_weights(module, False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, EcMoeRaggedExperts):
            for name, parameter in module.named_parameters():
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                elif name in self.config.expert_parameters:  # an activation may have parameters of its own
                    init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, EcMoeRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            for buffer in module.buffers():
                init.zeros_(buffer)


class EcMoeModelMixin:
    """The base model: the dense one with other layers, its padding mask handed down to them."""

    decoder_layer_class: Callable[[Any, int], nn.Module]  # one class, or a function where layers differ in theirs
    carries_state = False  # whether some of its token mixers do

    def __init__(self, config: Any) -> None:
        require_own_config(type(self), config)
        config.validate()  # fields set one after the other, as from_pretrained sets them, may not go together
        # The dense constructor makes embedding, norm and rotary embedding; its layers give way to ours. Under
        # from_pretrained that happens on the meta device and costs nothing.
        super().__init__(config)
        layers = (self.decoder_layer_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.set_submodule(config.dense_ffn.layers, nn.ModuleList(layers))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast | tuple:
        """As the dense model's. token_mask [B, S] bool, True for real tokens; read off a 2-D attention_mask.
        past_key_values: the cache, as Transformers before 5.24 calls it; either name will do."""
        cache = past_key_values if cache is None else cache
        inputs = input_ids if input_ids is not None else inputs_embeds
        if token_mask is None and inputs is not None:
            token_mask = token_mask_of(attention_mask, inputs)
            # Layers that are their own FFN may hand on tokens without their rows.
            if token_mask is None and not self.config.dense_ffn.place:
                token_mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        if self.carries_state and inputs is not None:
            kwargs["document_lengths"] = lengths_of_documents(inputs, position_ids, attention_mask, cache)
        if getattr(self.config, "num_kv_shared_layers", 0):
            refuse_reentrant_checkpointing(self)
        with announce_tokens(self, token_mask):
            outputs = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                token_mask=token_mask,
                **kwargs,
            )
        if isinstance(outputs, tuple):
            return outputs
        if type(outputs).__dataclass_fields__.keys() <= MoeModelOutputWithPast.__dataclass_fields__.keys():
            return MoeModelOutputWithPast(**outputs)
        outputs.router_logits = getattr(outputs, "router_logits", None)  # of a class that says more, as Gemma-4's
        return outputs


def token_mask_of(attention_mask: Any, inputs: Tensor) -> Tensor | None:
    """[B, S] bool, True for real tokens, of a 2-D attention mask; of any other mask None.

    inputs: [B, S, ...]. With a cache the mask covers past tokens too; the last S columns are the tokens at hand.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -inputs.shape[1] :].bool()


def share_of_step(labels: Tensor, num_items: Any) -> Any:
    """What a loss that is a mean is multiplied by: over several micro-batches the loss is a share of the step's
    predicted tokens, `num_items`, and so is this; None is a step of its own."""
    predicted = labels != -100  # the first label of a row is predicted by nothing
    return 1 if num_items is None else predicted[..., 1:].sum() / num_items


class EcMoeLanguageModelMixin:
    """What a model that generates adds to its dense class, whatever it reads: router losses, causal routes."""

    def _has_router_loss(self) -> bool:
        config = self.config.get_text_config()
        return config.router_z_loss_coef > 0 or config.router_aux_loss_coef > 0

    def router_losses(
        self, router_logits: tuple[Tensor, ...], token_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Token choice's balance loss (None otherwise), and what the coefficients add to the loss."""
        config = self.config.get_text_config()
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
        # Layer by layer, as the paper has it. Over the tokens of all layers together, as Transformers' models take it,
        # an expert that is overloaded in one layer and idle in the next looks balanced.
        losses: list[Any] = [
            load_balancing_loss_func((logits,), config.num_experts, int(config.capacity_factor), token_mask)
            for logits in router_logits
        ]
        balance = torch.stack(losses).mean()
        return balance, added + config.router_aux_loss_coef * balance

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' `generate`, routed causally also when the model was left in train mode."""
        with use_inference_routing(self):
            return super().generate(*args, **kwargs)


class EcMoeForCausalLMMixin(EcMoeLanguageModelMixin):
    """The language model: the dense head, the router logits among the outputs, causal routes in `generate`."""

    base_model_class: type[PreTrainedModel]

    def __init__(self, config: Any) -> None:
        require_own_config(type(self), config)
        PreTrainedModel.__init__(self, config)  # not the dense constructor, which would build the dense model
        setattr(self, self.base_model_prefix, self.base_model_class(config))
        self.vocab_size = config.vocab_size
        self.lm_head = self.make_head(config)
        self.post_init()

    def make_head(self, config: Any) -> nn.Linear:
        """The family's output layer; some have a bias or another width."""
        return nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As the dense model's, with `router_logits` (one [B * S, E] per sparse layer) when they are asked for.

        In training the z-loss and, for token choice, the balance loss join the loss by their coefficients;
        `aux_loss` is the balance loss by itself.
        """
        asked = kwargs.pop("output_router_logits", None)
        asked = self.config.output_router_logits if asked is None else asked
        adds_loss = self.training and labels is not None and self._has_router_loss()
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=asked or adds_loss,
            **kwargs,
        )
        logits = self.scale_logits(self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)))
        loss: Any = None
        aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if asked or adds_loss:
            mask = token_mask_of(attention_mask, outputs.last_hidden_state)
            aux_loss, router_loss = self.router_losses(outputs.router_logits, kwargs.get("token_mask", mask))
            if adds_loss and labels is not None:
                loss = loss + share_of_step(labels, kwargs.get("num_items_in_batch")) * router_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if asked else None,
        )

    def scale_logits(self, logits: Tensor) -> Tensor:
        """What the dense family does to its logits: nothing, unless a family says otherwise."""
        return logits


class EcMoeHeadMixin:
    """A head on the base model, which Transformers builds through AutoModel.

    As remote code a head's config may come from another copy of the configuration module than the one that this file
    registered, so the class at hand is registered before it is needed.
    """

    base_models: dict[str, type[PreTrainedModel]] = {}  # by model_type; each family adds its own

    def __init__(self, config: Any) -> None:
        require_own_config(type(self), config)
        AutoModel.register(type(config), self.base_models[type(config).model_type], exist_ok=True)
        super().__init__(config)

    def get_input_embeddings(self) -> nn.Module:
        """Those of the base model, which knows what they are called; Transformers' generic heads take Llama's name."""
        return self.base_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.set_input_embeddings(value)


ROUTER_LOGITS = {"router_logits": OutputRecorder(EcMoeRouter, index=0)}
