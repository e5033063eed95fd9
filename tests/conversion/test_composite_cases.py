"""Composites: other decoders, heads and layouts, and what cannot be converted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import all_tensors, write_dense
from composites import image_inputs, llava_like, write_composite
from safetensors.torch import load_file, save_file

import modeling_ecmoe
from ecmoe.conversion import convert
from ecmoe.finetune.errors import RecipeError
from ecmoe.finetune.loading import load_config
from ecmoe.finetune.recipe import Recipe
from modeling_ecmoe import sparse_blocks


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    ("name", "decoder"),
    [("Llava", "mistral"), ("Llava", "qwen2"), ("Llava", "qwen3"), ("Mistral3", "ministral3")],
)
@torch.no_grad()
def test_other_decoders(name: str, decoder: str, tmp_path: Path) -> None:
    dense = write_composite(tmp_path / "dense", name, {"model_type": decoder})
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), 2, init="copy", verify=False)
    model = load(tmp_path / "out")
    assert model.config.text_config.model_type == f"ecmoe_{decoder}"
    inputs = image_inputs(tmp_path / "out", name)
    torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_head_of_its_own_is_kept_whatever_the_config_says(tmp_path: Path) -> None:
    """Mistral-3's config ties by default, and checkpoints that say nothing have a head that is not the embedding."""
    dense = write_composite(tmp_path / "dense", "Mistral3")
    path = tmp_path / "dense" / "config.json"
    fields = json.loads(path.read_text())
    del fields["tie_word_embeddings"], fields["text_config"]["tie_word_embeddings"]
    path.write_text(json.dumps(fields))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "dense").tie_word_embeddings
    ids = torch.randint(3, 300, (1, 9))
    for text_only in (False, True):
        target = tmp_path / f"out{text_only}"
        convert(str(tmp_path / "dense"), str(target), 2, verify=False, text_only=text_only)
        model = transformers.AutoModelForCausalLM.from_pretrained(target)
        assert not model.config.tie_word_embeddings and not model.config.get_text_config().tie_word_embeddings
        torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_a_tied_head_stays_tied_and_sixteen_bits_stay(tmp_path: Path) -> None:
    write_composite(tmp_path / "dense", "Gemma3").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), 2, verify=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    for key, tensor in tensors.items():
        wanted = {"threshold": torch.float32, "threshold_updates": torch.int64}
        assert tensor.dtype == wanted.get(key.rpartition(".")[2], torch.bfloat16), key
    model = load(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert {block.gate.threshold.dtype for block in sparse_blocks(model).values()} == {torch.float32}


@pytest.mark.families
def test_a_head_that_no_class_reads_stays_beside_the_model(tmp_path: Path) -> None:
    """Qwen3.5's for further tokens: Transformers passes it over, other tools do not."""
    write_composite(tmp_path / "dense", "Qwen3_5")
    path = tmp_path / "dense" / "model.safetensors"
    ahead = {"mtp.norm.weight": torch.randn(32), "mtp.layers.0.mlp.up_proj.weight": torch.randn(48, 32)}
    save_file(load_file(path) | ahead, path, {"format": "pt"})
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), 2, verify=False)
    written = all_tensors(tmp_path / "out")
    assert all(torch.equal(written[key], tensor) for key, tensor in ahead.items())
    _, found = load(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    record = convert(str(tmp_path / "dense"), str(tmp_path / "alone"), 2, verify=False, text_only=True)
    assert record["left_out"]["mtp"] == 32 + 48 * 32


@torch.no_grad()
def test_the_decoder_of_a_composite_of_another_kind(tmp_path: Path, text: Path, few_tokens: None) -> None:
    """It need only be of a family here; the embedding of its image tokens stays among the others."""
    config = llava_like("LlavaNextConfig", model_type="llama")
    dense = write_composite(tmp_path / "dense", "Llava", config=config)
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), 2, init="copy", text=str(text), text_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(3, 300, (1, 9))
    torch.testing.assert_close(model(ids).logits, dense(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


REFUSED: dict[str, tuple[Any, list[str], str]] = {
    "another kind": (
        {"config_class": "LlavaNextConfig", "model_type": "llama"},
        [],
        "model_type=llava_next is not supported: it reads more than text, and of such models gemma3, ",
    ),
    "another decoder": (
        {"config_class": "LlavaConfig", "model_type": "gemma"},
        [],
        "model_type=llava is not supported: its decoder is a gemma, and may be llama, mistral, qwen2, qwen3; say "
        "text_only=True (--text-only)",
    ),
    "a mixture": (
        {"config_class": "LlavaConfig", "model_type": "mixtral", "num_local_experts": 2},
        ["--text-only"],
        "model_type=llava is not supported: its decoder is a mixtral, and may be llama, ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_said(case: str, tmp_path: Path, refuse: Callable[..., None]) -> None:
    fields, options, message = REFUSED[case]
    write_composite(tmp_path / "dense", "Llava", config=llava_like(**fields))
    refuse([str(tmp_path / "dense"), str(tmp_path / "out"), *options], message, ["dense"])


def test_decoders_whose_tokens_see_later_ones_are_refused(tmp_path: Path, refuse: Callable[..., None]) -> None:
    write_composite(tmp_path / "dense", "Gemma3", {"use_bidirectional_attention": True})
    refuse([str(tmp_path / "dense"), str(tmp_path / "out")], "use_bidirectional_attention=True in ", ["dense"])


def test_text_only_is_of_a_composite(tmp_path: Path, refuse: Callable[..., None]) -> None:
    write_dense(tmp_path / "dense", "Llama")
    message = "text_only=True (--text-only) is of a model that reads more than text, and model_type=llama does not"
    refuse([str(tmp_path / "dense"), str(tmp_path / "out"), "--text-only"], message, ["dense"])


def test_what_a_converted_composite_cannot_do_is_said(tmp_path: Path, refuse: Callable[..., None]) -> None:
    write_composite(tmp_path / "dense", "Gemma3")
    convert(str(tmp_path / "dense"), str(tmp_path / "ecmoe"), 2, verify=False)
    to = ["--to", "token-choice", str(tmp_path / "ecmoe"), str(tmp_path / "out")]
    refuse(to, "has model_type=ecmoe_gemma3, which reads more than text", ["dense", "ecmoe"])
    again = [str(tmp_path / "ecmoe"), str(tmp_path / "out")]
    refuse(again, "is an expert-choice checkpoint already", ["dense", "ecmoe"])
    recipe = {"model": str(tmp_path / "ecmoe"), "dataset": "rows", "output_dir": str(tmp_path / "tuned")}
    with pytest.raises(
        RecipeError, match="is of model_type ecmoe_gemma3, which reads images too, and recipes train on text"
    ):
        load_config(Recipe(**recipe))


def test_a_config_takes_decoders_with_experts_alone() -> None:
    own = modeling_ecmoe.EcMoeLlavaConfig
    with pytest.raises(ValueError, match=r"text_config\.model_type=gemma is no decoder of EcMoeLlavaConfig, which "):
        own(text_config={"model_type": "gemma"})
    with pytest.raises(ValueError, match=r"text_config=LlamaConfig is no config of a decoder with experts\. To make"):
        own(text_config=transformers.LlamaConfig())
    assert own(text_config={"model_type": "qwen2", "num_experts": 3}).text_config.num_experts == 3
    assert own().text_config.model_type == "ecmoe_llama"
    assert modeling_ecmoe.EcMoeLlavaForConditionalGeneration.base_model_class is modeling_ecmoe.EcMoeLlavaModel
