"""The dense families, and what a tiny model of each needs so that everything peculiar to it takes part.

A tuple stands for a list with an entry a layer, and begins again where there are more layers than entries; a function
is given the other fields.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from modeling_ecmoe.versions_ecmoe import is_at_least

LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 32,  # cached by itself, and quanto packs groups of 32
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
ABSENT = object()  # of a field that other families have and this one's config refuses


def global_and_local(fields: dict[str, object]) -> list[object]:
    """GPT-Neo's kinds of attention, in turn, for as many layers as there are."""
    return [[[("global", "local")[layer % 2]], 1] for layer in range(fields["num_hidden_layers"])]


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
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
        "num_kv_shared_layers": lambda fields: fields["num_hidden_layers"] - 1,
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
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "final_logit_softcapping": 5.0,
    },
    "Lfm2": {"layer_types": ("conv", "full_attention"), "intermediate_size": 70, "block_multiple_of": 8},
    "Lfm3": {"layer_types": ("conv", "sliding_attention", "full_attention"), "sliding_window": 8},
    "VaultGemma": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0,
    },
    "GPT2": NO_DROPOUT | {"n_inner": 48, "num_key_value_heads": 4, "scale_attn_by_inverse_layer_idx": True},
    "Phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "StableLm": {
        "partial_rotary_factor": 0.5,
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "use_parallel_residual": True,
    },
    "Falcon": {
        "ffn_hidden_size": 48,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_key_value_heads": 4,  # those it caches
        "bias": True,
        "head_dim": ABSENT,
    },
    "OPT": {"ffn_dim": 48, "num_key_value_heads": 4, "word_embed_proj_dim": 16, "dropout": 0.0},
    "GPTBigCode": NO_DROPOUT | {"n_inner": 48, "num_key_value_heads": 1},
    "GPTNeo": {"num_key_value_heads": 4, "attention_types": global_and_local, "window_size": 8},
    "GPTJ": {"n_inner": 48, "num_key_value_heads": 4, "rotary_dim": 4},
    "Jais2": {},
    "CodeGen": {"n_inner": 48, "num_key_value_heads": 4, "rotary_dim": 4},
    "Persimmon": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
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
# Those whose tiny model keeps a window of the past alone, in some layers or all.
SLIDING_CACHE = ("Mistral", "Olmo3", "Gemma2", "Gemma3Text", "Cohere2", "Starcoder2", "Ministral", "Exaone4")
SLIDING_CACHE += ("GraniteSWA", "Cwm", "VaultGemma", "Gemma4UnifiedText")
# The layers of their tiny models whose token mixer carries a state instead of keys and values.
STATEFUL = {"Qwen3_5Text": [0], "OlmoHybrid": [0], "Lfm2": [0], "Lfm3": [0]}
# Their last layers read keys and values of earlier ones, to which reentrant checkpointing gives no gradient.
SHARED_KEYS = ("Gemma4Text",)
# Flex attention has none of these on a CPU.
ATTENTION_SINKS = ("GraniteSWA",)
# Parameters that the dense class loads in float32 whatever the dtype asked for.
KEPT_IN_FLOAT32 = {"OlmoHybrid": ("A_log",)}
# Those whose attention Transformers' tensor parallelism cuts nowhere.
WHOLE_ATTENTION = ("DeepseekV3", "Youtu", "HunYuanDenseV1")
# Those whose dense config says nothing of pipelines.
NO_STAGES = (
    "HunYuanDenseV1",
    "Nemotron",
    "NanoChat",
    "Lfm2",
    "Lfm3",
    "GPT2",
    "StableLm",
    "Falcon",
    "OPT",
    "GPTBigCode",
)
NO_STAGES += ("GPTNeo", "GPTJ", "CodeGen", "Persimmon")
# Those that Transformers' tensor parallelism cannot cut, the dense class neither, and why.
NO_TENSOR_PLAN = {
    "Cohere": "its norms of queries and keys, one a head, stay whole where the heads are cut",
    "Olmo": "clip_qkv clamps in place what is cut",
} | dict.fromkeys(
    ("GPT2", "OPT", "StableLm", "Falcon", "GPTBigCode", "GPTNeo", "Persimmon"), "the dense family has no plan"
)
if not is_at_least("5.24.0"):
    NO_TENSOR_PLAN |= dict.fromkeys(("GPTJ", "CodeGen"), "the dense family has no plan")
