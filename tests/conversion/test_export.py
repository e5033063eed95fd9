"""Leaving the family: plain files that Transformers itself would write, exact where they can be, measured where not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STORIES_MODEL, STORIES_TEXT, all_tensors, contents, tiny_tokenizer, write_dense
from conftest import build_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ecmoe import conversion
from ecmoe.conversion import ConversionError, convert, export
from ecmoe.conversion.checkpoints.source import Source
from ecmoe.conversion.cli import main
from ecmoe.conversion.leaving import fit as fitting
from ecmoe.conversion.leaving.plain import Form
from modeling_ecmoe import calibrate_thresholds, sparse_blocks

FAMILIES = {"Llama": "Mixtral", "Mistral": "Mixtral", "Qwen2": "Qwen2Moe", "Qwen3": "Qwen3Moe"}
TOKEN_CHOICE = {"routing": "token_choice", "inference_routing": "token_choice", "capacity_factor": 2}
# What the converter's initialisations set.
BLEND = {"router_score_function": "sigmoid", "shared_expert_weighting": "complement"}
BLEND |= {"shared_expert_intermediate_size": 40}
SHARED = {"router_score_function": "sigmoid", "shared_expert_intermediate_size": 40}
COPY = {"normalize_combine_weights": True, "min_experts_per_token": 1}
SPLIT = COPY | {"shared_expert_intermediate_size": 24, "moe_intermediate_size": 24}
FORMS = {"blend": BLEND, "shared": SHARED, "copy": COPY, "split": SPLIT, "plain": {}}


@pytest.fixture
def some_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than usual, and enough for figures that are compared."""
    monkeypatch.setattr(conversion.texts, "CALIBRATION_TOKENS", 4096)
    monkeypatch.setattr(conversion.texts, "VERIFICATION_TOKENS", 1024)


def write_source(folder: Path, family: str, make_tokens: Callable[..., torch.Tensor], **fields: Any) -> PreTrainedModel:
    """A random expert-choice checkpoint with decided routers and calibrated thresholds, and its model."""
    model = build_model(family, vocab_size=300, **fields)
    with torch.no_grad():
        for block in sparse_blocks(model).values():
            block.gate.weight.mul_(3)
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.normal_()
    if fields.get("routing") != "token_choice":
        calibrate_thresholds(model, [{"input_ids": make_tokens(8, 64, seed=9)}])
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def largest_error(source: PreTrainedModel, folder: Path, ids: torch.Tensor) -> float:
    written = AutoModelForCausalLM.from_pretrained(folder).eval()
    return (logits_of(written, ids) - logits_of(source, ids)).abs().max().item()


EXACT = {
    "normalised": ("Llama", {"normalize_combine_weights": True}),
    "Mistral's window": ("Mistral", {"normalize_combine_weights": True, "sliding_window": 8}),
    "tied": ("Llama", {"normalize_combine_weights": True, "tie_word_embeddings": True}),
    "long context": (
        "Llama",
        {
            "normalize_combine_weights": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        },
    ),
    "Qwen2": ("Qwen2", {"normalize_combine_weights": True}),
    "Qwen2, weights as they are": ("Qwen2", {"mlp_layer_types": ["dense", "sparse"]}),
    "Qwen2, shared expert": ("Qwen2", {"shared_expert_intermediate_size": 40}),
    "Qwen3": ("Qwen3", {"normalize_combine_weights": True, "attention_bias": True}),
    "Qwen3, weights as they are": ("Qwen3", {"mlp_layer_types": ["sparse", "dense"]}),
    "a factor of the weights": ("Llama", {"normalize_combine_weights": True, "routed_scaling_factor": 2.5}),
    "shared expert inside": ("Llama", {"normalize_combine_weights": True, "shared_expert_intermediate_size": 40}),
}


BY_BIASED_SCORE = {"router_score_function": "sigmoid", "token_choice_bias_update_rate": 0.01}


