"""Conversion: exact at step 0, complete, repeatable, and never half done."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import CHAT_TEMPLATE, write_dense
from families import EVERY_DENSE_FAMILY
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import ecmoe
from ecmoe import conversion
from ecmoe.conversion import ConversionError, convert
from ecmoe.conversion.upcycling.initialisations import INITIALISATIONS
from modeling_ecmoe import sparse_blocks


@pytest.mark.parametrize("init", ["blend", "copy"])
@pytest.mark.parametrize("family", EVERY_DENSE_FAMILY)
def test_converted_model_computes_what_the_dense_one_does(
    tmp_path: Path, text: Path, family: str, init: str, make_tokens
) -> None:
    dense = write_dense(tmp_path / "dense", family)
    record = convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=4, init=init, text=str(text))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = make_tokens(3, 40)
    with torch.no_grad():
        expected = dense(ids).logits
        torch.testing.assert_close(converted(ids).logits, expected, atol=2e-5, rtol=2e-5)
        if init == "blend":  # exact whatever the routes are, so in train mode too
            torch.testing.assert_close(converted.train()(ids).logits, expected, atol=2e-5, rtol=2e-5)
            converted.eval()
    greedy = {"do_sample": False, "max_new_tokens": 20, "temperature": None}
    assert torch.equal(dense.generate(ids, **greedy), converted.generate(ids, **greedy))
    assert record["verification"]["greedy_same"]
    assert abs(record["verification"]["loss_change"]) <= 1e-5


def test_a_pythia_file_as_the_hub_has_it(tmp_path: Path, text: Path, make_tokens) -> None:
    """The head under its old name, and buffers of old attention that no model reads, one of them no float."""
    dense = write_dense(tmp_path / "dense", "GPTNeoX")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    head = tensors.pop("embed_out.weight", None)
    tensors["embed_out.weight"] = tensors.pop("lm_head.weight") if head is None else head
    for layer in range(2):
        attention = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(1)
    save_file(tensors, path, metadata={"format": "pt"})
    record = convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=4, text=str(text))
    assert record["parameters"]["dense"] == sum(parameter.numel() for parameter in dense.parameters())
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = make_tokens(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, dense(ids).logits, atol=2e-5, rtol=2e-5)


@pytest.mark.families
@pytest.mark.parametrize("family", ["GPT2", "OPT", "GPTJ", "CodeGen"])
def test_a_base_model_s_file_as_the_hub_has_it(tmp_path: Path, text: Path, family: str, make_tokens) -> None:
    """GPT-2's: names without the language model's prefix, no head, and buffers of old attention; OPT's with a head."""
    dense = write_dense(tmp_path / "dense", family)
    path = tmp_path / "dense" / "model.safetensors"
    tensors = {name.removeprefix(f"{dense.base_model_prefix}."): tensor for name, tensor in load_file(path).items()}
    for layer in range(2):
        for buffer in ("bias", "masked_bias", "causal_mask"):
            tensors[f"h.{layer}.attn.{buffer}"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    save_file(tensors, path, metadata={"format": "pt"})
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=4, text=str(text))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = make_tokens(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, dense(ids).logits, atol=2e-5, rtol=2e-5)


# What dense files hold that were made from a mixture's config, or for another library.
LEFT_OVER = {
    "moe_intermediate_size": 16,
    "num_experts": 1,
    "num_experts_per_tok": 8,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": True,
    "shared_expert_intermediate_size": 24,
    "residual_dropout": 0.5,
}


@pytest.mark.parametrize("init", ["blend", "copy", "granular"])
def test_a_mixture_s_fields_in_a_dense_file_mean_nothing(tmp_path: Path, text: Path, init: str, make_tokens) -> None:
    """The dense class passes them over, and the options of the conversion say what is true."""
    dense = write_dense(tmp_path / "dense", "Qwen3")
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | LEFT_OVER))
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=4, init=init, text=str(text))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    config = converted.config
    assert config.moe_intermediate_size == (24 if init == "granular" else 48)
    assert config.shared_expert_intermediate_size == (48 if init == "blend" else 0)
    assert (config.num_experts, config.num_experts_per_tok) == (4, 4)
    assert config.router_aux_loss_coef == 0 and not config.output_router_logits
    ids = make_tokens(3, 40)
    with torch.no_grad():
        expected = dense(ids).logits
        torch.testing.assert_close(converted(ids).logits, expected, atol=2e-5, rtol=2e-5)
        if init == "blend":
            torch.testing.assert_close(converted.train()(ids).logits, expected, atol=2e-5, rtol=2e-5)


