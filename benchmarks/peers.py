"""What the measurements compare, with random weights: our model and block, the dense Llama's, Mixtral's.

All have the same active FLOPs per token: k experts of width I, or one dense FFN of width k * I.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from modeling_ecmoe.block_ecmoe import EcMoeBlock
from modeling_ecmoe.llama_ecmoe import EcMoeLlamaConfig, EcMoeLlamaForCausalLM


@dataclass(frozen=True)
class Sizes:
    """hidden: D; width: I of one expert; experts: E; active: experts per token, c or k."""

    hidden: int
    width: int
    experts: int
    active: float
    layers: int = 1
    heads: int = 8
    vocabulary: int = 128
    positions: int = 2048

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def _shared(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "attn_implementation": "sdpa",
        }

    def ecmoe(self, **fields: Any) -> EcMoeLlamaConfig:
        experts = {"intermediate_size": self.width, "num_experts": self.experts, "capacity_factor": self.active}
        return EcMoeLlamaConfig(**self._shared() | experts | fields)

    def dense(self, width: int) -> LlamaConfig:
        return LlamaConfig(**self._shared(), intermediate_size=width)

    def mixtral(self, implementation: str) -> MixtralConfig:
        config = MixtralConfig(
            **self._shared(),
            intermediate_size=self.width,
            num_local_experts=self.experts,
            num_experts_per_tok=int(self.active),
        )
        config._experts_implementation = implementation
        return config


def blocks(sizes: Sizes, implementations: tuple[str, ...], **fields: Any) -> dict[str, nn.Module]:
    """Our block, one dense FFN of an expert's width, and Mixtral's block with each of the implementations."""
    found: dict[str, nn.Module] = {
        "expert choice": EcMoeBlock(sizes.ecmoe(**fields), LlamaMLP),
        "dense FFN": LlamaMLP(sizes.dense(sizes.width)),
    }
    found |= {f"Mixtral {name}": MixtralSparseMoeBlock(sizes.mixtral(name)) for name in implementations}
    for block in found.values():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
    return found


def models(sizes: Sizes, dtype: torch.dtype, device: str) -> dict[str, PreTrainedModel]:
    """Our model, the dense one whose FFN is as wide as the active experts together, and Mixtral's."""
    found: dict[str, PreTrainedModel] = {
        "expert choice": EcMoeLlamaForCausalLM(sizes.ecmoe()),
        "dense": LlamaForCausalLM(sizes.dense(round(sizes.active * sizes.width))),
        "Mixtral": MixtralForCausalLM(sizes.mixtral("grouped_mm")),  # what from_pretrained chooses
    }
    found["expert choice"].set_experts_implementation("grouped_mm")
    for model in found.values():
        nn.Module.to(model, device, dtype)
    return found
