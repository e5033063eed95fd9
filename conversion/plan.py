"""What will be written: the config and, for every tensor of the expert-choice model, where it comes from."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

import modeling_ecmoe

from .errors import ConversionError
from .initialisations import INITIALISATIONS, Initialisation
from .source import SourceWeights, read_json

# The dense model_type of each family -> its expert-choice config class.
FAMILIES = {config.model_type.removeprefix("ecmoe_"): config for config in modeling_ecmoe.MODEL_CLASSES}

# Buffers that old checkpoints carry and no model reads.
_IGNORED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: its shape and how to make it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Plan:
    config: PreTrainedConfig
    dtype: torch.dtype
    model: PreTrainedModel  # on the meta device: names, shapes and code, no memory
    tensors: list[PlannedTensor]
    initialisation: Initialisation


def plan_conversion(weights: SourceWeights, num_experts: int, capacity_factor: float, init: str, seed: int) -> Plan:
    """Plans the conversion of a dense checkpoint from its config and headers; reads no weights.

    Raises:
        ConversionError: for an unsupported family, a wrong option, or tensors that do not fit the config.
    """
    if init not in INITIALISATIONS:
        raise ConversionError(f"init={init} is unknown; choose one of {', '.join(INITIALISATIONS)}")
    initialisation = INITIALISATIONS[init]
    config = _config(weights, num_experts, capacity_factor, initialisation)
    with torch.device("meta"):
        model = modeling_ecmoe.MODEL_CLASSES[type(config)]["AutoModelForCausalLM"](config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    used: set[str] = set()
    tensors = []
    for name, like in model.state_dict().items():
        if name in tied:
            continue
        sources, make = _maker(name, like, config, weights, seed)
        for source in sources:
            _check_source(source, like, name, weights, config)
        used.update(sources)
        tensors.append(PlannedTensor(name, tuple(like.shape), make))
    unused = sorted(n for n in weights.names() - used - tied if not n.endswith(_IGNORED))
    if unused:
        raise ConversionError(
            f"source={weights.folder} holds {unused[0]} ({len(unused)} such tensors), which a dense "
            f"{config.model_type.removeprefix('ecmoe_')} language model does not have; convert a plain one"
        )
    return Plan(config, weights.dtype(), model, tensors, initialisation)


def _config(
    weights: SourceWeights, num_experts: int, capacity_factor: float, initialisation: Initialisation
) -> PreTrainedConfig:
    dense = read_dense_config(weights)
    fields = dense.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        fields.pop(name, None)
    fields |= initialisation.config | {"num_experts": num_experts, "capacity_factor": capacity_factor}
    if initialisation.keeps_dense_ffn:
        fields["shared_expert_intermediate_size"] = dense.intermediate_size
    try:
        config = FAMILIES[dense.model_type](**fields)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConversionError(str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")) from error
    config.dtype = weights.dtype()
    config.architectures = [modeling_ecmoe.MODEL_CLASSES[type(config)]["AutoModelForCausalLM"].__name__]
    return config


def read_dense_config(weights: SourceWeights) -> PreTrainedConfig:
    """The source's config, if it is of a family that can be converted."""
    path = weights.folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"source={weights.folder} is no checkpoint: config.json is missing")
    raw = read_json(path)
    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type.startswith("ecmoe_"):
        raise ConversionError(f"source={weights.folder} is an expert-choice checkpoint already; give the dense one")
    if model_type not in FAMILIES:
        raise ConversionError(f"model_type={model_type} is not supported; supported are {', '.join(FAMILIES)}")
    if raw.get("quantization_config"):
        raise ConversionError(
            f"source={weights.folder} is quantised (quantization_config); give the unquantised checkpoint"
        )
    try:
        return AutoConfig.from_pretrained(weights.folder)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConversionError(
            f"{path} is no valid {model_type} config: {str(error).strip().splitlines()[-1].strip()}"
        ) from error


def _maker(
    name: str, like: Tensor, config: Any, weights: SourceWeights, seed: int
) -> tuple[list[str], Callable[[], Tensor]]:
    """Where a tensor of the expert-choice model comes from: the source tensors it reads, and the function."""
    if ".mlp.gate." in name:
        return [], lambda: _router_tensor(name, like, config, seed)
    if name.endswith(".mlp.experts.gate_up_proj"):
        base = name.removesuffix("experts.gate_up_proj")
        parts = [f"{base}gate_proj.weight", f"{base}up_proj.weight"]
        return parts, lambda: _copies(torch.cat([weights[part] for part in parts]), config.num_experts)
    if name.endswith(".mlp.experts.down_proj"):
        part = name.replace("experts.down_proj", "down_proj.weight")
        return [part], lambda: _copies(weights[part], config.num_experts)
    source = name.replace(".mlp.shared_expert.", ".mlp.")
    return [source], lambda: weights[source]


def _copies(ffn: Tensor, num_experts: int) -> Tensor:
    return ffn.expand(num_experts, *ffn.shape).contiguous()


def _router_tensor(name: str, like: Tensor, config: Any, seed: int) -> Tensor:
    """Router weights N(0, initializer_range), each tensor from a seed of its own, so that order does not matter.

    Thresholds start at zero and are calibrated once the checkpoint can be loaded.
    """
    if not name.endswith("gate.weight"):
        return torch.zeros(like.shape, dtype=like.dtype)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return (torch.randn(like.shape, generator=generator) * config.initializer_range).to(config.dtype)


def _check_source(source: str, like: Tensor, name: str, weights: SourceWeights, config: Any) -> None:
    """The source tensor is there and has the size that the config promises."""
    if source not in weights.names():
        raise ConversionError(
            f"source={weights.folder} lacks the tensor {source}; is it a complete causal language model?"
        )
    shape = weights.shape(source)
    expected = tuple(like.shape)
    if ".mlp.experts." in name:
        _, rows, columns = like.shape
        expected = (rows // 2 if "gate_up_proj" in name else rows, columns)
    if shape != expected:
        raise ConversionError(
            f"{source} has shape {list(shape)}, config.json promises {list(expected)}; they do not belong together"
        )
