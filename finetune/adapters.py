"""LoRA adapters on attention and on the stacked experts, with PEFT; what PEFT cannot do there is refused."""

from dataclasses import fields
from typing import Any

import peft
import torch
from torch import nn

from modeling_ecmoe.block_ecmoe import EcMoeBlock
from modeling_ecmoe.quantized_ecmoe import Stacked4bit

from .errors import RecipeError
from .recipe import refuse_unknown
from .sources import say

# PEFT adapts a stacked parameter by adding to it, in every layer: what these fields may be there, the default first.
_POSSIBLE_ON_EXPERTS: dict[str, tuple[Any, ...]] = {
    "lora_dropout": (0,),
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian"),
    "layers_to_transform": (None,),
}
_FIELDS = [item.name for item in fields(peft.LoraConfig) if item.init]


def add_lora(model: Any, lora: dict[str, Any]) -> Any:
    """The model with LoRA adapters; everything else is frozen.

    Where nothing is named, an expert-choice model gets adapters on attention and on the routed experts, and its
    router is trained and saved with them, so that the thresholds are in the adapter's file; a dense model gets them
    on every linear layer.

    Raises:
        RecipeError: for an unknown field, for what PEFT cannot do on stacked experts, and when the routed experts
            were asked for and stay frozen.
    """
    refuse_unknown(lora, _FIELDS, "lora (peft.LoraConfig)")
    if str(lora.get("peft_type", "LORA")).upper() != "LORA":  # which LoraConfig would take and pass over
        raise RecipeError(f"lora.peft_type={lora['peft_type']!r} is another method than LoRA; leave it out")
    for field in ("target_parameters", "modules_to_save"):
        if not isinstance(lora.get(field) or [], list):
            raise RecipeError(f"lora.{field}={lora[field]!r} must be a list of names")
    has_experts = any(isinstance(module, EcMoeBlock) for module in model.modules())
    names_nothing = not lora.keys() & {"target_modules", "target_parameters"}
    defaults: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32}
    if names_nothing and has_experts:
        defaults |= {"target_modules": attention_modules(model), "target_parameters": stacked_experts(model)}
        if not defaults["target_modules"]:
            say(
                "adapters are on the experts alone: PEFT adapts the Conv1D layers of this attention or stacked "
                "experts, not both; lora.target_modules names the others"
            )
    elif names_nothing:
        defaults["target_modules"] = "all-linear"
    settings = defaults | lora
    if has_experts:  # whatever else is saved: without the gate an adapter would lose the thresholds it was trained with
        settings["modules_to_save"] = sorted({*(settings.get("modules_to_save") or []), "gate"})
    named = _named_parameters(model, settings)
    experts = [name for name in named if ".experts." in name]
    if experts:
        _refuse_impossible(settings)
        _refuse_quantized(model, experts)
    if any(".gate." in name for name in named):
        raise RecipeError(
            f"lora.target_parameters={settings['target_parameters']} names the router, which is trained whole, with "
            "its thresholds, beside the adapters; take it out"
        )
    if has_experts:
        _refuse_experts_as_modules(model, settings)
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecipeError(f"lora={lora}: PEFT refuses it: {' '.join(str(error).split())}") from error
    trained = [name for name, p in adapted.named_parameters() if ".experts." in name and p.requires_grad]
    if len(trained) < 2 * len(experts):
        raise RecipeError(
            f"lora.target_parameters={settings['target_parameters']} names the routed experts, and some stay frozen; "
            f"name them as {stacked_experts(model)}"
        )
    return adapted


def train_in_float32(model: nn.Module) -> None:
    """Puts what is trained beside frozen 16-bit weights into float32: PEFT does so with its adapters, and not with the
    modules that it copies whole. A router computes in float32 whatever its weights are."""
    for name, parameter in model.named_parameters():
        if (
            parameter.requires_grad
            and group_of(name) == "router"
            and parameter.dtype in (torch.bfloat16, torch.float16)
        ):
            parameter.data = parameter.data.float()


def attention_modules(model: nn.Module) -> list[str]:
    """The names of the linear layers of attention, whatever the family calls them. GPT-2's Conv1D are none: PEFT adapts
    either these or stacked parameters."""
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return sorted({name.rpartition(".")[2] for name in linear if any(mark in name for mark in _GROUPS["attention"])})


