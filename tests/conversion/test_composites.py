"""Composites: the text decoder of a model that reads images gets experts, and all else stays what it was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from checkpointing import recompute_layers
from checkpoints import all_tensors
from composite_process import outputs_of
from composites import COMPOSITES, image_inputs, write_composite
from converted import expert_adapters
from safetensors.torch import load_file, save_file
from torch import Tensor

import ecmoe
import modeling_ecmoe
from ecmoe import conversion
from ecmoe.conversion import convert
from modeling_ecmoe import record_routing, sparse_blocks

SCRIPT = Path(__file__).parents[1] / "composite_process.py"
CORE = ("Gemma3", "Llava")  # with masks of its own, and without
PROMPTS = ("and the cat", "or a dog that barks")


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=() if n in CORE else pytest.mark.families) for n in COMPOSITES]
)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense composite, and its conversion by blend, whose experts speak from the start."""
    folder = tmp_path_factory.mktemp(name)
    write_composite(folder / "dense", name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion.texts, "CALIBRATION_TOKENS", 1024)
        patch.setattr(conversion.texts, "VERIFICATION_TOKENS", 256)
        patch.setattr(conversion.models, "NUM_GREEDY_TOKENS", 4)
        convert(str(folder / "dense"), str(folder / "ecmoe"), num_experts=4, init="blend", text=str(text))
    return folder


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, **options)


@pytest.fixture
def routed(folder: Path) -> Any:
    """The converted model with experts that differ, so that a route that leaks shows."""
    model = load(folder / "ecmoe")
    with torch.no_grad():
        for block in sparse_blocks(model).values():
            block.gate.weight.mul_(5)
            for parameter in block.experts.parameters():
                parameter.add_(torch.randn_like(parameter))
    modeling_ecmoe.calibrate_thresholds(model, [{"input_ids": torch.randint(3, 300, (8, 64))}])
    return model


@torch.no_grad()
def test_images_and_text_give_what_the_source_gives(folder: Path, name: str) -> None:
    dense, converted = load(folder / "dense"), load(folder / "ecmoe")
    inputs = image_inputs(folder / "ecmoe", name, PROMPTS)
    real = inputs["attention_mask"].bool()
    found, wanted = converted(**inputs).logits, dense(**inputs).logits
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(converted.generate(**inputs, **options), dense.generate(**inputs, **options))
    without = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert not torch.allclose(dense(**without).logits[real], wanted[real], atol=1e-2)  # the image says something


def test_all_but_the_decoder_s_ffns_stay_byte_for_byte(folder: Path, name: str) -> None:
    dense, converted = all_tensors(folder / "dense"), all_tensors(folder / "ecmoe")
    loaded = load(folder / "dense").state_dict()
    kept = {key for key in converted if ".mlp." not in key or "language_model" not in key}
    assert {key for key in loaded if ".mlp." not in key or "language_model" not in key} - kept <= {"lm_head.weight"}
    assert all(torch.equal(converted[key], loaded[key]) for key in kept)
    assert len(dense) > len(kept) > 20
    for path in (folder / "dense").iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (folder / "ecmoe" / path.name).read_bytes() == path.read_bytes()
    before, after = (json.loads((folder / kind / "config.json").read_text()) for kind in ("dense", "ecmoe"))
    assert before["vision_config"].items() <= after["vision_config"].items()
    assert after["text_config"]["thresholds_from"] == "1,024 tokens of topics.txt"


def test_both_layouts_of_names_give_the_same_checkpoint(folder: Path, name: str, tmp_path: Path) -> None:
    write_composite(tmp_path / "dense", name, save_original_format=False)
    for source in (folder / "dense", tmp_path / "dense"):
        convert(str(source), str(tmp_path / source.parent.name), num_experts=2, verify=False)
    one, two = (tmp_path / parent.name for parent in (folder, tmp_path))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


@torch.no_grad()
def test_routes_are_causal_with_an_image_cached_and_padded(routed: Any, folder: Path, name: str) -> None:
    inputs = image_inputs(folder / "ecmoe", name, PROMPTS)
    logits = routed(**inputs).logits
    changed = {key: value.clone() for key, value in inputs.items()}
    changed["input_ids"][:, -1] = 70
    torch.testing.assert_close(routed(**changed).logits[:, :-1], logits[:, :-1], atol=1e-5, rtol=1e-5)
    # Alone, each row gives what it gives beside a longer one.
    for row in range(len(PROMPTS)):
        alone = image_inputs_of_row(folder / "ecmoe", name, row)
        found = routed(**alone).logits[0]
        torch.testing.assert_close(found, logits[row, -len(found) :], atol=2e-5, rtol=1e-4)
    # Step by step with a cache as at once.
    ids = routed.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    plain = routed.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(ids, plain)


def image_inputs_of_row(folder: Path, name: str, row: int) -> dict[str, Tensor]:
    """One row of the batch without its padding."""
    whole = image_inputs(folder, name, PROMPTS)
    start = int((whole["attention_mask"][row] == 0).sum())
    length = whole["input_ids"].shape[1]
    found = {}
    for key, value in whole.items():
        if value.shape[:2] == (len(PROMPTS), length):
            found[key] = value[row : row + 1, start:]
        else:
            found[key] = value.view(len(PROMPTS), -1, *value.shape[1:])[row].clone()
    return found


