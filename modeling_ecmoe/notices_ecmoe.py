"""What other tools do to the stacked experts without a word: quantisers and adapters that pass them by."""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .block_ecmoe import EcMoeBlock
from .experts_ecmoe import EcMoeRaggedExperts
from .router_ecmoe import EcMoeRouter

logger = logging.get_logger(__name__)


def warn_unquantized(model: nn.Module, quantizer: Any, dtype: torch.dtype | None) -> None:
    """Says which share of the weights a quantiser leaves alone, before they are loaded and memory runs out.

    Most quantisers convert `nn.Linear` only. Experts that one has replaced by modules of its own are not counted.

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
    ]
    left = [name for name in names if not quantizer.param_needs_quantization(model, name)]
    if not left:
        return
    parameters = dict(model.named_parameters())
    size = sum(parameters[name].numel() for name in left)
    total = sum(parameter.numel() for parameter in parameters.values())
    dtype = dtype or parameters[left[0]].dtype
    method = getattr(quantizer.quantization_config.quant_method, "value", quantizer.quantization_config.quant_method)
    logger.warning_once(
        f"quantization_config={method} leaves the stacked experts in {str(dtype).removeprefix('torch.')}: {size:,} "
        f"parameters, {size * dtype.itemsize / 1e9:.2g} GB, {size / total:.0%} of the model. They are no "
        f"linear layers. torchao quantises what is named: quantization_config={_torchao_config(model)}"
    )


def _torchao_config(model: nn.Module) -> str:
    """What quantises the linear layers and the stacked experts of this model, and no bias: torchao would take those of
    a module that is named, and then its linear layers fail."""
    linear = {name for name, module in model.named_modules() if "layers." in name and isinstance(module, nn.Linear)}
    names = "|".join(sorted({name.rpartition(".")[2] for name in linear}))
    patterns = [r".*\.mlp\.experts\..*_proj"]
    if names:  # or a quantiser has put modules of its own in their place
        patterns.insert(0, rf".*\.({names})\.weight")
    said = ", ".join(f"r're:{pattern}': Int8WeightOnlyConfig()" for pattern in patterns)
    return f"TorchAoConfig(FqnToConfig({{{said}}}))"


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