def stacked_experts(model: nn.Module) -> list[str]:
    """The stacked weights of the routed experts, as `target_parameters` takes them; biases cannot be adapted."""
    blocks = (module for module in model.modules() if isinstance(module, EcMoeBlock))
    weights = {name for block in blocks for name, weight in block.experts.named_parameters() if weight.dim() == 3}
    return [f"mlp.experts.{name}" for name in sorted(weights, reverse=True)]


def _named_parameters(model: nn.Module, settings: dict[str, Any]) -> list[str]:
    """The parameters that `target_parameters` names, by PEFT's rule.

    Raises:
        RecipeError: for a name that is no parameter's; PEFT says nothing as long as another one is found.
    """
    names = [name for name, _ in model.named_parameters()]
    targets = settings.get("target_parameters") or []
    found = {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets}
    for target, matches in found.items():
        if not matches:
            raise RecipeError(
                f"lora.target_parameters names {target!r}, which is no parameter of the model; routed experts are "
                f"{stacked_experts(model)}"
            )
    return sorted({name for matches in found.values() for name in matches})


def _refuse_impossible(settings: dict[str, Any]) -> None:
    for name, possible in _POSSIBLE_ON_EXPERTS.items():
        if settings.get(name, possible[0]) not in possible:
            raise RecipeError(
                f"lora.{name}={settings[name]!r} is not possible on stacked experts: PEFT adds the adapter to the "
                f"weights of every layer; set {name}={possible[0]!r}, or leave the experts out of "
                "lora.target_parameters"
            )


def _refuse_quantized(model: nn.Module, experts: list[str]) -> None:
    """The sum of weight and adapter has no quantised form, and PEFT would find out in the first forward pass. What
    bitsandbytes has in 4 bits is added to row by row."""
    kind = type(model.get_parameter(experts[0]))
    if kind not in (nn.Parameter, Stacked4bit):
        raise RecipeError(
            f"lora.target_parameters names experts that are quantised ({kind.__name__}), and PEFT cannot add adapters "
            "to them; train on the checkpoint before it was quantised with quantization=4bit, or on one whose experts "
            "were left out"
        )


def _refuse_experts_as_modules(model: nn.Module, settings: dict[str, Any]) -> None:
    """A stacked weight is no linear layer: named as a module it would stay frozen, or be adapted, without a word."""
    stacked = stacked_experts(model)
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    weights = {name.rpartition(".")[2] for name in stacked} - linear
    for field in ("target_modules", "exclude_modules"):
        targets = settings.get(field) or []
        named = [targets] if isinstance(targets, str) else list(targets)
        if any(("expert" in name and "shared" not in name) or name in weights for name in named):
            raise RecipeError(
                f"lora.{field}={targets!r} names the stacked experts, which are no linear layers; they are adapted "
                f"when lora.target_parameters names {stacked}, and only then"
            )
    if settings.get("target_modules") == "all-linear" and not settings.get("target_parameters"):
        raise RecipeError(
            "lora.target_modules='all-linear' leaves the routed experts frozen, for stacked experts are no linear "
            f"layers; add target_parameters={stacked}, or name the modules to adapt"
        )


_GROUPS: dict[str, tuple[str, ...]] = {
    "router": (".mlp.gate.",),
    "routed experts": (".mlp.experts.",),
    "shared expert": (".mlp.shared_expert.",),
    "attention": (".self_attn.", ".self_attention.", ".attention.", ".attn."),
    "dense FFN": (".mlp.", ".fc1.", ".fc2."),
    "embedding": ("embed_tokens", "embed_in", ".wte.", ".wpe.", "word_embeddings", "embed_positions"),
    "head": ("lm_head",),
}
_ADDED = ("lora_", "trainable_tokens_")  # the parameters of PEFT's adapters begin so


def group_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return next((group for group, marks in _GROUPS.items() if any(mark in name for mark in marks)), "other")


def size_of(parameter: nn.Parameter) -> int:
    """How many numbers a parameter has, also where DeepSpeed ZeRO-3 has taken them away for the moment."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def is_of_base(name: str) -> bool:
    """False of what PEFT adds to a model: adapters, and the trained copies of modules that are saved whole."""
    return not any(part == "modules_to_save" or part.startswith(_ADDED) for part in name.split("."))


def trained_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameters of each part: how many are trained, adapters among them, and how many the base model has."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        trained, total = counts.get(group_of(name), (0, 0))
        size = size_of(parameter)
        counts[group_of(name)] = (trained + size * parameter.requires_grad, total + size * is_of_base(name))
    return counts
