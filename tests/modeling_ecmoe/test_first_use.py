"""What a person meets who loads a model for the first time: versions, wrong folders, losses, sizes."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import tiny_tokenizer, write_dense
from transformers.utils import logging

import modeling_ecmoe
from modeling_ecmoe import use_inference_routing, versions_ecmoe
from modeling_ecmoe.experts_ecmoe import EcMoeExperts

HEADS = ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What Transformers' logger says, each warning anew."""
    logging.warning_once.cache_clear()
    yield caplog
    logging.warning_once.cache_clear()


def test_a_process_without_the_package(make_model: Callable, tmp_path: Path) -> None:
    """An older Transformers is refused in one line; once the model is there, its tokenizer comes without a question."""
    folder = tmp_path / "saved"
    make_model("Llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("first_use_process.py")
    done = subprocess.run(
        [sys.executable, script, folder],
        cwd=tmp_path,
        env=environment,
        input="",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused = 'expert-choice models need transformers>=5.16.1, and 4.57.1 is installed: pip install --upgrade "tr'
    package, remote, text, model = done.stdout.splitlines()
    assert package.startswith(refused) and remote == package
    assert text and "custom code" in model
    assert done.stderr.partition("the tokenizer\n")[2].partition("loaded\n")[0] == ""


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [("4.57.3", True), ("5.12.0", True), ("5.16.0", True), ("5.16.1", False), ("5.16.1.dev0", False), ("6.0", False)],
)
def test_versions(version: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions_ecmoe.transformers, "__version__", version)
    message = f"need transformers>=5.16.1, and {re.escape(version)} is installed: pip install"
    with pytest.raises(ImportError, match=message) if is_refused else nullcontext():
        versions_ecmoe.require_transformers()


def test_the_oldest_version_is_the_one_that_the_package_says() -> None:
    assert f'"transformers>={versions_ecmoe.OLDEST_TRANSFORMERS},' in (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        if family == "Mixtral":
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300}
            sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
            transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).save_pretrained(folder)
        else:
            write_dense(folder, family)
        return folder

    return make


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("family", "folder"), [("Llama", "Llama"), ("Qwen3", "Llama"), ("Mistral", "Mixtral")])
def test_a_folder_without_experts_is_refused(
    family: str, folder: str, head: str, dense_folder: Callable, make_config: Callable
) -> None:
    """Read as it is, with its own config, and with one of ours whose sizes fit."""
    path = dense_folder(folder)
    model_class = getattr(modeling_ecmoe, f"EcMoe{family}{head}")
    wanted = r"convert it first: `ecmoe-convert SOURCE DESTINATION`, or ecmoe.upcycle\(model\)"
    refused = "is a model of type llama" if family == folder else f"model_type={folder.lower()} is not what"
    with pytest.raises(ValueError, match=f"{refused}.*{wanted}"):
        model_class.from_pretrained(path)
    own = transformers.AutoConfig.from_pretrained(path)
    with pytest.raises(ValueError, match=f"config={type(own).__name__} is no config of.*{wanted}"):
        model_class.from_pretrained(path, config=own)
    with pytest.raises(ValueError, match=f"holds .*layers.* instead of the experts.*{wanted}"):
        model_class.from_pretrained(path, config=make_config(family, vocab_size=300))


def test_a_config_of_ours_with_a_dense_model_s_sizes_makes_a_model(dense_folder: Callable) -> None:
    """To train from scratch, no weights are read."""
    config = modeling_ecmoe.EcMoeLlamaConfig.from_pretrained(dense_folder("Llama"), num_experts=2)
    assert modeling_ecmoe.EcMoeLlamaForCausalLM(config).config.num_experts == 2
    assert modeling_ecmoe.EcMoeLlamaForSequenceClassification(config).num_labels == 2


def passes(model: torch.nn.Module, ids: torch.Tensor, head: str) -> None:
    labels = {"ForSequenceClassification": ids[:, 0] % 2, "ForTokenClassification": ids % 2}.get(head, ids)
    model(ids, labels=labels)


@pytest.mark.parametrize("head", ["ForCausalLM", "ForSequenceClassification", "ForTokenClassification"])
def test_a_loss_that_is_not_causal_says_so(
    head: str, make_model: Callable, make_tokens: Callable, heard: pytest.LogCaptureFixture
) -> None:
    model, ids = make_model("Llama", head), make_tokens(2, 9)
    said = "A loss in train mode without gradients"
    passes(model.train(), ids, head)
    with torch.no_grad():
        model(ids)
        with use_inference_routing(model):
            passes(model, ids, head)
        passes(model.eval(), ids, head)
    assert said not in heard.text
    with torch.no_grad():
        passes(model.train(), ids, head)
        passes(model, ids, head)
    assert heard.text.count(said) == 1 and "model.eval()" in heard.text