def test_padding_is_no_token_to_the_experts_and_an_image_is(routed: Any, folder: Path, name: str) -> None:
    inputs = image_inputs(folder / "ecmoe", name, PROMPTS)
    real = int(inputs["attention_mask"].sum())
    assert real < inputs["attention_mask"].numel()
    with record_routing(routed) as record, torch.no_grad():
        routed(**inputs)
    assert set(record.tokens.values()) == {real}
    optimizer = torch.optim.AdamW(routed.parameters(), lr=1e-3)
    routed.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    for block in sparse_blocks(routed).values():
        assert int(block.gate.threshold_updates) == 11  # the calibration counts as ten
        assert block.gate.weight.grad.abs().sum() > 0


def test_recomputed_layers_and_router_losses(routed: Any, folder: Path, name: str) -> None:
    inputs = image_inputs(folder / "ecmoe", name, PROMPTS)
    routed.config.text_config.router_z_loss_coef = 0.1
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    outputs = routed.train()(**inputs, labels=labels, output_router_logits=True)
    assert [logits.shape for logits in outputs.router_logits] == [(labels.numel(), 4)] * len(sparse_blocks(routed))
    outputs.loss.backward()
    wanted = {key: p.grad.clone() for key, p in routed.named_parameters() if p.grad is not None}
    routed.config.text_config.router_z_loss_coef = 0.0
    assert routed(**inputs, labels=labels).loss < outputs.loss
    routed.config.text_config.router_z_loss_coef = 0.1
    routed.zero_grad()
    recompute_layers(routed, use_reentrant=False)
    routed(**inputs, labels=labels, use_cache=False).loss.backward()
    for key, grad in wanted.items():
        torch.testing.assert_close(routed.get_parameter(key).grad, grad, atol=1e-5, rtol=1e-3, msg=key)


def test_adapters_are_trained_saved_and_loaded(routed: Any, folder: Path, name: str, tmp_path: Path) -> None:
    inputs = image_inputs(folder / "ecmoe", name, PROMPTS)
    routed.save_pretrained(tmp_path / "base")
    adapters = expert_adapters()
    adapters.target_modules = r".*language_model.*\.(q_proj|v_proj)"  # a tower has modules of these names too
    model = peft.get_peft_model(load(tmp_path / "base"), adapters)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(".experts." in key and p.requires_grad and p.any() for key, p in model.named_parameters())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = model.eval()(**inputs).logits
        assert not torch.allclose(wanted, load(tmp_path / "base")(**inputs).logits, atol=1e-3)
        torch.testing.assert_close(again(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again.merge_and_unload()(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)


def test_calibration_and_evaluation(folder: Path, name: str, text: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "ecmoe", tmp_path / "ecmoe")
    ecmoe.calibrate(tmp_path / "ecmoe", text, tokens=512)
    model = load(tmp_path / "ecmoe")
    assert model.config.text_config.thresholds_from == "512 tokens of topics.txt"
    assert not hasattr(model.config, "thresholds_from")
    result = ecmoe.evaluate(str(tmp_path / "ecmoe"), str(text), max_tokens=600, against=[str(folder / "dense")])
    assert result["thresholds_from"] == "512 tokens of topics.txt"
    assert abs(result["loss"] - result["against"][0]["loss"]) < 1e-5
    assert len(result["routes"]["layers"]) == len(sparse_blocks(model))
    assert result["against"][0]["model_type"] in modeling_ecmoe.composites()


@torch.no_grad()
def test_the_decoder_alone(folder: Path, name: str, text: Path, tmp_path: Path, few_tokens: None) -> None:
    record = convert(str(folder / "dense"), str(tmp_path / "out"), 4, init="blend", text=str(text), text_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = load(folder / "dense")
    assert type(model).__name__.endswith("ForCausalLM")
    ids = torch.randint(3, 300, (2, 20))
    torch.testing.assert_close(model(ids).logits, dense(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    (note,) = [note for note in record["notes"] if note.startswith("text_only=True leaves out ")]
    assert all(part in note for part in record["left_out"])
    others = sum(
        p.numel() for key, p in dense.named_parameters() if "language_model" not in key and "lm_head" not in key
    )
    assert sum(record["left_out"].values()) >= others  # and buffers
    assert not list((tmp_path / "out").glob("*processor*"))


@torch.no_grad()
def test_upcycled_in_memory(folder: Path, name: str) -> None:
    dense = load(folder / "dense")
    model = ecmoe.upcycle(dense, 4, init="blend")
    inputs = image_inputs(folder / "ecmoe", name, PROMPTS)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], dense(**inputs).logits[real], atol=1e-5, rtol=1e-5)


OTHERS = [name for name in COMPOSITES if name not in CORE]


@pytest.mark.parametrize(
    "names", [CORE, pytest.param(OTHERS, marks=pytest.mark.families)], ids=lambda names: "-".join(names)
)
def test_remote_code_gives_the_outputs_of_the_package(names: list[str], tmp_path: Path) -> None:
    """From a converted folder, and from one that the remote code saved itself."""
    folders: list[Path] = []
    wanted: dict[str, Tensor] = {}
    for name in names:
        write_composite(tmp_path / "dense" / name, name)
        folders.append(tmp_path / name)
        convert(str(tmp_path / "dense" / name), str(folders[-1]), num_experts=2, verify=False)
        model, inputs = load(folders[-1]), image_inputs(folders[-1], name, PROMPTS)
        with torch.no_grad():
            for block in sparse_blocks(model).values():
                block.experts.down_proj.normal_()
        model.save_pretrained(folders[-1])
        save_file(inputs, folders[-1] / "inputs.safetensors")
        outputs = outputs_of(model, inputs)
        wanted |= {f"{name}.{turn}{key}": tensor for key, tensor in outputs.items() for turn in ("", "again.")}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, SCRIPT, tmp_path / "out.safetensors", tmp_path / "again", *folders]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[key], atol=1e-5, rtol=1e-5, msg=key)