@pytest.mark.parametrize("weighting", ["one", "complement"])
@pytest.mark.parametrize("normalised", [False, True])
def test_token_choice_by_biased_scores_leaves_exactly(
    tmp_path: Path, weighting: str, normalised: bool, make_tokens: Callable[..., torch.Tensor]
) -> None:
    """However its shared expert is weighted."""
    fields = TOKEN_CHOICE | BY_BIASED_SCORE | {"normalize_combine_weights": normalised}
    fields |= {"shared_expert_intermediate_size": 40, "shared_expert_weighting": weighting}
    source = write_source(tmp_path / "source", "Llama", make_tokens, **fields)
    with torch.no_grad():
        for block in sparse_blocks(source).values():
            block.gate.threshold.normal_(std=0.1)
    source.save_pretrained(tmp_path / "source")
    record = export(str(tmp_path / "source"), str(tmp_path / "out"), "glm4-moe", verify=False)
    assert record["is_exact"]
    assert largest_error(source, tmp_path / "out", make_tokens(3, 40)) <= 5e-5


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("case", EXACT)
def test_token_choice_leaves_exactly(
    tmp_path: Path, text: Path, case: str, make_tokens: Callable[..., torch.Tensor]
) -> None:
    family, fields = EXACT[case]
    source = write_source(tmp_path / "source", family, make_tokens, **TOKEN_CHOICE, **fields)
    record = export(str(tmp_path / "source"), str(tmp_path / "out"), text=str(text))
    assert record["is_exact"] and record["num_experts_per_tok"] == 2
    assert record["architecture"] == f"{FAMILIES[family]}ForCausalLM"
    assert abs(record["verification"]["loss_change"]) <= 1e-5
    assert largest_error(source, tmp_path / "out", make_tokens(3, 40)) <= 1e-5


