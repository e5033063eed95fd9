"""What happens without a word otherwise: quantisers and adapters that pass the experts by, a dense checkpoint without
experts, a loss that is not causal."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from .block_ecmoe import EcMoeBlock
from .configuration_ecmoe import CONVERT_FIRST, EcMoeConfigMixin
from .experts_ecmoe import EcMoeRaggedExperts
from .names_ecmoe import layer_number
from .router_ecmoe import EcMoeRouter

logger = logging.get_logger(__name__)


def warn_unquantized(model: nn.Module, quantizer: Any, dtype: torch.dtype | None) -> None:
    """Says which share of the weights a quantiser leaves alone, before they are loaded and memory runs out.

    Most quantisers convert `nn.Linear` only. Experts that one has replaced by modules of its own are not counted, nor
    those that it was told to skip.

    Args:
        model: as the quantiser has prepared it, still without weights.
        quantizer: Transformers' `HfQuantizer`.
        dtype: that the weights are loaded in; None is their own.
    """
    experts = {name: module for name, module in model.named_modules() if isinstance(module, EcMoeRaggedExperts)}
    names = [
        f"{name}.{weight}"
        for name, module in experts.items()
        for weight, parameter in module.named_parameters()
        if parameter.dim() == 3  # biases stay as they are in every layer
        and should_convert_module(name, getattr(quantizer, "modules_to_not_convert", None))
    ]
    left = [name for name in names if not quantizer.param_needs_quantization(model, name)]
    if not left:
        return
    parameters = dict(model.named_parameters())
    size = sum(parameters[name].numel() for name in left)
    total = sum(parameter.numel() for parameter in parameters.values())
    dtype = dtype or parameters[left[0]].dtype
    method = getattr(quantizer.quantization_config.quant_method, "value", quantizer.quantization_config.quant_method)
    remedy = "load_in_4bit=True takes them too. " if method == "bitsandbytes" else ""
    logger.warning_once(
        f"quantization_config={method} leaves the stacked experts in {str(dtype).removeprefix('torch.')}: {size:,} "
        f"parameters, {size * dtype.itemsize / 1e9:.2g} GB, {size / total:.0%} of the model. They are no "
        f"linear layers. {remedy}torchao quantises what is named: quantization_config={_torchao_config(model)}"
    )


def _torchao_config(model: nn.Module) -> str:
    """What quantises the linear layers and the stacked experts of this model, and no bias: torchao would take those of
    a module that is named, and then its linear layers fail."""
    modules = model.named_modules()
    linear = {name for name, module in modules if layer_number(name) is not None and isinstance(module, nn.Linear)}
    names = "|".join(sorted({name.rpartition(".")[2] for name in linear}))
    patterns = [r".*\.mlp\.experts\..*_proj"]
    if names:  # or a quantiser has put modules of its own in their place
        patterns.insert(0, rf".*\.({names})\.weight")
    said = ", ".join(f"r're:{pattern}': Int8WeightOnlyConfig()" for pattern in patterns)
    return f"TorchAoConfig(FqnToConfig({{{said}}}))"


def require_own_config(model_class: type, config: Any) -> None:
    """Refuses a dense config, which says nothing of experts.

    Raises:
        ValueError: naming what to do instead.
    """
    if not isinstance(config, EcMoeConfigMixin):
        raise ValueError(
            f"config={type(config).__name__} is no config of {model_class.__name__}: it has no experts. To make "
            f"experts of a dense model, {CONVERT_FIRST}"
        )


def require_own_folder(model: Any) -> None:
    """Refuses weights from a folder whose config is another family's or a dense model's, before they are read.

    Raises:
        ValueError: naming what to do instead.
    """
    config = model.config
    if config.model_type != type(config).model_type:
        raise ValueError(
            f"{config.name_or_path} is a model of type {config.model_type}, and {type(model).__name__} loads "
            f"{type(config).model_type}: it has no experts of ours. To make experts of a dense model, {CONVERT_FIRST}"
        )


def require_experts(model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuses a checkpoint that has other FFNs than the model has experts: these would stay random numbers.

    Args:
        model: that was loaded.
        missing, unexpected: names of its parameters that the checkpoint does not hold, and those it holds besides.

    Raises:
        ValueError: naming what to do instead.
    """
    experts = [name for name in missing if ".mlp.experts." in name]
    others = [name for name in unexpected if layer_number(name) is not None]
    if experts and others:
        raise ValueError(
            f"{model.config.name_or_path or 'the checkpoint'} holds {others[0]} instead of the experts "
            f"{experts[0]}: it is no checkpoint of {type(model).__name__}. To make experts of a dense model, "
            f"{CONVERT_FIRST}"
        )


def warn_training_loss(model: Any) -> None:
    """Says once that a loss in train mode, which nobody learns from, is not the model's causal one."""
    if not model.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    block = next((module for module in model.modules() if isinstance(module, EcMoeBlock)), None)
    if block is None or block.routing_override is not None or block.config.routing == "token_choice":
        return
    logger.warning_once(
        "A loss in train mode without gradients: the experts choose among all tokens of the batch, later ones too, as "
        "in training, and this is not the loss that the model has when it generates. For that call model.eval() first, "
        "or open use_inference_routing(model)"
    )


def warn_frozen_experts(model: nn.Module) -> None:
    """Says that PEFT's adapters leave the routed experts frozen, or leave the thresholds out of the adapter's file.

    Called when training begins; a model without PEFT's mark, `peft_config`, is not looked at.
    """
    if not getattr(model, "peft_config", None):
        return
    blocks = [module for module in model.modules() if isinstance(module, EcMoeBlock)]
    if not blocks or not any(parameter.requires_grad for parameter in model.parameters()):
        return
    if not any(parameter.requires_grad for block in blocks for parameter in block.experts.parameters()):
        size = sum(parameter.numel() for block in blocks for parameter in block.experts.parameters())
        total = sum(parameter.numel() for parameter in model.parameters())
        logger.warning_once(
            f"PEFT leaves the routed experts frozen, {size / total:.0%} of the parameters: stacked weights are no "
            "linear layers, and target_modules does not reach them. To adapt them, add "
            f"target_parameters={_adaptable(blocks[0])} to the LoraConfig"
        )
    # PEFT keeps what is saved with the adapter as a copy below this name.
    routers = [name for name, module in model.named_modules() if isinstance(module, EcMoeRouter)]
    if not any(".modules_to_save." in name for name in routers):
        logger.warning_once(
            "The thresholds follow the training, and the adapter's file will not hold them: loaded again, the model "
            'routes by those of its base. Add modules_to_save=["gate"] to the PEFT config'
        )


def _adaptable(block: EcMoeBlock) -> list[str]:
    """The stacked weights, which PEFT adapts, and not their biases, which it does not; by the names that they have
    without the wrappers of an adapter that is there already."""
    weights = [name for name, weight in block.experts.named_parameters() if weight.dim() == 3]
    return list(dict.fromkeys(f"mlp.experts.{name.rpartition('.')[2]}" for name in weights))


def refuse_reentrant_checkpointing(model: Any) -> None:
    """Of a model whose last layers read keys and values of earlier ones: to these no gradient would come back, in
    Transformers' dense model neither.

    Raises:
        ValueError: in train mode.
    """
    for layer in model.layers if model.training and torch.is_grad_enabled() else ():
        options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(layer, "gradient_checkpointing", False) and options.get("use_reentrant"):
            raise ValueError(
                f"use_reentrant=True: num_kv_shared_layers={model.config.num_kv_shared_layers} layers read keys and "
                "values of earlier ones, which reentrant checkpointing gives no gradient; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