def test_token_choice_is_causal_in_train_mode_too(
    make_model: Callable, make_tokens: Callable, heard: pytest.LogCaptureFixture
) -> None:
    fields = {"routing": "token_choice", "inference_routing": "token_choice", "capacity_factor": 2}
    model = make_model("Llama", **fields).train()
    with torch.no_grad():
        passes(model, make_tokens(2, 9), "ForCausalLM")
    assert "A loss in train mode" not in heard.text


@pytest.mark.parametrize(
    ("fields", "mean", "most"),
    [
        ({"capacity_factor": 2}, 2, 4),
        ({"capacity_factor": 1.5, "max_experts_per_token": 2}, 1.5, 2),
        ({"routing": "token_choice", "inference_routing": "token_choice", "capacity_factor": 2}, 2, 2),
    ],
)
def test_mean_and_bound_have_names(fields: dict, mean: float, most: int, make_model: Callable) -> None:
    model = make_model("Llama", shared_expert_intermediate_size=16, **fields)
    config = model.config
    assert (config.mean_experts_per_token, config.most_experts_per_token) == (mean, most)
    assert config.num_experts_per_tok == most  # for servers
    assert not {"mean_experts_per_token", "most_experts_per_token"} & config.to_dict().keys()
    shown = repr(model)
    assert f"experts per token: {mean} on average, at most {most}" in shown
    assert "num_experts=4, gate_up_proj=[4, 96, 32], down_proj=[4, 32, 48]" in shown


@pytest.mark.parametrize("options", [{}, {"exclude_embeddings": True}, {"only_trainable": True}])
def test_active_parameters(options: dict, make_model: Callable) -> None:
    """Of four experts the mean token meets one and a half, of the rest all."""
    model = make_model("Llama", capacity_factor=1.5, mlp_layer_types=["sparse", "dense"])
    if "only_trainable" in options:
        model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    routed = 4 * 96 * 32 + (0 if "only_trainable" in options else 4 * 32 * 48)
    total = model.num_parameters(**options)
    assert model.num_parameters(**options, only_active=True) == total - routed * 5 // 8
    assert total == super(modeling_ecmoe.mixins_ecmoe.EcMoePreTrainedMixin, model).num_parameters(**options)


KINDS = {
    "plain": {},
    "normalised": {"normalize_combine_weights": True, "min_experts_per_token": 1},
    "at most 2": {"max_experts_per_token": 2},
    "exactly 2": {"min_experts_per_token": 2, "max_experts_per_token": 2},
    "shared": {"shared_expert_intermediate_size": 16},
    "blend": {"shared_expert_intermediate_size": 16, "shared_expert_weighting": "complement"},
}


@pytest.mark.parametrize("family", ["Llama", "Starcoder2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_counted_rows_are_what_a_back_end_computes(
    family: str, kind: str, dtype: torch.dtype, make_routed_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU each expert takes its slice of the rows; with gradients a back-end serves them, from the same routes."""
    model = make_routed_model(family, **KINDS[kind])
    torch.nn.Module.to(model, dtype)
    block = model.base_model.layers[0].mlp
    calls: list[list[int]] = []
    counted = EcMoeExperts._counted_rows
    monkeypatch.setattr(
        EcMoeExperts, "_counted_rows", lambda self, rows, counts: calls.append(counts) or counted(self, rows, counts)
    )
    tolerance = {"atol": 3e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-5}
    for length in (1, 2, 3, 12, 40):  # one expert has 1, 2 to 8, more rows
        hidden = torch.randn(1, length, 32, dtype=dtype)
        expected = block(hidden).detach()
        assert not calls
        with torch.no_grad():
            found = block(hidden)
            routes = block.routes(block.gate(hidden[0])[1])
        assert calls.pop() == routes.sum(0).tolist()
        torch.testing.assert_close(found, expected, **tolerance)


@torch.no_grad()
def test_a_token_without_an_expert_has_a_row_of_weight_0(make_routed_model: Callable) -> None:
    block = make_routed_model("Llama").base_model.layers[0].mlp
    block.gate.threshold += 9
    assert torch.equal(block(torch.randn(1, 3, 32)), torch.zeros(1, 3, 32))