GENERATION: list[dict[str, object]] = [
    {"return_dict_in_generate": True, "output_scores": True},
    {"num_return_sequences": 2, "do_sample": True},
    {"num_beams": 4, "num_return_sequences": 3},
    {"stop_strings": ["the"]},
    {"max_new_tokens": 80, "repetition_penalty": 5.0, "eos_token_id": [1, 2], "pad_token_id": None},
]


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("fields", GENERATION, ids=lambda fields: ",".join(fields))
def test_generation_defaults_travel_and_are_not_what_is_verified(
    tmp_path: Path, text: Path, fields: dict[str, object]
) -> None:
    """The check is greedy and of a fixed length, whatever the source's generation_config.json asks of generate()."""
    write_dense(tmp_path / "dense", "Llama")
    path = tmp_path / "dense" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    record = convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=4, text=str(text))
    assert record["verification"]["greedy_same"] and record["verification"]["greedy_dense"]
    assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_routes_are_decided_and_the_load_is_near_its_share(tmp_path: Path, text: Path) -> None:
    """Exactness would be cheap if nothing were routed."""
    write_dense(tmp_path / "dense", "Llama")
    record = convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=4, capacity_factor=1.5, text=str(text))
    measured = record["verification"]
    assert 1.2 < measured["experts_per_token"] < 1.8
    assert 0.4 < measured["load_min"] <= 1 <= measured["load_max"] < 1.8
    assert 0 < measured["uncovered"] < 0.6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for block in sparse_blocks(model).values():
        assert block.gate.threshold_updates > 0
        assert (block.gate.threshold > 0).all()


def test_a_wrong_conversion_fails_and_leaves_nothing(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the converter's own check: experts that are not the dense FFN."""
    write_dense(tmp_path / "dense", "Llama")
    blend = INITIALISATIONS["blend"]
    monkeypatch.setitem(INITIALISATIONS, "blend", replace(blend, expert=lambda _wanted, dense: dense * 1.01))
    with pytest.raises(conversion.ConversionError, match="does not compute what the dense one does"):
        convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=4, init="blend", text=str(text))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize("tied", [False, True])
def test_shards_in_and_out_hold_the_same_tensors(tmp_path: Path, text: Path, tied: bool) -> None:
    write_dense(tmp_path / "one", "Qwen3", tie_word_embeddings=tied)
    write_dense(tmp_path / "many", "Qwen3", max_shard_size="20KB", tie_word_embeddings=tied)
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    options = {"num_experts": 4, "text": str(text)}
    convert(str(tmp_path / "one"), str(tmp_path / "out_one"), **options)
    convert(str(tmp_path / "many"), str(tmp_path / "out_many"), **options, max_shard_size="30KB")
    index = json.loads((tmp_path / "out_many" / "model.safetensors.index.json").read_text())
    expected = load_file(tmp_path / "out_one" / "model.safetensors")
    found = {}
    for name in set(index["weight_map"].values()):
        found |= load_file(tmp_path / "out_many" / name)
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert ("lm_head.weight" in expected) is not tied
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out_many")


def test_same_seed_same_bytes(tmp_path: Path, text: Path) -> None:
    write_dense(tmp_path / "dense", "Mistral")
    for name, seed in (("first", 3), ("second", 3), ("third", 4)):
        convert(str(tmp_path / "dense"), str(tmp_path / name), num_experts=4, seed=seed, text=str(text))
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second", "third")
    ]
    assert contents[0] == contents[1]
    assert contents[0]["model.safetensors"] != contents[2]["model.safetensors"]


def test_companions_travel_byte_for_byte(tmp_path: Path, text: Path) -> None:
    write_dense(tmp_path / "dense", "Llama")
    (tmp_path / "dense" / "LICENSE").write_text("terms\n")
    (tmp_path / "dense" / "LICENSES").mkdir()
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=2, text=str(text))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHAT_TEMPLATE
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.temperature == 0.7
    assert not list((tmp_path / "out").glob("*.bin"))


def test_sixteen_bit_checkpoints_stay_sixteen_bit(tmp_path: Path, text: Path) -> None:
    write_dense(tmp_path / "dense", "Qwen2", dtype=torch.bfloat16).to(torch.bfloat16).save_pretrained(
        tmp_path / "dense"
    )
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=2, text=str(text))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("gate.threshold"):
            assert tensor.dtype == torch.float32
        elif name.endswith("gate.threshold_updates"):
            assert tensor.dtype == torch.int64
        else:
            assert tensor.dtype == torch.bfloat16, name


