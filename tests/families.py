"""The dense families, and what a tiny model of each needs so that everything peculiar to it takes part."""

import pytest
import torch
from torch import nn

SLIDING = {"sliding_window": 8, "sliding_window_pattern": 2}
FAMILIES: dict[str, dict[str, object]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {},
    "Phi3": {"original_max_position_embeddings": 128},
    "SmolLM3": {"no_rope_layer_interval": 2},
    "Olmo2": {},
    "Olmo3": SLIDING,
    "Gemma2": SLIDING | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0},
    "Gemma3Text": SLIDING | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "Granite": {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5},
    "Glm4": {},
    "Cohere2": SLIDING | {"logit_scale": 0.25},
    "Starcoder2": {"sliding_window": 64},
    "GPTNeoX": {"num_key_value_heads": 4},  # no field of its own, but caches would read it
}
MODEL_TYPES = {name: name.lower() for name in FAMILIES} | {"Gemma3Text": "gemma3_text", "GPTNeoX": "gpt_neox"}
# Their first FFN sees the normalised embedding alone, so that equal tokens have equal scores there.
PARALLEL = ("Cohere2", "GPTNeoX")
# Those whose tiny model keeps a window of the past alone, in some layers or all.
SLIDING_CACHE = ("Mistral", "Olmo3", "Gemma2", "Gemma3Text", "Cohere2", "Starcoder2")
# One of each kind: the plain one, norms inside attention, norms on both sides and capped logits, no gate but biases.
CORE = ("Llama", "Qwen3", "Gemma2", "GPTNeoX")
EVERY_FAMILY = [pytest.param(name, marks=() if name in CORE else pytest.mark.families) for name in FAMILIES]


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Draws what a family starts at zero, biases and Gemma's norms, so that forgetting it shows."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.2)
