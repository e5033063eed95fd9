"""Upcycling a model that is in memory: what `convert` writes into a folder becomes a model beside the dense one."""

import copy
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_ecmoe import calibrate_thresholds, sparse_blocks

from ..checkpoints.memory import ModelInMemory
from ..checkpoints.source import Source
from ..checkpoints.writer import PlannedTensor
from ..errors import ConversionError
from .measure import ESTIMATED, estimated_thresholds, one_per_replica
from .notes import notes_on
from .plan import Plan, plan_conversion
from .settings import MIXTURE_TYPES, Settings

logger = logging.getLogger(__name__)


@torch.no_grad()
def upcycle(
    model: PreTrainedModel,
    num_experts: int | None = None,
    init: str | None = None,
    capacity_factor: float | None = None,
    layers: str | list[int] = "all",
    seed: int = 0,
    calibrate_on: Iterable[Mapping[str, Tensor]] | Iterable[str] | None = None,
    tokenizer: Any = None,
    ratio: float | None = None,
    granularity: int | None = None,
    mix_with: list[PreTrainedModel] | None = None,
    mix_attention: str = "average",
    routing: str | None = None,
    min_experts_per_token: int | None = None,
    max_experts_per_token: int | None = None,
) -> PreTrainedModel:
    """Makes the expert-choice model of a dense one in memory, as `convert` does from folder to folder.

    Every tensor that both models have is shared, not copied, as `peft.get_peft_model` keeps the weights of its base:
    training one of them changes the other, while each is moved, cast and frozen by itself. The new tensors lie on the
    device of the layer they belong to and have its dtype. The same options and seed give the bits that `convert`
    writes. A model on the meta device gives shapes alone.

    Args:
        model: a causal language model of a family in `modeling_ecmoe.families()`, or a mixture; left as it is.
        num_experts: experts in each layer; None is 8, and with init="mix" one for each model.
        init: how experts come from the dense FFN, a key of `initialisations.INITIALISATIONS`; None is "shared".
        capacity_factor: mean experts per token; None is 1, and with init="granular" the shards of one FFN.
        layers: "all", "every-second", "last-half", or a list such as [1, 3, 5]; the others stay dense.
        seed: of the router weights and of drawn expert weights.
        calibrate_on: batches of `input_ids` [B, S] and, with padding, `attention_mask`, or texts with their tokenizer,
            on which the thresholds are measured. Without it they are estimated from the router's weights, which is
            said: train, or call `calibrate_thresholds`, before judging the model.
        tokenizer: of the texts.
        ratio: of the initialisations noise, drop and split; None is their default.
        granularity: shards per dense FFN of the initialisation granular; None is 2.
        mix_with: the other models of init="mix".
        mix_attention: what is not an FFN in init="mix": the "average" of all models or that of the "first".
        routing, min_experts_per_token, max_experts_per_token: of a model that is a mixture already, as in `convert`.

    Returns:
        The expert-choice model, in the mode of the dense one.

    Raises:
        ConversionError: for anything the user can put right.
    """
    settings = Settings(init, num_experts, capacity_factor, ratio, granularity, layers, "normal", mix_attention, seed)
    bounds: Any = {"min_experts_per_token": min_experts_per_token, "max_experts_per_token": max_experts_per_token}
    settings = replace(settings, routing=routing, **bounds)
    if getattr(getattr(model, "config", None), "model_type", None) not in MIXTURE_TYPES:
        settings.check(1 + len(mix_with or []))
    if tokenizer is not None and calibrate_on is None:
        raise ConversionError("tokenizer is for the texts of calibrate_on, and there are none; leave it out")
    if isinstance(model, str | os.PathLike):
        raise ConversionError(
            f"model={model} is a name, and this takes a model in memory; load it, or use ecmoe.convert"
        )
    dense = ModelInMemory(model)
    if dense.is_on_meta and calibrate_on is not None:
        raise ConversionError("calibrate_on needs weights, and the model is on the meta device; leave it out")
    sources: list[Source] = [dense, *map(ModelInMemory, mix_with or [])]
    plan = plan_conversion(sources, settings)
    for note in notes_on(plan):
        logger.warning(note)
    for source in sources:
        source.check_tied(plan.tied)
    converted: Any = plan.model
    for planned in plan.tensors:
        _set(converted, planned.name, _made(planned, dense))
    _share_the_rest(converted, model)
    converted.tie_weights()
    converted.config._attn_implementation = model.config._attn_implementation
    converted.config.name_or_path = ""  # it is not the dense checkpoint
    converted.generation_config = copy.deepcopy(model.generation_config)
    if getattr(model, "is_activation_checkpointing", False):  # Transformers' word from 5.22 on
        converted.activation_checkpointing_enable()
    places = getattr(model, "hf_device_map", None) or {}
    if len(set(places.values())) > 1:
        from accelerate import dispatch_model  # whoever has such a model has it

        converted = dispatch_model(converted, places)
    converted.train(model.training)
    if not dense.is_on_meta and plan.config.routing != "token_choice":
        _set_thresholds(plan, converted, calibrate_on, tokenizer)
    return converted


