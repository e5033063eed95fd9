"""The older families have several architectures each; tests/families.py shows one, and these are the others."""

from pathlib import Path

import pytest
import torch
from checkpoints import write_dense
from families import ABSENT
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ecmoe.conversion import convert
from modeling_ecmoe import sparse_blocks

VARIANTS = {
    "Falcon-7B: one norm, one head of keys": ("Falcon", {"new_decoder_architecture": False, "num_kv_heads": ABSENT}),
    "Falcon-2-11B: one norm": ("Falcon", {"num_ln_in_parallel_attn": 1}),
    "Falcon-RW: alibi, in turn": (
        "Falcon",
        {
            "new_decoder_architecture": False,
            "parallel_attn": False,
            "alibi": True,
            "multi_query": False,
            "num_kv_heads": ABSENT,
        },
    ),
    "StableLM-2-1.6B: in turn": ("StableLm", {"use_parallel_residual": False, "qk_layernorm": False}),
    "OPT-350m: norms after": ("OPT", {"do_layer_norm_before": False}),
    "OPT of one width, without biases": ("OPT", {"word_embed_proj_dim": 32, "enable_bias": False}),
    "GPT-BigCode with all heads": ("GPTBigCode", {"multi_query": False}),
    "GPT-2 of the default width": ("GPT2", {"n_inner": None, "intermediate_size": ABSENT}),
    "GPT-J of the default width": ("GPTJ", {"n_inner": None, "intermediate_size": ABSENT}),
}


@pytest.mark.families
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_architectures_of_a_family_are_exact(variant: str, tmp_path: Path, text: Path, make_tokens) -> None:
    """And their thresholds are estimated from the norm that stands before the FFN."""
    family, fields = VARIANTS[variant]
    dense = write_dense(tmp_path / "dense", family, **fields)
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=4, init="copy", text=str(text))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = make_tokens(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, dense(ids).logits, atol=2e-5, rtol=2e-5)
    norm = converted.config.dense_ffn.norm
    with safe_open(tmp_path / "dense" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    for name in sparse_blocks(converted):
        assert f"{name.removesuffix('.mlp')}.{norm}.weight" in names
