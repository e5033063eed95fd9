"""Mixtures whose tokens choose: taken over as they are, routed as they were or by their experts, and given back."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import all_tensors, tiny_tokenizer, write_dense
from families import fill_zeros
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import ecmoe
import modeling_ecmoe
from ecmoe import conversion
from ecmoe.conversion import convert, export
from ecmoe.conversion.cli import main
from ecmoe.conversion.upcycling.mixtures import MIXTURES
from ecmoe.conversion.upcycling.plan import _EXPERT_CHOICE_FIELDS
from ecmoe.conversion.upcycling.settings import MIXTURE_TYPES
from modeling_ecmoe import sparse_blocks

COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 16}
SIGMOID = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("Mixtral", {"num_local_experts": 4}),
    "Mixtral, a window": ("Mixtral", {"num_local_experts": 4, "sliding_window": 8}),
    "Qwen2-MoE": ("Qwen2Moe", QWEN | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}),
    "Qwen3-MoE": ("Qwen3Moe", QWEN | {"head_dim": 8, "norm_topk_prob": True}),
    "Qwen3-MoE, raw weights, dense layers": ("Qwen3Moe", QWEN | {"head_dim": 8, "decoder_sparse_step": 2}),
    "Qwen3-MoE, a window": ("Qwen3Moe", QWEN | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 8}),
    "OLMoE": ("Olmoe", {"num_experts": 4, "clip_qkv": 2.0}),
    "GLM-4-MoE": ("Glm4Moe", SIGMOID | {"head_dim": 8, "use_qk_norm": True, "routed_scaling_factor": 2.5}),
    "DeepSeek-V3": ("DeepseekV3", SIGMOID | LATENT | {"n_shared_experts": 2}),
    "GraniteMoE": ("GraniteMoe", {"num_local_experts": 4, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "GLM-4-MoE, wide heads": ("Glm4Moe", SIGMOID | {"head_dim": 16}),
    "GraniteMoE, wide heads": ("GraniteMoe", {"num_local_experts": 4, "head_dim": 16}),
    "GraniteMoE-Shared": ("GraniteMoeShared", {"num_local_experts": 4, "shared_intermediate_size": 24}),
}


def write_mixture(folder: Path, case: str, **fields: Any) -> PreTrainedModel:
    """A random mixture, saved by Transformers' own class, whose routers decide; in eval mode."""
    name, own = CASES[case]
    config = getattr(transformers, f"{name}Config")(**COMMON | own | fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    fill_zeros(model)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def logits_of(model: PreTrainedModel, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("case", CASES)
def test_by_its_own_rule_it_computes_what_the_source_computes(
    case: str, tmp_path: Path, make_tokens: Callable[..., torch.Tensor]
) -> None:
    """Whole, padded, and token by token with a cache."""
    source = write_mixture(tmp_path / "source", case)
    convert(str(tmp_path / "source"), str(tmp_path / "out"), routing="token_choice", verify=False)
    converted = load(tmp_path / "out")
    ids = make_tokens(2, 24)
    expected = logits_of(source, ids)
    close = 1e-5 * expected.abs().max().item()
    assert (logits_of(converted, ids) - expected).abs().max() <= close
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded = [logits_of(model, ids, attention_mask=mask)[mask.bool()] for model in (source, converted)]
    assert (padded[0] - padded[1]).abs().max() <= close
    greedy = [model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False) for model in (source, converted)]
    assert torch.equal(*greedy)


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("case", CASES)
def test_experts_choose_causally_and_the_loss_is_measured(
    case: str, text: Path, tmp_path: Path, make_tokens: Callable[..., torch.Tensor]
) -> None:
    source = write_mixture(tmp_path / "source", case)
    record = convert(str(tmp_path / "source"), str(tmp_path / "out"), text=str(text))
    converted = load(tmp_path / "out")
    config = converted.config
    has_shared = config.shared_expert_intermediate_size > 0
    assert config.capacity_factor == source.config.num_experts_per_tok == 2
    assert (config.min_experts_per_token, config.router_aux_loss_coef) == (0 if has_shared else 1, 0)
    ids = make_tokens(2, 24)
    whole = logits_of(converted, ids)
    torch.testing.assert_close(logits_of(converted, ids[:, :16]), whole[:, :16], atol=1e-5, rtol=1e-4)
    assert converted.generate(ids[:, :8], max_new_tokens=4, do_sample=False).shape[1] > 8
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a mixture of experts whose tokens choose" in card and "| the source's rule |" in card
    assert "{" not in card.partition("```")[0] and "dense" not in card.partition("## How to load it")[0]
    measured = record["verification"]
    assert [(bound["least"], bound["most"]) for bound in measured["bounds"]] == [(0, 4), (1, 4), (2, 2)]
    assert measured["source"]["loss"] == pytest.approx(measured["loss_dense"], abs=1e-5)
    own = next(bound for bound in measured["bounds"] if bound["least"] == config.min_experts_per_token)
    assert own["loss"] == pytest.approx(measured["loss_converted"], abs=1e-5)
    assert measured["bounds"][-1]["experts_per_token"] == 2.0
    assert measured["source"]["dropped"]["1.0"] >= measured["source"]["dropped"]["1.25"]


@pytest.mark.usefixtures("few_tokens")
def test_the_bounds_that_are_compared_differ(text: Path, tmp_path: Path) -> None:
    """Also where twice the experts of a token are more than there are."""
    write_mixture(tmp_path / "source", "Mixtral", num_local_experts=3)
    measured = convert(str(tmp_path / "source"), str(tmp_path / "out"), text=str(text))["verification"]
    assert [(bound["least"], bound["most"]) for bound in measured["bounds"]] == [(0, 3), (1, 3), (2, 2)]


def test_an_idle_expert_of_the_source_gets_its_share(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On text that nothing was calibrated on, under every bound; the tokens' own choice overloads two of four."""
    monkeypatch.setattr(conversion.texts, "CALIBRATION_TOKENS", 8192)
    monkeypatch.setattr(conversion.texts, "VERIFICATION_TOKENS", 2048)
    source = write_mixture(tmp_path / "source", "Mixtral")
    for layer in source.model.layers:
        layer.mlp.gate.weight.data[2:].mul_(0.1)
    source.save_pretrained(tmp_path / "source")
    measured = convert(str(tmp_path / "source"), str(tmp_path / "out"), text=str(text))["verification"]
    assert measured["source"]["load_cv"] > 0.25
    assert all(bound["load_cv"] < 0.6 * measured["source"]["load_cv"] for bound in measured["bounds"])
    assert measured["source"]["dropped"]["1.0"] > measured["source"]["dropped"]["1.25"] > 0.02


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("routing", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("case", CASES)
def test_it_leaves_as_it_came(case: str, routing: str, text: Path, tmp_path: Path) -> None:
    """The files' own tensors, bit for bit, and the class's own config."""
    write_mixture(tmp_path / "source", case)
    convert(str(tmp_path / "source"), str(tmp_path / "out"), routing=routing, text=str(text), verify=False)
    export(str(tmp_path / "out"), str(tmp_path / "back"), verify=False)
    before, after = all_tensors(tmp_path / "source"), all_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "back")]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    assert configs[0]["num_experts_per_tok"] == configs[1]["num_experts_per_tok"]


@pytest.mark.parametrize("case", ["GLM-4-MoE, wide heads", "GraniteMoE, wide heads"])
def test_what_leaves_computes_what_came(case: str, tmp_path: Path, make_tokens: Callable[..., torch.Tensor]) -> None:
    """Also where heads are wider than the hidden size divided among them, of which some classes have no field."""
    source = write_mixture(tmp_path / "source", case)
    convert(str(tmp_path / "source"), str(tmp_path / "out"), routing="token_choice", verify=False)
    export(str(tmp_path / "out"), str(tmp_path / "back"), verify=False)
    ids = make_tokens(2, 24)
    expected = logits_of(source, ids)
    assert (logits_of(load(tmp_path / "back"), ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_the_class_reads_in_training_leaves_too(tmp_path: Path) -> None:
    own = {"router_jitter_noise": 0.1, "router_aux_loss_coef": 0.05}
    write_mixture(tmp_path / "source", "Mixtral", **own)
    convert(str(tmp_path / "source"), str(tmp_path / "out"), routing="token_choice", verify=False)
    export(str(tmp_path / "out"), str(tmp_path / "back"), verify=False)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in own} == own


def _train_biases(folder: Path, ids: torch.Tensor) -> PreTrainedModel:
    """Ten steps that move nothing but the thresholds, which tokens rank their experts by; saved, in eval mode."""
    model = AutoModelForCausalLM.from_pretrained(folder, token_choice_bias_update_rate=0.05).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(10):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return model.eval()


def test_biases_that_training_moved_leave_though_the_router_is_the_source_s(
    tmp_path: Path, make_tokens: Callable[..., torch.Tensor]
) -> None:
    write_mixture(tmp_path / "source", "GLM-4-MoE")
    convert(str(tmp_path / "source"), str(tmp_path / "out"), routing="token_choice", verify=False)
    ids = make_tokens(2, 24)
    trained = _train_biases(tmp_path / "out", ids)
    assert export(str(tmp_path / "out"), str(tmp_path / "back"), verify=False)["is_exact"]
    torch.testing.assert_close(logits_of(load(tmp_path / "back"), ids), logits_of(trained, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("few_tokens")
def test_biases_that_the_class_has_no_room_for_are_said(
    text: Path, tmp_path: Path, make_tokens: Callable[..., torch.Tensor]
) -> None:
    """Mixtral ranks by scores alone, and its export of such a model is measured as any other that is not exact."""
    write_mixture(tmp_path / "source", "Mixtral")
    convert(str(tmp_path / "source"), str(tmp_path / "out"), routing="token_choice", verify=False)
    _train_biases(tmp_path / "out", make_tokens(2, 24))
    record = export(str(tmp_path / "out"), str(tmp_path / "back"), text=str(text))
    assert not record["is_exact"] and record["verification"]["kl_divergence"] > 1e-3
    card = (tmp_path / "back" / "README.md").read_text()
    assert "Not exact: the routes" in card and "Exact: the routes" not in card


def test_a_trained_router_does_not_pass_for_the_source_s(tmp_path: Path) -> None:
    write_mixture(tmp_path / "source", "Mixtral")
    convert(str(tmp_path / "source"), str(tmp_path / "out"), verify=False)
    tensors = all_tensors(tmp_path / "out")
    tensors["model.layers.1.mlp.gate.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert export(str(tmp_path / "out"), str(tmp_path / "back"), verify=False)["form"]["is_shifted"]


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("case", ["GLM-4-MoE", "DeepSeek-V3"])
@pytest.mark.parametrize("bounds", [(None, None), (2, 2)], ids=["unbounded", "bounded"])
def test_weights_that_are_divided_by_their_sum_have_no_idle_experts(
    case: str,
    bounds: tuple[int | None, int | None],
    text: Path,
    tmp_path: Path,
    make_tokens: Callable[..., torch.Tensor],
) -> None:
    """With a router that was trained: exact where every token has as many experts, and elsewhere said not to be."""
    write_mixture(tmp_path / "source", case, norm_topk_prob=True)
    least, most = bounds
    options = {"min_experts_per_token": least, "max_experts_per_token": most, "text": str(text)}
    convert(str(tmp_path / "source"), str(tmp_path / "out"), **options)
    trained = load(tmp_path / "out")
    for block in sparse_blocks(trained).values():
        block.gate.weight.data.mul_(1.01)
    trained.save_pretrained(tmp_path / "out")
    record = export(str(tmp_path / "out"), str(tmp_path / "back"), text=str(text))
    assert (record["is_exact"], record["form"]["num_idle"]) == (most == 2, 0)
    ids = make_tokens(2, 24)
    expected = logits_of(trained, ids)
    difference = (logits_of(load(tmp_path / "back"), ids) - expected).abs().max() / expected.abs().max()
    assert (difference <= 1e-5) == record["is_exact"]
    card = (tmp_path / "back" / "README.md").read_text()
    assert ("Not exact: the routes" in card) != record["is_exact"] and "fill up" not in card


@pytest.mark.parametrize("case", ["Mixtral", "GraniteMoE", "OLMoE", "GLM-4-MoE"])
def test_whole_numbers_of_a_recipe_leave_too(case: str, tmp_path: Path) -> None:
    """`router_aux_loss_coef=0` in a recipe is an int, which plain classes refuse."""
    write_mixture(tmp_path / "source", case)
    convert(str(tmp_path / "source"), str(tmp_path / "out"), routing="token_choice", verify=False)
    fields = {"router_aux_loss_coef": 0, "router_jitter_noise": 0}
    if case == "GLM-4-MoE":
        fields["routed_scaling_factor"] = 2
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **fields)
    trained.save_pretrained(tmp_path / "out")
    export(str(tmp_path / "out"), str(tmp_path / "back"), verify=False)
    load(tmp_path / "back")


@pytest.mark.parametrize("case", CASES)
def test_stacked_experts_are_read_too(case: str, tmp_path: Path, make_tokens: Callable[..., torch.Tensor]) -> None:
    """As Transformers has them in memory, in a file and in a model; the latter shares what is the same."""
    source = write_mixture(tmp_path / "source", case)
    save_file(
        {name: tensor.contiguous() for name, tensor in source.state_dict().items()},
        tmp_path / "source" / "model.safetensors",
        metadata={"format": "pt"},
    )
    convert(str(tmp_path / "source"), str(tmp_path / "out"), routing="token_choice", verify=False)
    in_memory = ecmoe.upcycle(source, routing="token_choice")
    ids = make_tokens(2, 24)
    expected = logits_of(source, ids)
    for converted in (load(tmp_path / "out"), in_memory):
        assert (logits_of(converted, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    theirs = {parameter.data_ptr() for parameter in source.parameters()}
    experts = [p for name, p in in_memory.named_parameters() if ".mlp.experts." in name or ".mlp.gate." in name]
    assert experts and all(parameter.data_ptr() in theirs for parameter in experts)


def test_in_memory_the_experts_choose_by_default(make_tokens: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    source = write_mixture(tmp_path / "source", "Mixtral")
    converted = ecmoe.upcycle(source, calibrate_on=[{"input_ids": make_tokens(8, 64)}])
    assert converted.config.routing == "expert_choice"
    assert all(block.gate.threshold_updates > 0 for block in sparse_blocks(converted).values())
    loss = converted.train()(input_ids=make_tokens(2, 16), labels=make_tokens(2, 16)).loss
    loss.backward()
    assert all(block.gate.weight.grad.any() for block in sparse_blocks(converted).values())


def test_arguments_are_checked_with_their_names_alone() -> None:
    assert sorted(MIXTURES) == list(MIXTURE_TYPES)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_every_field_of_the_class_is_accounted_for(model_type: str) -> None:
    """A field that the family does not know is passed on as it is, and would change nothing."""
    mixture = MIXTURES[model_type]
    own = {field.name for field in dataclasses.fields(transformers.CONFIG_MAPPING[model_type])}
    family = {field.name for field in dataclasses.fields(modeling_ecmoe.config_class(mixture.family))}
    assert own - family - set(mixture.own_fields) - set(_EXPERT_CHOICE_FIELDS) == set()


REFUSALS = {
    "made experts": (["--init", "copy"], "init=copy makes experts of a dense FFN"),
    "other number": (["--num-experts", "8"], "num_experts=8: the source has 4 experts"),
    "layers": (["--layers", "last-half"], "layers=last-half makes experts of a dense FFN"),
    "unknown routing": (["--routing", "top-k"], "routing=top-k is unknown"),
    "bounds of token choice": (
        ["--routing", "token_choice", "--min-experts-per-token", "1"],
        "routing=token_choice has no bounds",
    ),
    "another k": (["--routing", "token_choice", "--capacity-factor", "1"], "is the source's own, 2 experts per token"),
    "less than one": (["--capacity-factor", "0.5"], "by default no token is left without an expert"),
    "bounds apart": (["--min-experts-per-token", "3"], "capacity_factor=2"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line(case: str, tmp_path: Path, refuse: Callable[..., None]) -> None:
    options, message = REFUSALS[case]
    write_mixture(tmp_path / "source", "Mixtral")
    refuse([str(tmp_path / "source"), str(tmp_path / "out"), "--no-verify", *options], message, ["source"])


NO_EXPERTS = {
    "Qwen2-MoE": {"mlp_only_layers": [0, 1, 2]},
    "Qwen3-MoE": {"decoder_sparse_step": 5},
    "GLM-4-MoE": {"first_k_dense_replace": 3},
}


@pytest.mark.parametrize("case", NO_EXPERTS)
def test_a_mixture_without_experts_is_refused(case: str, tmp_path: Path, refuse: Callable[..., None]) -> None:
    source = write_mixture(tmp_path / "source", case, **NO_EXPERTS[case])
    ((field, value),) = NO_EXPERTS[case].items()
    refuse([str(tmp_path / "source"), str(tmp_path / "out"), "--no-verify"], f"{field}={value}", ["source"])
    with pytest.raises(conversion.ConversionError, match="no layer of this source has experts"):
        ecmoe.upcycle(source)


@pytest.mark.parametrize("field", [{"capacity_factor": "2"}, {"seed": "x"}, {"min_experts_per_token": True}])
def test_a_value_of_another_kind_is_named(field: dict[str, Any], tmp_path: Path) -> None:
    source = write_mixture(tmp_path / "source", "Mixtral")
    ((name, value),) = field.items()
    message = f"{name}='{value}' must be int.*, and is {type(value).__name__}"
    with pytest.raises(conversion.ConversionError, match=message):
        ecmoe.upcycle(source, **field)
    with pytest.raises(conversion.ConversionError, match=message):
        convert(str(tmp_path / "source"), str(tmp_path / "out"), verify=False, **field)


def test_a_dense_source_has_no_routing_to_choose(tmp_path: Path, refuse: Callable[..., None]) -> None:
    write_dense(tmp_path / "source", "Llama")
    refuse(
        [str(tmp_path / "source"), str(tmp_path / "out"), "--no-verify", "--routing", "token_choice"],
        "routing=token_choice is of a source that is a mixture",
        ["source"],
    )


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("options", [[], ["--no-verify"]], ids=["verified", "not verified"])
def test_where_tokens_choose_nothing_is_said_of_thresholds(
    options: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are none to calibrate, though the load of the source's own choice may be far from even."""
    write_mixture(tmp_path / "source", "Mixtral")
    main([str(tmp_path / "source"), str(tmp_path / "out"), "--text", str(text), "--routing", "token_choice", *options])
    said = capsys.readouterr()
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (said.out, said.err, card):
        assert "alibrat" not in words and "hreshold" not in words, words
    assert "Yes, in every mode" in card and load(tmp_path / "out").config.thresholds_from is None


@pytest.mark.usefixtures("few_tokens")
def test_the_command_prints_the_bounds_side_by_side(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    write_mixture(tmp_path / "source", "Mixtral")
    main([str(tmp_path / "source"), str(tmp_path / "out"), "--text", str(text)])
    said = " ".join(capsys.readouterr().out.split())
    for expected in ("the source's", "from 0 to 4", "from 1 to 4", "from 2 to 2", "a capacity would drop"):
        assert expected in said, said