def _made(planned: PlannedTensor, source: ModelInMemory) -> Tensor:
    """The source's own tensor where it is the same one; otherwise a new one, filled piece by piece."""
    if planned.same_as is not None:
        return source.tensors[planned.same_as]
    made = torch.empty(planned.shape, dtype=planned.dtype, device=_device_of(planned, source))
    flat, begin = made.view(-1), 0
    if not made.is_meta:
        for piece in planned.pieces():
            flat[begin : begin + piece.numel()].view(piece.shape).copy_(piece)
            begin += piece.numel()
    return made


def _device_of(planned: PlannedTensor, source: ModelInMemory) -> torch.device:
    """That of what it is made of; a router is made of nothing, and lies where its layer does."""
    layer = planned.name.partition(".mlp.")[0]
    name = next(iter(planned.sources), None) or next(n for n in source.tensors if n.startswith(f"{layer}."))
    return source.tensors[name].device


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor in the place of the parameter or buffer of that name."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute in module._parameters:
        # Not the dense model's own Parameter: what moves, casts or freezes one model leaves the other as it is.
        learns = getattr(tensor, "requires_grad", True) if isinstance(tensor, nn.Parameter) else True
        module._parameters[attribute] = nn.Parameter(tensor.detach(), requires_grad=learns)
    else:
        module._buffers[attribute] = tensor


def _share_the_rest(converted: nn.Module, model: nn.Module) -> None:
    """What no checkpoint holds and the dense model has computed: the frequencies of rotary embeddings, and for which
    length they were computed last."""
    dense = dict(model.named_modules())
    for name, module in converted.named_modules():
        counterpart, found = dense.get(name), {}
        for held in (module._buffers, vars(module)):
            for attribute, value in held.items():
                if isinstance(value, Tensor) and value.is_meta and hasattr(counterpart, attribute):
                    found[attribute] = held[attribute] = getattr(counterpart, attribute)
        if found:
            plain = (int, float, str, bool, Tensor, type(None))
            state = {name: value for name, value in vars(counterpart).items() if isinstance(value, plain)}
            vars(module).update(state)


def _set_thresholds(plan: Plan, converted: Any, calibrate_on: Any, tokenizer: Any) -> None:
    if calibrate_on is None:
        for name, value in estimated_thresholds(plan, None).items():
            converted.get_buffer(name).copy_(value)
        plan.config.thresholds_from = ESTIMATED
        logger.warning(
            "The thresholds are estimates from the router's weights: train, or give calibrate_on or call "
            "calibrate_thresholds with text the model is meant for, before judging the model"
        )
        return
    try:
        calibrate_thresholds(converted, calibrate_on, tokenizer, "text given to upcycle")
    except ValueError as error:
        raise ConversionError(f"calibrate_on: {error}") from error
    for block in sparse_blocks(converted).values():
        block.gate.threshold.copy_(one_per_replica(block.gate.threshold, plan.settings.num_shards))
