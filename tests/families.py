"""The dense families, and what a tiny model of each needs so that everything peculiar to it takes part.

A tuple stands for a list with an entry a layer, and begins again where there are more layers than entries; a function
is given the number of layers.
"""

from typing import Any

import pytest
import torch
from torch import nn

LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 32,  # cached by itself, and quanto packs groups of 32
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
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
    "Ministral": {"sliding_window": 8, "layer_types": ("sliding_attention", "full_attention")},
    "Ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,  # beyond which queries are scaled up
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        }
    },
    "Gemma": {},
    "Cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "Glm": {},
    "Olmo": {"clip_qkv": 2.0},
    "Exaone4": SLIDING,
    "Arcee": {},
    "Nemotron": {"mlp_bias": True, "attention_bias": True},
    "SeedOss": {"residual_dropout": 0.0, "attention_dropout": 0.0},
    "Ernie4_5": {"use_bias": True},
    "HunYuanDenseV1": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 1.0, "alpha": 1000.0}
    },
    "Helium": {},
    "HyperCLOVAX": {
        "embedding_multiplier": 2.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.5,
    },
    "NanoChat": {"final_logit_softcapping": 5.0},
    "GraniteSWA": {
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
        "sliding_window": 8,
        "layer_types": ("full_attention", "sliding_attention"),
        "layer_rope_theta": (0, 10_000.0),
    },
    "Cwm": {"sliding_window": 8, "layer_types": ("full_attention", "sliding_attention")},
    "Youtu": LATENT | {"embedding_initializer_range": 0.2, "head_dim": 32},
    "Apertus": {},
    "OlmoHybrid": {
        "layer_types": ("linear_attention", "full_attention"),
        "linear_key_head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "Qwen3_5Text": {
        "layer_types": ("linear_attention", "full_attention"),
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        },
    },
    # The layers after the first read its keys and values and are twice as wide; so none of them slides.
    "Gemma4Text": {
        "layer_types": ("full_attention",),
        "num_kv_shared_layers": lambda num_layers: num_layers - 1,
        "use_double_wide_mlp": True,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
        "final_logit_softcapping": 5.0,
    },
    "Gemma4UnifiedText": {
        "sliding_window": 8,
        "layer_types": ("sliding_attention", "full_attention"),
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "final_logit_softcapping": 5.0,
    },
    "VaultGemma": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0,
    },
}
# Those whose plain class is a mixture itself, so that no dense checkpoint becomes one of them.
MIXED: dict[str, dict[str, object]] = {
    "Olmoe": {},
    "Glm4Moe": {"use_qk_norm": True},
    "DeepseekV3": LATENT,
}
MODEL_TYPES = {name: name.lower() for name in FAMILIES | MIXED}
MODEL_TYPES |= {"Gemma3Text": "gemma3_text", "GPTNeoX": "gpt_neox", "Glm4Moe": "glm4_moe", "DeepseekV3": "deepseek_v3"}
MODEL_TYPES |= {"SeedOss": "seed_oss", "HunYuanDenseV1": "hunyuan_v1_dense", "GraniteSWA": "granite_swa"}
MODEL_TYPES |= {"OlmoHybrid": "olmo_hybrid", "Qwen3_5Text": "qwen3_5_text"}
MODEL_TYPES |= {"Gemma4Text": "gemma4_text", "Gemma4UnifiedText": "gemma4_unified_text"}
# Their first FFN sees the normalised embedding alone, so that equal tokens have equal scores there.
PARALLEL = ("Cohere2", "GPTNeoX", "Cohere")
# Those whose tiny model keeps a window of the past alone, in some layers or all.
SLIDING_CACHE = ("Mistral", "Olmo3", "Gemma2", "Gemma3Text", "Cohere2", "Starcoder2", "Ministral", "Exaone4")
SLIDING_CACHE += ("GraniteSWA", "Cwm", "VaultGemma", "Gemma4UnifiedText")
# The layers of their tiny models whose token mixer carries a state instead of keys and values.
STATEFUL = {"Qwen3_5Text": [0], "OlmoHybrid": [0]}
# Their last layers read keys and values of earlier ones, to which reentrant checkpointing gives no gradient.
SHARED_KEYS = ("Gemma4Text",)
# One of each kind: the plain one, norms inside attention, norms on both sides and capped logits, no gate but biases.
CORE = ("Llama", "Qwen3", "Gemma2", "GPTNeoX")
EVERY_DENSE_FAMILY = [pytest.param(name, marks=() if name in CORE else pytest.mark.families) for name in FAMILIES]
EVERY_FAMILY = EVERY_DENSE_FAMILY + [pytest.param(name, marks=pytest.mark.families) for name in MIXED]


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Draws what a family starts at zero or one, biases and Gemma's norms and scales, so that forgetting it shows."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.5, 1.5)


def tiny_fields(family: str, given: dict[str, object]) -> dict[str, object]:
    """What a tiny model of the family needs, with as many layers as are given, or 2."""
    num_layers: Any = given.get("num_hidden_layers", 2)
    fields: dict[str, object] = {}
    for name, value in (FAMILIES | MIXED)[family].items():
        if isinstance(value, tuple):
            value = [value[layer % len(value)] for layer in range(num_layers)]
        fields[name] = value(num_layers) if callable(value) else value
    return fields
