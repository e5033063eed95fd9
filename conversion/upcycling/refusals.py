"""Why a model type cannot be converted, and what comes nearest to it that can: one table, which the converter answers
from and the documentation can print.

A model type that a family or a mixture stands for is not in it.
"""

import difflib
from dataclasses import dataclass
from typing import Any

import modeling_ecmoe

from .mixtures import MIXTURES


@dataclass(frozen=True)
class Refusal:
    """reason: why it cannot be expressed. nearest: what can be converted instead, as an order to whoever reads it."""

    reason: str
    nearest: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.nearest}"


_DENSE = "convert a dense decoder, such as qwen3 or llama"
_MIXTURE = f"of mixtures convert {', '.join(MIXTURES)}"
_GROUPS: list[tuple[str, str, str]] = [  # reason, nearest, model types
    (
        "it is the decoder of an encoder and a decoder, and looks at what the encoder says",
        "convert a decoder by itself, such as qwen3 or gpt2",
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper "
        "musicgen musicgen_melody",
    ),
    (
        "it is an encoder that can be run as a decoder, and its FFN adds and normalises the residual itself",
        "convert a decoder, such as qwen3 or gpt2",
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod",
    ),
    (
        "a mixture of experts already, which no family here computes the rest of",
        _MIXTURE,
        "afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v32 deepseek_v4 dots1 "
        "dots3_note dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe_lite glm_moe_dsa granitemoe_swa "
        "granitemoehybrid hunyuan_v1_moe hy_v3 hy_v4 inkling2_text inkling_text jamba kimi_linear kolibri1 laguna "
        "lfm2_moe llama4 llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text "
        "nemotron_h phimoe qwen3_5_moe qwen3_5_moe_text qwen3_next qwen4_exp qwen4_exp_text solar_open zaya",
    ),
    ("it has no FFN", _DENSE, "falcon_mamba mamba mamba2"),
    (
        "it reads or writes more than text, and no family is written for its text decoder",
        "convert a text model",
        "cohere_compass_text emu3 fuyu git got_ocr2 mllama moss_transcribe_diarize phi4_multimodal",
    ),
    (
        "its FFN adds the residual itself",
        "convert a dense decoder whose layer does, such as gpt_neox",
        "bloom mpt cpmant",
    ),
    (
        "one FFN is run several times for a token, where experts would need as many routes",
        _DENSE,
        "hrm_text zamba zamba2",
    ),
    (
        "it drafts tokens for another model, from that one's keys and values",
        "convert gemma4_text or gemma4_unified_text",
        "gemma4_assistant gemma4_unified_assistant",
    ),
    (
        "its FFN could be expressed, and no family is written for the rest of it",
        _DENSE,
        "bamba ctrl diffllama falcon_h1 gpt_neox_japanese minicpm3 modernbert-decoder openai-gpt recurrent_gemma",
    ),
    ("its FFN drops activations between its two matrices, which experts do not", _DENSE, "biogpt xglm"),
    (
        "it is read with the class of Llama, under a config of its own",
        'where its fields are those of Llama, write "model_type": "llama" into its config.json and convert that',
        "internlm3 iquestcoder",
    ),
]
_SINGLE: dict[str, tuple[str, str]] = {
    "bitnet": ("its FFN normalises between its two products, and its weights are ternary", _DENSE),
    "blt": ("it reads bytes, whose patches three models of different depth share", _DENSE),
    "doge": ("its FFN may be a mixture of single neurons, and a residual has a weight of its own", _DENSE),
    "gemma3n": (
        "it reads images and sounds too, and its layers run on several streams at once",
        "convert gemma3_text or gemma4_text",
    ),
    "gemma3n_text": (
        "its FFN is sparse by itself, keeping what stands out of a layer's mean, and its layers run on several streams "
        "at once",
        "convert gemma3_text or gemma4_text",
    ),
    "gpt-sw3": ("its checkpoints call themselves gpt2", 'write "model_type": "gpt2" into its config.json'),
    "gpt_oss": (
        "its experts have biases and clamped activations, and its attention has sinks",
        _MIXTURE,
    ),
    "jetmoe": ("its attention is a mixture of experts too", _MIXTURE),
    "moshi": ("its decoder runs a second one for every token of sound", _DENSE),
    "reformer": ("its layers are reversible, and FFN and attention run on two streams", _DENSE),
    "rwkv": ("its FFN looks at the token before", _DENSE),
    "t5": ("it is an encoder and a decoder", "convert a decoder by itself, such as qwen3 or gpt2"),
    "xlm": ("it is an encoder that can be run as a decoder, with embeddings of languages", _DENSE),
    "xlnet": ("it predicts tokens in any order, with two streams of attention", _DENSE),
    "xlstm": ("it is recurrent, and only some of its blocks have an FFN", _DENSE),
}
REFUSALS: dict[str, Refusal] = {
    name: Refusal(reason, nearest) for reason, nearest, names in _GROUPS for name in names.split()
} | {name: Refusal(*said) for name, said in _SINGLE.items()}
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def why_not(config: dict[str, Any]) -> str:
    """Why a config.json's model type cannot be converted, and the nearest thing that can."""
    model_type = config.get("model_type")
    refusal = REFUSALS.get(str(model_type))
    if refusal is not None:
        return str(refusal)
    if any(isinstance(config.get(field), int) and config[field] > 1 for field in _EXPERT_FIELDS):
        return f"a mixture of experts that no family here computes the rest of; {_MIXTURE}"
    if config.get("is_encoder_decoder"):
        return "it is an encoder and a decoder; convert a decoder by itself, such as qwen3 or gpt2"
    if "vision_config" in config or "audio_config" in config:
        return "it reads more than text; convert a text model"
    supported = sorted({*modeling_ecmoe.families(), *MIXTURES})
    near = difflib.get_close_matches(str(model_type), supported, n=3)
    return f"no family has that name; {'the nearest are' if near else 'supported are'} {', '.join(near or supported)}"
