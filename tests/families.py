"""The dense families, and what a tiny model of each needs so that everything peculiar to it takes part."""

import pytest
import torch
from torch import nn

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
    "DeepseekV3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 32,  # cached by itself, and quanto packs groups of 32
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}
MODEL_TYPES = {name: name.lower() for name in FAMILIES | MIXED}
MODEL_TYPES |= {"Gemma3Text": "gemma3_text", "GPTNeoX": "gpt_neox", "Glm4Moe": "glm4_moe", "DeepseekV3": "deepseek_v3"}
MODEL_TYPES |= {"GPTBigCode": "gpt_bigcode", "GPTNeo": "gpt_neo"}
# Those whose FFN has no gate, and biases.
UNGATED = ("Starcoder2", "GPTNeoX", "GPT2", "OPT", "Phi", "Falcon", "GPTBigCode", "GPTNeo", "GPTJ", "Jais2")
UNGATED += ("CodeGen", "Persimmon")
# Their first FFN sees the normalised embedding alone, so that equal tokens have equal scores there.
PARALLEL = ("Cohere2", "GPTNeoX", "Phi", "StableLm", "Falcon", "GPTJ", "CodeGen")
# Those whose tiny model keeps a window of the past alone, in some layers or all.
SLIDING_CACHE = ("Mistral", "Olmo3", "Gemma2", "Gemma3Text", "Cohere2", "Starcoder2")
# Those that store their matrices as [in, out]: a shared expert is a copy of the FFN, turned round.
TRANSPOSED = ("GPT2",)
# Those that initialise what is added to the residual by 1 / sqrt(2 * layers) of the rest.
SCALED_RESIDUALS = ("GPT2", "GPTBigCode")
# What a dense class cannot, and so neither can ours.
NO_PACKING = ("Falcon", "OPT")  # they read no documents off the positions: packed ones see each other
NO_STATIC_CACHE = ("GPTNeo",)  # its local attention reads the empty places of one
NO_TENSOR_PLAN = ("GPT2", "OPT", "StableLm", "Falcon", "GPTBigCode", "GPTNeo", "GPTJ", "CodeGen", "Persimmon")  # none
NO_STAGES = (
    "Granite",
    "GPTNeoX",
    "Phi",
    *NO_TENSOR_PLAN,
)  # refused: a pipeline computes something else, or has no plan
NO_SERVER = ("StableLm",)  # its attention hands nothing on to a server's
NO_EXPORT = {
    "DeepseekV3": "Transformers sizes an exported cache by head_dim, which is not that of latent attention's keys",
    "OPT": "it slices a mask by the cache's length, which an export does not know",
    "GPTNeo": "an exported cache is a static one",
}
# One of each kind: the plain one, norms inside attention, norms on both sides and capped logits, no gate but biases.
CORE = ("Llama", "Qwen3", "Gemma2", "GPTNeoX")
EVERY_DENSE_FAMILY = [pytest.param(name, marks=() if name in CORE else pytest.mark.families) for name in FAMILIES]
EVERY_FAMILY = EVERY_DENSE_FAMILY + [pytest.param(name, marks=pytest.mark.families) for name in MIXED]


def fields_of(*parts: dict[str, object]) -> dict[str, object]:
    """A config's fields, later ones before earlier ones, without those that are absent; some follow from others."""
    merged: dict[str, object] = {}
    for part in parts:
        merged |= part
    return {name: value(merged) if callable(value) else value for name, value in merged.items() if value is not ABSENT}


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Draws what a family starts at zero, biases and Gemma's norms, so that forgetting it shows."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.2)
