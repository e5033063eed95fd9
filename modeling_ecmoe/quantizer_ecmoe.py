"""How `BitsAndBytesConfig(load_in_4bit=True)` comes to the stacked experts, which bitsandbytes passes by: they are
quantised one by one as they are read, saved as they are, and read again.

A stack is loaded and saved as plain tensors, its numbers under the stack's own name and the rest of what it is made of
(quantized_ecmoe.py) under that name and "_absmax", ...; in between it is one `Stacked4bit`.
"""

import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils import logging

from .experts_ecmoe import EcMoeRaggedExperts
from .names_ecmoe import from_layer_number
from .quantized_ecmoe import BLOCK, Stacked4bit, empty_parts, part_name, quantize_stack

logger = logging.get_logger(__name__)


class EcMoeBnb4bitQuantizer(Bnb4BitHfQuantizer):
    """Transformers' quantiser, for the stacks too that `make_room` has prepared."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, EcMoeRaggedExperts):
            return name in module.loads_in_4bit
        return super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        return _quantize_op(self)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = dtype if isinstance(dtype, torch.dtype) else model.dtype  # save_pretrained leaves text in the config
        for _, module in _experts(model):
            for name, weight in module.named_parameters():
                if isinstance(weight, Stacked4bit):
                    matrices = [weight.matrix(expert, dtype) for expert in range(len(weight))]
                    setattr(module, name, nn.Parameter(torch.stack(matrices)))
        if any(type(module).__name__ == "Linear4bit" for module in model.modules()):  # without one it fails
            model = super()._dequantize(model, dtype)
        for module in model.modules():  # a linear layer in 4 bits puts its bias into the precision of its products
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data = module.bias.data.to(module.weight.dtype)
        return model


def prepare(model: Any, quantizer: Any, files: list[str] | None, state_dict: dict[str, Any] | None) -> None:
    """Lets a quantiser of linear layers quantise the stacks of experts too, or read those that are in 4 bits; not those
    that it was told to skip, nor those of a checkpoint that holds them in 16 bits.

    Args:
        model: as the quantiser has prepared it, still without weights.
        quantizer: Transformers' `Bnb4BitHfQuantizer`.
        files: of the checkpoint.
        state_dict: instead of files.
    """
    quantizer.__class__ = EcMoeBnb4bitQuantizer
    make_room(model, quantizer.quantization_config, quantizer.modules_to_not_convert)
    narrow = [name for name, module in model.named_modules() if _is_misread_on_cpus(module)]
    if narrow and not torch.accelerator.is_available():
        logger.warning_once(
            f"bitsandbytes misreads linear layers on a CPU whose inputs are no multiple of {BLOCK}: {narrow[0]} and "
            f"{len(narrow) - 1} more. Leave them out with llm_int8_skip_modules={_skipping(narrow)}"
        )
    for linear in model.modules():
        # On a CPU with products in bfloat16 bitsandbytes reorders the bits of a linear layer for inference. Training
        # goes on without gradients there, scales are rounded to bfloat16, and some widths fail.
        if hasattr(linear, "support_avx512bf16_for_cpu"):
            linear.support_avx512bf16_for_cpu = False
    stored = _stored_names(files, state_dict) if quantizer.pre_quantized else None
    for path, module in _experts(model):
        names = [from_layer_number(part_name(f"{path}.{name}", "absmax")) for name in module.loads_in_4bit]
        if stored is not None and not stored.issuperset(names):
            undo(module)


def _is_misread_on_cpus(module: Any) -> bool:
    """Whether it is a linear layer in 4 bits with rows that are no number of blocks: bitsandbytes 0.50 takes scales of
    other blocks for them."""
    return type(module).__name__ == "Linear4bit" and bool(module.in_features % BLOCK)


def _skipping(names: list[str]) -> list[str]:
    return ["lm_head", *sorted({name.rpartition(".")[2] for name in names})]


def _stored_names(files: list[str] | None, state_dict: dict[str, Any] | None) -> set[str] | None:
    """Of a checkpoint's tensors, without what stands before the layers; None where that is not known."""
    if state_dict is not None:
        return {from_layer_number(name) for name in state_dict}
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return None
    found = set()
    for file in files:
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        found |= {from_layer_number(name) for name in header}
    return found