def test_interruption_leaves_what_the_same_call_goes_on_with(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dense(tmp_path / "dense", "Llama")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(convert.__globals__, "compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=2, text=str(text))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "dense"]
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / ".out.partial" / "checkpoint")
    monkeypatch.undo()
    monkeypatch.setattr(conversion.checkpoints.writer, "_write_shard", interrupt)  # the shard that is there stays
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=2, text=str(text))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


def test_record_says_what_was_done(tmp_path: Path, text: Path) -> None:
    dense = write_dense(tmp_path / "dense", "Llama")
    returned = convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=4, capacity_factor=2, text=str(text))
    record = json.loads((tmp_path / "out" / "ecmoe_conversion.json").read_text())
    assert record == returned
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert record["parameters"]["dense"] == dense.num_parameters()
    assert record["parameters"]["total"] == model.num_parameters()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert record["parameters"]["active"] == model.num_parameters() - experts // 2
    assert (record["num_experts"], record["capacity_factor"], record["init"]) == (4, 2, "shared")
    assert record["versions"]["torch"] == torch.__version__


def write_tekken(folder: Path) -> None:
    """Mistral's own tokenizer file alone: bytes, three merged tokens, five special ones in front."""
    for path in [*folder.glob("*token*"), *folder.glob("*.jinja")]:
        path.unlink()
    pieces = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" a"]
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    content = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "num_vocab_tokens": len(pieces),
            "default_vocab_size": len(pieces) + len(specials),
            "default_num_special_tokens": len(specials),
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(pieces)
        ],
        "special_tokens": [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(specials)],
    }
    (folder / "tekken.json").write_text(json.dumps(content))


@pytest.mark.parametrize("verify", [True, False])
def test_a_tokenizer_that_is_tekken_alone_travels(verify: bool, tmp_path: Path, text: Path) -> None:
    """Transformers finds it by the model's class, which the output has not; and on the way out again."""
    write_dense(tmp_path / "dense", "Mistral")
    write_tekken(tmp_path / "dense")
    wanted = AutoTokenizer.from_pretrained(tmp_path / "dense")
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=2, text=str(text), verify=verify)
    ecmoe.export(str(tmp_path / "out"), str(tmp_path / "plain"), text=str(text))
    for name in ("out", "plain"):
        found = AutoTokenizer.from_pretrained(tmp_path / name)
        assert (tmp_path / name / "tekken.json").read_bytes() == (tmp_path / "dense" / "tekken.json").read_bytes()
        for sample in ("the cat, a theatre", "caf\u00e9 123\n\n  \u65e5\u672c\u8a9e"):
            assert found(sample)["input_ids"] == wanted(sample)["input_ids"]
            assert found.decode(found(sample)["input_ids"]) == sample


def test_files_of_tokenizers_that_are_not_named_so_travel(tmp_path: Path, text: Path) -> None:
    names = ["tekken.json", "tokenizer.model.v3", "qwen.tiktoken", "vocab.txt", "en-vocab.bpe", "spiece.model"]
    write_dense(tmp_path / "dense", "Llama")
    for name in names:
        (tmp_path / "dense" / name).write_text(name)
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=2, text=str(text), verify=False)
    assert all((tmp_path / "out" / name).read_text() == name for name in names)


def test_a_tokenizer_that_would_be_another_one_is_refused(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dense(tmp_path / "dense", "Llama")
    monkeypatch.setattr(conversion.checkpoints.tokenizer, "_is_same", lambda *_: False)
    with pytest.raises(conversion.ConversionError, match=r"its tokenizer .* is another one when it is"):
        convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=2, text=str(text), verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_vocabulary_without_an_unknown_token(tmp_path: Path) -> None:
    """Its tokenizer refuses words; the probe's among them say nothing against the conversion."""
    write_dense(tmp_path / "dense", "Llama")
    for path in (tmp_path / "dense").glob("tokenizer*"):
        path.unlink()
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "dense")
    with pytest.raises(
        ConversionError, match="the tokenizer refuses the package's sample of text; give text that it knows"
    ):
        convert(str(tmp_path / "dense"), str(tmp_path / "own"), num_experts=4)
    (tmp_path / "text.txt").write_text("a b a b b a " * 900)
    convert(str(tmp_path / "dense"), str(tmp_path / "ecmoe"), num_experts=4, text=str(tmp_path / "text.txt"))
    assert AutoTokenizer.from_pretrained(tmp_path / "ecmoe")("a b")["input_ids"] == [0, 1]
