"""Composites: models of Transformers that read images, videos or sound too, around a text decoder of our families.

Only the decoder is ours. Towers, projectors, where the features of an image go and which tokens see each other are the
dense class's; each token that reaches the decoder, of a text or of an image, is a token to its routers.

Shapes: B rows, S tokens of a row, E experts.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_ecmoe import COMPOSITE_AUTO_CLASSES, CONVERT_FIRST, EcMoeConfigMixin, EcMoeFolderMixin
from .mixins_ecmoe import EcMoeHeadMixin, EcMoeLanguageModelMixin, share_of_step, token_mask_of
from .notices_ecmoe import require_own_config
from .router_ecmoe import EcMoeRouter


class EcMoeCompositeConfigMixin(EcMoeFolderMixin):
    """The config of a composite: the dense one, with a `text_config` of one of our families.

    text_config_classes: those that its decoder may have; the first is that of a text_config without a model_type.
    """

    auto_classes = COMPOSITE_AUTO_CLASSES
    text_config_classes: ClassVar[tuple[Any, ...]] = ()

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = self._own_text_config(self.text_config)
        super().__post_init__(**kwargs)

    def _own_text_config(self, given: Any) -> Any:
        """The config of the decoder, made of what a config.json says of it.

        Raises:
            ValueError: for a decoder without experts, or of a family that this composite cannot have.
        """
        if isinstance(given, EcMoeConfigMixin):
            return given
        if given is not None and not isinstance(given, dict):
            raise ValueError(
                f"text_config={type(given).__name__} is no config of a decoder with experts. To make experts of a "
                f"dense model, {CONVERT_FIRST}"
            )
        fields = dict(given or {})
        known = {config_class.model_type: config_class for config_class in self.text_config_classes}
        model_type = fields.pop("model_type", next(iter(known)))
        own = known.get(model_type) or known.get(f"ecmoe_{model_type}")
        if own is None:
            raise ValueError(
                f"text_config.model_type={model_type} is no decoder of {type(self).__name__}, which takes "
                f"{', '.join(known)}"
            )
        return own(**fields)


class EcMoeCompositeModelMixin:
    """The base model of a composite: the dense one, whose decoder is built from our config of it."""

    def __init__(self, config: Any) -> None:
        require_own_config(type(self), config.get_text_config())
        # As a head does: in remote code the config may be another copy's than the one that its file registered.
        text_class = type(config.text_config)
        AutoModel.register(text_class, EcMoeHeadMixin.base_models[text_class.model_type], exist_ok=True)
        super().__init__(config)


class EcMoeForConditionalGenerationMixin(EcMoeLanguageModelMixin):
    """The composite with its language head: the dense one, on our base model."""

    base_model_class: type[PreTrainedModel]

    def __init__(self, config: Any) -> None:
        require_own_config(type(self), config.get_text_config())
        PreTrainedModel.__init__(self, config)  # not the dense constructor, which would build the dense model
        setattr(self, self.base_model_prefix, self.base_model_class(config))
        text = config.get_text_config()
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


def hands_token_mask(dense_forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a base model that makes the decoder's attention masks itself, so that the decoder could not tell
    any more which tokens are padding: it is told by `token_mask` [B, S] bool, True for real tokens, text or image."""
    names = [*inspect.signature(dense_forward).parameters][1:]

    @functools.wraps(dense_forward)
    def forward(self: Any, *args: Any, token_mask: Tensor | None = None, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if token_mask is None:
            token_mask = _token_mask(given)
        # Gemma-4 would leave the other tokens out of its last layers: those whose routes are looked at, and the mask's.
        given.pop("logits_to_keep", None)
        return dense_forward(self, **given, token_mask=token_mask)

    return forward


def with_router_losses(dense_forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a composite with its head, which as that of a text model has `router_logits` among its outputs,
    one [B * S, E] per sparse layer, when they are asked for, and adds router losses to the loss in training."""
    names = [*inspect.signature(dense_forward).parameters][1:]

    @functools.wraps(dense_forward)
    @can_return_tuple
    def forward(self: Any, *args: Any, output_router_logits: bool | None = None, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        labels, asked = given.get("labels"), output_router_logits
        asked = self.config.get_text_config().output_router_logits if asked is None else asked
        adds_loss = self.training and labels is not None and self._has_router_loss()
        if not (asked or adds_loss):
            return dense_forward(self, **given, return_dict=True)
        with _router_logits(self) as router_logits:
            outputs = dense_forward(self, **given, return_dict=True)
        mask = given["token_mask"] if "token_mask" in given else _token_mask(given)
        outputs["aux_loss"], router_loss = self.router_losses(tuple(router_logits), mask)
        if adds_loss:
            share = share_of_step(labels, given.get("num_items_in_batch"))
            outputs["loss"] = outputs["loss"] + share * router_loss.to(outputs["loss"].device)
        if asked:
            outputs["router_logits"] = tuple(router_logits)
        return outputs

    return forward


def _token_mask(given: dict[str, Any]) -> Tensor | None:
    """[B, S] bool of a call's arguments, True for real tokens; None where they say nothing of padding."""
    inputs = given.get("input_ids")
    inputs = given.get("inputs_embeds") if inputs is None else inputs
    return None if inputs is None else token_mask_of(given.get("attention_mask"), inputs)


@contextlib.contextmanager
def _router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """The logits of every router that is run while the context is open; the dense base model hands none out."""
    found: list[Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, EcMoeRouter)]
    handles = [
        router.register_forward_hook(lambda _module, _args, output: found.append(output[0])) for router in routers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