@pytest.mark.parametrize("form", ["blend", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_biased_scores_express_thresholds(
    tmp_path: Path, family: str, form: str, make_tokens: Callable[..., torch.Tensor]
) -> None:
    """With room for all experts GLM-4-MoE computes what the thresholds do; with less, nearly."""
    source = write_source(tmp_path / "source", family, make_tokens, **FORMS[form])
    options = {"to": "glm4-moe", "verify": False}
    record = export(str(tmp_path / "source"), str(tmp_path / "all"), num_experts_per_tok=4, **options)
    assert record["is_exact"] and (record["num_experts"], record["architecture"]) == (8, "Glm4MoeForCausalLM")
    ids = make_tokens(3, 40)
    assert largest_error(source, tmp_path / "all", ids) <= 5e-5
    record = export(str(tmp_path / "source"), str(tmp_path / "one"), num_experts_per_tok=1, **options)
    assert not record["is_exact"]
    assert largest_error(source, tmp_path / "one", ids) > 1e-2  # 1.5 experts on average lose a third of them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "to"), [("Llama", "token-choice"), ("Granite", "token-choice"), ("Qwen3", "glm4-moe")]
)
def test_odd_widths_are_filled_up(
    tmp_path: Path, text: Path, few_tokens: None, family: str, to: str, dtype: torch.dtype
) -> None:
    """torch's grouped product would fail on rows that are no number of 16 bytes; zeros change nothing."""
    fields = TOKEN_CHOICE | ({"normalize_combine_weights": True} if to == "token-choice" else BY_BIASED_SCORE)
    model = build_model(family, vocab_size=300, moe_intermediate_size=18, **fields).to(dtype)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    record = export(str(tmp_path / "source"), str(tmp_path / "out"), to=to, text=str(text))
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert record["is_exact"] and written.dtype == dtype
    written.to(torch.bfloat16)(torch.tensor([[5, 6, 7]]))  # whatever it is loaded as


def test_dense_layers_that_come_first_stay_dense(tmp_path: Path, make_tokens: Callable[..., torch.Tensor]) -> None:
    """As --layers last-half makes them."""
    source = write_source(tmp_path / "source", "Llama", make_tokens, **BLEND, mlp_layer_types=["dense", "sparse"])
    export(str(tmp_path / "source"), str(tmp_path / "out"), "glm4-moe", num_experts_per_tok=4, verify=False)
    assert largest_error(source, tmp_path / "out", make_tokens(3, 40)) <= 5e-5


WRITTEN = [("Llama", "blend"), ("Llama", "split"), ("Mistral", "copy"), ("Mistral", "shared"), ("Qwen2", "blend")]
WRITTEN += [("Qwen2", "shared"), ("Qwen2", "plain"), ("Qwen3", "blend"), ("Qwen3", "split"), ("Qwen3", "plain")]
BY_SCORE = [("Llama", "blend"), ("Mistral", "shared"), ("Qwen2", "shared"), ("Qwen3", "blend")]


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize(
    ("to", "family", "form"),
    [("token-choice", *case) for case in WRITTEN] + [("glm4-moe", *case) for case in BY_SCORE],
)
def test_the_files_are_those_that_transformers_writes(
    tmp_path: Path, family: str, form: str, to: str, text: Path, make_tokens: Callable[..., torch.Tensor]
) -> None:
    """Names, shapes and dtypes of every tensor, and the config, after Transformers has loaded and saved it."""
    write_source(tmp_path / "source", family, make_tokens, **FORMS[form])
    export(str(tmp_path / "source"), str(tmp_path / "out"), to, text=str(text), max_shard_size="100KB")
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    assert type(model).__module__.startswith("transformers.")
    model.save_pretrained(tmp_path / "again")
    written, again = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "again")
    assert written.keys() == again.keys()
    assert all(torch.equal(written[name], again[name]) for name in again)
    assert all(written[name].dtype == again[name].dtype for name in again)
    config, expected = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again"))
    added = {name: value for name, value in config.items() if name not in expected}
    assert config == expected | added
    assert added.items() >= {"rope_theta": 10000.0, "torch_dtype": "float32"}.items()
    assert added.keys() <= {"rope_theta", "torch_dtype", "num_experts", "qkv_bias"}


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize(
    ("family", "init"), [("Llama", "blend"), ("Qwen2", "blend"), ("Qwen3", "split"), ("Llama", "granular")]
)
def test_an_upcycled_model_leaves_as_what_it_was(
    tmp_path: Path, family: str, init: str, text: Path, make_tokens: Callable[..., torch.Tensor]
) -> None:
    """Before any training copies of the dense FFN compute it by whatever routes, and so does the plain model."""
    dense = write_dense(tmp_path / "dense", family)
    convert(str(tmp_path / "dense"), str(tmp_path / "sparse"), num_experts=4, init=init, text=str(text))
    export(str(tmp_path / "sparse"), str(tmp_path / "plain"), text=str(text))
    assert largest_error(dense, tmp_path / "plain", make_tokens(3, 40)) <= 5e-5


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("init", ["copy", "shared", "blend", "split"])
def test_nothing_is_measured_where_no_route_matters(
    tmp_path: Path, init: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before training the verification alone runs the models; a layer of which one number has changed is measured."""
    write_dense(tmp_path / "dense", "Llama")
    convert(str(tmp_path / "dense"), str(tmp_path / "sparse"), num_experts=4, init=init, text=str(text))
    fitted: list[list[str]] = []
    fit = conversion.leaving.export.fit
    watched = lambda *arguments: fitted.append(arguments[-1]) or fit(*arguments)  # noqa: E731
    monkeypatch.setattr(conversion.leaving.export, "fit", watched)
    record = export(str(tmp_path / "sparse"), str(tmp_path / "plain"), text=str(text))
    assert fitted == [] and record["calibration_tokens"] == 0
    assert record["verification"]["kl_divergence"] < 1e-6
    assert "Exact: what the experts compute." in (tmp_path / "plain" / "README.md").read_text()
    tensors = load_file(tmp_path / "sparse" / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj"][2, 5, 7] += 1
    save_file(tensors, tmp_path / "sparse" / "model.safetensors", metadata={"format": "pt"})
    record = export(str(tmp_path / "sparse"), str(tmp_path / "again"), text=str(text), calibration_tokens=300)
    assert fitted == [["1"]] and record["calibration_tokens"] == 256  # two windows of 128
    assert "Exact: what the experts compute." not in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.usefixtures("few_tokens")
def test_routes_matter_where_alike_experts_have_no_fixed_weight(
    tmp_path: Path, text: Path, make_tokens: Callable[..., torch.Tensor]
) -> None:
    """One FFN for all experts, weighted by raw scores, or taken by no expert: the routes decide how much of it."""
    for name, fields in {"raw": {"min_experts_per_token": 1}, "none": {"normalize_combine_weights": True}}.items():
        write_source(tmp_path / name, "Llama", make_tokens, **fields)
        tensors = load_file(tmp_path / name / "model.safetensors")
        for key, tensor in tensors.items():
            if ".mlp.experts." in key:
                tensor[:] = tensor[:1].clone()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        record = export(str(tmp_path / name), str(tmp_path / "out" / name), text=str(text))
        assert record["calibration_tokens"] == 512


@pytest.mark.usefixtures("some_tokens")
@pytest.mark.parametrize("form", ["blend", "shared", "copy"])
def test_what_is_measured_beats_what_is_not(
    tmp_path: Path, form: str, text: Path, make_tokens: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without the moved rows, and with weights of one for scales, the export is further away."""
    write_source(tmp_path / "source", "Llama", make_tokens, **FORMS[form], capacity_factor=1)
    measured = export(str(tmp_path / "source"), str(tmp_path / "out"), text=str(text))
    nothing = {f"{layer}.scales": torch.ones(4) for layer in range(2)} if form != "copy" else {}
    monkeypatch.setattr(conversion.leaving.export, "fit", lambda *_: nothing)
    naive = export(str(tmp_path / "source"), str(tmp_path / "naive"), text=str(text))
    assert measured["verification"]["kl_divergence"] < naive["verification"]["kl_divergence"]


def test_an_export_that_is_not_exact_fails(
    tmp_path: Path, text: Path, make_tokens: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the check of exact forms: an expert that is a little off, and nothing is left."""
    write_source(tmp_path / "source", "Llama", make_tokens, **TOKEN_CHOICE, normalize_combine_weights=True)
    block = conversion.leaving.plain._Maker._block
    monkeypatch.setattr(conversion.leaving.plain._Maker, "_block", lambda *arguments: block(*arguments) * 1.01)
    with pytest.raises(ConversionError, match="the export does not compute what its source does"):
        export(str(tmp_path / "source"), str(tmp_path / "out"), text=str(text))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.usefixtures("few_tokens")
def test_the_warning_the_record_and_the_card_say_the_same(
    tmp_path: Path, text: Path, make_tokens: Callable[..., torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "source", "Qwen3", make_tokens, **BLEND)
    (tmp_path / "source" / "LICENSE").write_text("terms\n")
    main(["--to=token-choice", str(tmp_path / "source"), str(tmp_path / "out"), f"--text={text}"])
    record = json.loads((tmp_path / "out" / "ecmoe_conversion.json").read_text())
    measured, parameters = record["verification"], record["parameters"]
    warning = capsys.readouterr().err
    assert "warning: the routing changed: each token takes its 2 best experts" in warning
    assert f"The loss changed by {measured['loss_change']:+.4f} nats per token." in warning
    assert measured["loss_change"] == measured["loss_export"] - measured["loss_source"] != 0
    assert measured["kl_divergence"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", card, re.MULTILINE))
    loss = rows["causal loss (nats per token, 256 tokens of `topics.txt`)"]
    assert loss == f"{measured['loss_source']:.4f} | {measured['loss_export']:.4f}"
    assert rows["change of the loss"] == f"| {measured['loss_change']:+.4f}"
    assert rows["parameters"] == f"{parameters['source']:,} | {parameters['total']:,}"
    assert "routing of this checkpoint is not that of its source" in card and "Not exact: the routes." in card
    assert str(tmp_path) not in card
    assert sum(parameter.numel() for parameter in source.parameters()) == parameters["source"]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(parameter.numel() for parameter in written.parameters()) == parameters["total"]
    for name in ("tokenizer.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.py"))


CHANGED = {
    "weights": ("Llama", {"router_score_function": "sigmoid"}, "the combine weights changed: a measured number"),
    "biases": (
        "Llama",
        BY_BIASED_SCORE,
        "the routing changed: each token takes its 2 best experts without the biases that they were ranked by",
    ),
    "groups": (
        "Llama",
        {"normalize_combine_weights": True, "num_expert_groups": 2},
        "the routing changed: each token takes its 2 best experts of whatever group",
    ),
}


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("case", CHANGED)
def test_what_changes_of_token_choice_is_said(
    tmp_path: Path, text: Path, case: str, make_tokens: Callable[..., torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """The routes of a source without biases stay, whatever stands for its weights."""
    family, fields, message = CHANGED[case]
    write_source(tmp_path / "source", family, make_tokens, **TOKEN_CHOICE, **fields)
    main(["--to=token-choice", str(tmp_path / "source"), str(tmp_path / "out"), f"--text={text}"])
    assert f"warning: {message}" in capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("routing of this checkpoint is not that of its source" in card) == (case != "weights")


LLAMA_CPP = {  # family, fields, --to, and what is said of llama.cpp
    "Qwen2": ("Qwen2", COPY, "token-choice", "run this with other tools"),
    "Qwen2, by sigmoid": ("Qwen2", BLEND, "token-choice", "--to glm4-moe writes what it reads right"),
    "Llama with a dense layer": ("Llama", COPY | {"mlp_layer_types": ["dense", "sparse"]}, "token-choice", "llama.cpp"),
    "raw weights": ("Qwen2", {}, "token-choice", ""),
    "GLM": ("Qwen2", BLEND, "glm4-moe", ""),
    "Mixtral": ("Llama", COPY, "token-choice", ""),
}


@pytest.mark.parametrize("case", LLAMA_CPP)
def test_what_llama_cpp_would_misread_is_said(
    tmp_path: Path, case: str, make_tokens: Callable[..., torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen2-MoE with norm_topk_prob, by a dry run too; the card says it to whoever gets the folder."""
    family, fields, to, remedy = LLAMA_CPP[case]
    write_source(tmp_path / "source", family, make_tokens, **fields)
    main([f"--to={to}", str(tmp_path / "source"), str(tmp_path / "out"), "--dry-run"])
    warning = capsys.readouterr().err
    assert ("llama.cpp does not read norm_topk_prob" in warning) == bool(remedy) and remedy in warning
    if case == "Llama with a dense layer":
        export(str(tmp_path / "source"), str(tmp_path / "out"), verify=False)
        assert "llama.cpp does not read norm_topk_prob" in (tmp_path / "out" / "README.md").read_text()
        assert json.loads((tmp_path / "out" / "config.json").read_text())["norm_topk_prob"] is True


def test_a_dry_run_reads_no_weights_and_writes_nothing(
    tmp_path: Path,
    make_tokens: Callable[..., torch.Tensor],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_source(tmp_path / "source", "Llama", make_tokens, **BLEND)
    before = contents(tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", lambda *_: pytest.fail("weights were read"))
        main(["--to=glm4-moe", str(tmp_path / "source"), str(tmp_path / "out"), "--dry-run"])
        plan = export(str(tmp_path / "source"), str(tmp_path / "out"), "glm4-moe", dry_run=True)
    printed = capsys.readouterr().out
    assert "Nothing was written." in printed and f"{plan['parameters']['total']:,}" in printed
    assert contents(tmp_path / "source") == before and [path.name for path in tmp_path.iterdir()] == ["source"]
    record = export(str(tmp_path / "source"), str(tmp_path / "out"), "glm4-moe", verify=False)
    assert record["parameters"] == plan["parameters"]
    assert plan["output_bytes"] == sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())


@pytest.mark.usefixtures("few_tokens")
def test_killed_it_goes_on_with_the_same_bytes(
    tmp_path: Path, text: Path, make_tokens: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before every 25th piece of a tensor: nothing loads before the end, nothing is measured twice."""
    write_source(tmp_path / "source", "Llama", make_tokens, **BLEND)
    options = {"text": str(text), "max_shard_size": "60KB"}
    source = str(tmp_path / "source")
    export(source, str(tmp_path / "reference" / "out"), **options)
    reference = contents(tmp_path / "reference" / "out")
    count, real, fits = 0, conversion.checkpoints.writer._bytes, []
    fit = conversion.leaving.export.fit
    monkeypatch.setattr(conversion.leaving.export, "fit", lambda *arguments: fits.append(1) or fit(*arguments))

    class Killed(BaseException):
        pass

    def piece(tensor: torch.Tensor) -> memoryview:
        nonlocal count
        count += 1
        if count % 25 == 0:
            raise Killed
        return real(tensor)

    monkeypatch.setattr(conversion.checkpoints.writer, "_bytes", piece)
    kills = 0
    while not (tmp_path / "place" / "out").exists():
        try:
            export(source, str(tmp_path / "place" / "out"), **options)
        except Killed:
            kills += 1
            assert [path.name for path in (tmp_path / "place").iterdir()] == [".out.partial"]
            assert not list((tmp_path / "place").rglob("config.json"))
    assert kills >= 2 and len(fits) == 1
    assert contents(tmp_path / "place" / "out") == reference
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["out"]


OBSTACLES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "output bias": ("Llama", {"attention_bias": True}, "token-choice", "attention_bias=True: Mixtral has no bias"),
    "dense layer, wide heads": (
        "Llama",
        {"mlp_layer_types": ["dense", "sparse"], "head_dim": 16},
        "token-choice",
        "head_dim=16: the heads of Qwen2-MoE are",
    ),
    "late dense layer": (
        "Llama",
        BLEND | {"mlp_layer_types": ["sparse", "dense"]},
        "glm4-moe",
        "dense layers (1), and those of GLM-4-MoE come first",
    ),
    "window": ("Mistral", BLEND | {"sliding_window": 8}, "glm4-moe", "sliding_window=8: GLM-4-MoE attends"),
    "two windows": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "token-choice",
        "all layers of Qwen3-MoE have the same",
    ),
    "wide heads": ("Qwen2", {"head_dim": 16}, "token-choice", "head_dim=16: the heads of Qwen2-MoE are"),
    "softmax": ("Llama", COPY, "glm4-moe", "router_score_function=softmax of ecmoe_llama: GLM-4-MoE scores by sigmoid"),
    "divided": ("Llama", SHARED | {"normalize_combine_weights": True}, "glm4-moe", "normalize_combine_weights=True"),
    "one expert": (
        "Llama",
        {"num_experts": 1, "capacity_factor": 1, "min_experts_per_token": 1, "router_score_function": "sigmoid"},
        "glm4-moe",
        "num_experts=1: GLM-4-MoE ranks its experts by the best two",
    ),
    "baseline": ("Llama", TOKEN_CHOICE | SHARED, "glm4-moe", "routing=token_choice has no thresholds"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_no_plain_class_can_hold(
    tmp_path: Path, case: str, make_tokens: Callable[..., torch.Tensor], refuse
) -> None:
    family, fields, to, message = OBSTACLES[case]
    write_source(tmp_path / "source", family, make_tokens, **fields)
    refuse([f"--to={to}", str(tmp_path / "source"), str(tmp_path / "out")], message, left=["source"])


OPTIONS = {
    "--to=mixtral": "to=mixtral is unknown; choose token-choice or glm4-moe",
    "--to=token-choice --init=blend": "init=blend does not go with --to token-choice; leave it out",
    "--to=token-choice --num-experts=4": "num_experts=4 does not go with --to token-choice",
    "--to=token-choice --capacity-factor=1": "capacity_factor=1.0 does not go with --to token-choice",
    "--to=token-choice --router=normal": "router=normal does not go with --to token-choice",
    "--to=token-choice --num-gpus=8": "num_gpus=8 does not go with --to token-choice",
    "--num-experts-per-tok=2": "num_experts_per_tok=2 belongs to --to; leave it out",
    "--to=token-choice --num-experts-per-tok=5": "num_experts_per_tok=5 must be between 1 and num_experts=4",
    "--to=token-choice --num-experts-per-tok=0": "num_experts_per_tok=0 must be at least 1",
    "--to=token-choice --calibration-tokens=0": "calibration_tokens=0 must be at least 1",
    "--to=token-choice --no-verify": "the scales that stand for the combine weights are measured on text",
    "--to=token-choice --text=missing.txt": "text=missing.txt cannot be read",
    "--to=token-choice --max-shard-size=5": "max_shard_size=5 is no size",
}


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory, make_tokens: Callable[..., torch.Tensor]) -> Path:
    folder = tmp_path_factory.mktemp("blend")
    write_source(folder, "Llama", make_tokens, **BLEND)
    return folder


@pytest.mark.parametrize("options", OPTIONS)
def test_wrong_option(tmp_path: Path, blend: Path, options: str, refuse) -> None:
    refuse([str(blend), str(tmp_path / "out"), *options.split()], OPTIONS[options], left=[])


def test_wrong_sources(tmp_path: Path, blend: Path, make_tokens: Callable[..., torch.Tensor], refuse) -> None:
    """A dense checkpoint, one of another family, one without a tensor, one with too many, and a NaN."""
    write_dense(tmp_path / "source", "Llama")
    command = ["--to=token-choice", str(tmp_path / "source"), str(tmp_path / "out")]
    refuse(command, "has model_type=llama, and --to takes an expert-choice checkpoint, such as ecmoe_", left=["source"])

    def damage(message: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        for path in blend.iterdir():
            if path.is_file():
                (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
        tensors = load_file(blend / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
        refuse(command, message, left=["source"])

    gate, experts = "model.layers.0.mlp.gate.threshold", "model.layers.1.mlp.experts.down_proj"
    damage(f"lacks the tensor {gate}", lambda tensors: tensors.pop(gate))
    damage("config.json promises", lambda tensors: tensors.update({experts: tensors[experts][:2]}))
    damage("holds extra (1 such tensors)", lambda tensors: tensors.update(extra=torch.ones(1)))
    damage("damaged; fetch", lambda tensors: tensors[experts].fill_(float("nan")))


def test_an_embedding_that_is_said_to_be_tied_and_is_not(tmp_path: Path, blend: Path, refuse) -> None:
    """Transformers loads both, so an export without one of them would be another model."""
    shutil.copytree(blend, tmp_path / "source")
    config = json.loads((blend / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    command = ["--to=token-choice", str(tmp_path / "source"), str(tmp_path / "out")]
    refuse(command, "set tie_word_embeddings to false in ", left=["source"])


def test_help_names_every_destination(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert set(conversion.targets.DESTINATIONS) <= set(capsys.readouterr().out.split())


def test_another_family_is_refused(tmp_path: Path, blend: Path, refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is added to the family and that no plain class was found for yet."""
    monkeypatch.delitem(conversion.targets.DESTINATIONS["token-choice"], "ecmoe_llama")
    message = "model_type=ecmoe_llama: no plain class that --to token-choice writes computes its attention"
    refuse(["--to=token-choice", str(blend), str(tmp_path / "out")], message, left=[])


@pytest.mark.skipif(
    not (STORIES_MODEL.is_dir() and STORIES_TEXT.is_file()),
    reason="stories260K and its text are not beside the repository (ECMOE_TEST_DATA)",
)
@pytest.mark.usefixtures("some_tokens")
def test_a_real_model_whose_experts_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth of every expert's neurons redrawn, so that routes matter: moving the router rows by the thresholds
    keeps more of them than leaving the rows as they are."""
    convert(str(STORIES_MODEL), str(tmp_path / "drop"), init="drop", ratio=0.05, text=str(STORIES_TEXT))
    moved = export(str(tmp_path / "drop"), str(tmp_path / "moved"), text=str(STORIES_TEXT))["verification"]
    monkeypatch.setattr(conversion.leaving.export, "fit", lambda *_: {})
    left = export(str(tmp_path / "drop"), str(tmp_path / "left"), text=str(STORIES_TEXT))["verification"]
    print(moved["loss_change"], moved["kl_divergence"], left["loss_change"], left["kl_divergence"])
    assert abs(moved["loss_change"]) < abs(left["loss_change"])
    assert 0 < moved["kl_divergence"] < left["kl_divergence"] / 2


def test_candidates_that_share_products_are_as_by_themselves(make_routed_model: Callable) -> None:
    """A token that two routers send to the same expert goes through it once; each router gets what it would alone."""
    model = make_routed_model("Llama", shared_expert_intermediate_size=16, shared_expert_weighting="complement")
    block = model.get_decoder().layers[0].mlp
    form = Form(2, 0, True, True, True, False, True)
    inputs_TD = torch.randn(40, 32)
    rows = [block.gate.weight.detach().clone(), torch.randn(4, 32)]
    met: list[int] = []
    block.experts.register_forward_pre_hook(lambda _module, arguments: met.append(len(arguments[0])))
    with torch.no_grad():
        outputs_TD, shared_TD = block(inputs_TD[None])[0], block.shared_expert(inputs_TD)
        together = [fitting._Candidate(block, row, form) for row in rows]
        met.clear()
        fitting._add_to_all(together, inputs_TD, outputs_TD, shared_TD)
        assert 80 < met[0] < 160  # of 40 tokens, each with two experts by either router
        for row, candidate in zip(rows, together, strict=True):
            alone = fitting._Candidate(block, row, form)
            fitting._add_to_all([alone], inputs_TD, outputs_TD, shared_TD)
            for name in ("gram_EE", "moment_E", "square", "weight"):
                torch.testing.assert_close(getattr(candidate, name), getattr(alone, name), rtol=1e-4, atol=1e-5)
            logits_TE = inputs_TD @ row.T
            weight_TK, expert_TK = logits_TE.softmax(-1).topk(2)
            wanted = torch.zeros(())
            for token, (weights, experts) in enumerate(
                zip(weight_TK / weight_TK.sum(1, keepdim=True), expert_TK, strict=True)
            ):
                for weight, expert in zip(weights, experts, strict=True):
                    x = inputs_TD[token]
                    gate, up = (block.experts.gate_up_proj[expert] @ x).chunk(2)
                    made = block.experts.down_proj[expert] @ (nn.functional.silu(gate) * up) - shared_TD[token]
                    wanted += (weight * made) @ (outputs_TD[token] - shared_TD[token])
            torch.testing.assert_close(candidate.moment_E.sum(), wanted, rtol=1e-3, atol=1e-4)