def _quantize_op(quantizer: Any) -> Any:
    """Transformers' operation on a tensor that has been read, of a stack ours."""
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize

    class Quantize(Bnb4bitQuantize):
        def convert(self, input_dict: Any, *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
            (full_name, value), *_ = input_dict.items()
            if not isinstance(get_module_from_name(model, full_name)[0], EcMoeRaggedExperts):
                return super().convert(input_dict, *args, model=model, **kwargs)
            value = value[0] if isinstance(value, list) else value
            config = self.hf_quantizer.quantization_config
            parts = quantize_stack(value, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)
            found = {part_name(full_name, part): tensor for part, tensor in parts.items()}
            return found | {full_name: nn.Parameter(found[full_name], requires_grad=False)}

    return Quantize(quantizer)


def make_room(model: nn.Module, config: Any, skipped: list[str] | None = None) -> None:
    """Puts what stacks in 4 bits are made of, without memory, in place of the stacks of a model that is to be loaded.

    Args:
        model: as a quantiser has prepared it, still without weights. One that is prepared already is left as it is.
        config: `BitsAndBytesConfig`.
        skipped: names of modules that stay as they are; None are those of the config.

    Raises:
        ValueError: for a storage type of the bits that is for linear layers alone, and for one stack of a layer's two
            among the skipped.
    """
    if skipped is None:
        keep = getattr(model, "_keep_in_fp32_modules", None)
        skipped = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, keep)
    for path, module in _experts(model):
        names = [name for name, weight in module.named_parameters() if weight.dim() == 3]
        if not should_convert_module(path, skipped):
            undo(module)
            continue
        _refuse_parts(path, names, skipped)
        if names and config.bnb_4bit_quant_storage != torch.uint8:
            raise ValueError(
                f"bnb_4bit_quant_storage={config.bnb_4bit_quant_storage} is for linear layers: stacked experts in 4 "
                'bits are stored as uint8. Leave it out, or leave them out with llm_int8_skip_modules=["experts", '
                '"lm_head"]'
            )
        for name in names:
            weight = module.get_parameter(name)
            module.loads_in_4bit[name] = weight
            parts = empty_parts(tuple(weight.shape), config.bnb_4bit_use_double_quant)
            for part, tensor in parts.items():
                if part_name(name, part) == name:
                    setattr(module, name, nn.Parameter(tensor, requires_grad=False))
                else:
                    module.register_buffer(part_name(name, part), tensor)


def _refuse_parts(path: str, names: list[str], skipped: list[str]) -> None:
    """A name of one stack leaves no module out, and nothing would be said. One that is a linear layer's too, such as
    down_proj, means that."""
    for name in (name for name in skipped if "experts" in name):
        if not all(should_convert_module(f"{path}.{stack}", [name]) for stack in names):
            raise ValueError(
                f'llm_int8_skip_modules names "{name}", and the experts of a layer are in 4 bits together or not at '
                'all; name "experts", or the experts of single layers, such as "layers.0.mlp.experts"'
            )


def undo(module: EcMoeRaggedExperts) -> None:
    """Takes back `make_room`."""
    for name, weight in module.loads_in_4bit.items():
        setattr(module, name, weight)
        for buffer in [buffer for buffer in module._buffers if buffer.startswith(f"{name}_")]:
            delattr(module, buffer)
    module.loads_in_4bit = {}


def close(model: nn.Module, config: Any) -> None:
    """Makes one `Stacked4bit` of what was loaded of every stack."""
    for _, module in _experts(model):
        for name, weight in module.loads_in_4bit.items():
            parts = empty_parts(tuple(weight.shape), config.bnb_4bit_use_double_quant)
            parts = {part: getattr(module, part_name(name, part)).detach() for part in parts}
            for part in parts:
                delattr(module, part_name(name, part))
            stack = Stacked4bit(
                parts, tuple(weight.shape), weight.dtype, config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype
            )
            module.register_parameter(name, nn.Parameter(stack, requires_grad=False))
            module.get_parameter(name)._is_hf_initialized = True
        module.loads_in_4bit = {}


def allow_saving(model: Any) -> None:
    """Lets a model that was read in few bits, by whichever quantiser, be saved again: bits are written as they are, and
    Transformers fails where it cannot undo how it read them."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [one for one in conversions if not _only_reads_bits(one)]


def _only_reads_bits(conversion: Any) -> bool:
    for operation in getattr(conversion, "operations", ()):
        if type(operation).__name__.endswith("Deserialize"):  # Bnb4bitDeserialize and so on
            try:
                _ = operation.reverse_op
            except NotImplementedError:
                return True
    return False


def _experts(model: nn.Module) -> list[tuple[str, EcMoeRaggedExperts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, EcMoeRaggedExperts)]