# Those that the server of the tests cannot run, and why.
NO_SERVER = {
    "Ernie4_5": "vLLM's experts have no biases",
    "GraniteSWA": "a server fills one rotary embedding, and this family has one for each base frequency",
    "OlmoHybrid": "no plain class with linear attention calls itself compatible",
    "Qwen3_5Text": "no plain class with linear attention calls itself compatible",
    "StableLm": "its attention hands nothing on to a server's",
    "Lfm2": "no plain class with short convolutions calls itself compatible",
    "Lfm3": "no plain class with short convolutions calls itself compatible",
}
# Those whose config asks for layers of both kinds.
LAYERS_OF_TWO_KINDS = ("OlmoHybrid",)
MODEL_TYPES |= {"GPTBigCode": "gpt_bigcode", "GPTNeo": "gpt_neo"}
# Their first FFN sees the normalised embedding alone, so that equal tokens have equal scores there.
PARALLEL = ("Cohere2", "GPTNeoX", "Cohere", "Phi", "StableLm", "Falcon", "GPTJ", "CodeGen")
# Those that store their matrices as [in, out]: a shared expert is a copy of the FFN, turned round.
TRANSPOSED = ("GPT2",)
# Those that initialise what is added to the residual by 1 / sqrt(2 * layers) of the rest.
SCALED_RESIDUALS = ("GPT2", "GPTBigCode", "NanoChat")
# What a dense class cannot, and so neither can ours.
NO_PACKING = ("OPT",)  # it reads no documents off the positions: packed ones see each other
if not is_at_least("5.24.0"):
    NO_PACKING += ("Falcon",)
NO_STATIC_CACHE = ("GPTNeo",)  # its local attention reads the empty places of one
NO_EXPORT = {
    "DeepseekV3": "Transformers sizes an exported cache by head_dim, which is not that of latent attention's keys",
    "OPT": "it slices a mask by the cache's length, which an export does not know",
    "GPTNeo": "an exported cache is a static one",
}
# One of each kind: the plain one, norms inside attention, norms on both sides and capped logits, no gate but biases.
CORE = ("Llama", "Qwen3", "Gemma2", "GPTNeoX")
EVERY_DENSE_FAMILY = [pytest.param(name, marks=() if name in CORE else pytest.mark.families) for name in FAMILIES]
EVERY_FAMILY = EVERY_DENSE_FAMILY + [pytest.param(name, marks=pytest.mark.families) for name in MIXED]


def family_and(cases: Iterable[Any], of_others: Iterable[Any], families: Iterable[str] = ()) -> list[Any]:
    """Pairs of a family and a case: all cases of the core, and of the others those in which a family could differ."""
    cases, others = list(cases), list(of_others)
    return [(name, case) for name in CORE for case in cases] + [
        pytest.param(name, case, marks=pytest.mark.families)
        for name in families or (FAMILIES | MIXED)
        if name not in CORE
        for case in others
    ]


def fields_of(*parts: dict[str, object]) -> dict[str, object]:
    """A config's fields, later ones before earlier ones, without those that are absent; some follow from others."""
    merged: dict[str, object] = {}
    for part in parts:
        merged |= part
    num_layers: Any = merged["num_hidden_layers"]
    for name, value in merged.items():
        if isinstance(value, tuple):
            merged[name] = [value[layer % len(value)] for layer in range(num_layers)]
    return {name: value(merged) if callable(value) else value for name, value in merged.items() if value is not ABSENT}


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Draws what a family starts at zero or one, biases and Gemma's norms and scales, so that forgetting it shows."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.5, 1.5)
