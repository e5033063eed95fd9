"""A model in memory: upcycled, it has the bits of the converted folder and shares what both models have."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from checkpoints import STORIES_MODEL, all_tensors, tiny_tokenizer, write_dense
from families import CORE, FAMILIES, TRANSPOSED, family_and
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import ecmoe
from ecmoe import conversion
from ecmoe.conversion import ConversionError
from ecmoe.conversion.texts import BATCH, read_texts
from ecmoe.conversion.upcycling.initialisations import INITIALISATIONS
from modeling_ecmoe import sparse_blocks

EXACT = [name for name, initialisation in INITIALISATIONS.items() if initialisation.exact]
THRESHOLDS = "gate.threshold"


@pytest.fixture(scope="session")
def dense_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random dense checkpoint of a family."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("dense") / family
            write_dense(folders[family], family)
        return folders[family]

    return make


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def storages(model: PreTrainedModel) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def assert_same_tensors(model: PreTrainedModel, folder: Path) -> None:
    written, held = all_tensors(folder), model.state_dict()
    assert held.keys() - written.keys() <= set(model.all_tied_weights_keys) and written.keys() <= held.keys()
    for name, tensor in written.items():
        assert held[name].dtype == tensor.dtype and torch.equal(held[name], tensor), name


@pytest.mark.parametrize(("family", "init"), family_and(EXACT, ["split"], FAMILIES))
def test_the_bits_are_those_of_convert(family: str, init: str, dense_of: Callable, tmp_path: Path) -> None:
    """And the output is the dense model's; everything outside the experts is the dense model's own tensor."""
    source = dense_of(family)
    model = load(source)
    converted = ecmoe.upcycle(model, num_experts=4, init=init, seed=3)
    ecmoe.convert(str(source), str(tmp_path / "out"), num_experts=4, init=init, seed=3, verify=False)
    assert_same_tensors(converted, tmp_path / "out")
    own, theirs = dict(converted.named_parameters()), dict(model.named_parameters())
    for name in own.keys() & theirs.keys():
        assert own[name].data_ptr() == theirs[name].data_ptr(), name
    made = {name for name, parameter in own.items() if parameter.untyped_storage().data_ptr() not in storages(model)}
    assert made and all(".mlp.gate." in name or ".mlp.experts." in name or ".shared_expert." in name for name in made)
    if INITIALISATIONS[init].shares == "all" and family not in TRANSPOSED:
        assert not any(".shared_expert." in name for name in made)
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", ["noise", "drop", "mix"])
def test_what_is_drawn_or_mixed_has_the_same_bits_too(init: str, dense_of: Callable, tmp_path: Path) -> None:
    write_dense(tmp_path / "other", "Llama", seed=1)
    others = {"mix_with": [str(tmp_path / "other")]} if init == "mix" else {}
    models = {"mix_with": [load(tmp_path / "other")]} if init == "mix" else {}
    converted = ecmoe.upcycle(load(dense_of("Llama")), num_experts=4, init=init, **models)
    ecmoe.convert(str(dense_of("Llama")), str(tmp_path / "out"), num_experts=4, init=init, verify=False, **others)
    assert_same_tensors(converted, tmp_path / "out")


@pytest.mark.parametrize("layers", ["all", "every-second", "0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_layers_and_dtypes(layers: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", "Qwen3", dtype=dtype).to(dtype).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", dtype="auto")
    converted = ecmoe.upcycle(model, init="copy", layers=layers)
    ecmoe.convert(str(tmp_path / "dense"), str(tmp_path / "out"), init="copy", layers=layers, verify=False)
    assert_same_tensors(converted, tmp_path / "out")
    assert converted.dtype == dtype and converted.model.layers[0].mlp.__class__.__name__ == (
        "Qwen3MLP" if layers == "every-second" else "EcMoeBlock"
    )


def test_stories_and_its_thresholds(tmp_path: Path) -> None:
    """Calibrated on the windows that `convert` calibrates on, the thresholds are its own."""
    if not STORIES_MODEL.is_dir():
        pytest.skip("stories260K is not beside the repository (ECMOE_TEST_DATA)")
    model = load(STORIES_MODEL)
    ecmoe.convert(str(STORIES_MODEL), str(tmp_path / "out"), init="granular")
    source = conversion.checkpoints.folder.Checkpoint(str(STORIES_MODEL))
    windows = read_texts(source, model.config, None, 0).calibration
    batches = [{"input_ids": batch} for batch in windows.split(BATCH)]
    assert_same_tensors(ecmoe.upcycle(model, init="granular", calibrate_on=batches), tmp_path / "out")


def test_thresholds_are_said_to_be_estimates_or_measured_on_texts(
    dense_of: Callable, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.utils.logging._get_library_root_logger(), "propagate", True)
    caplog.set_level("WARNING")
    model = load(dense_of("Llama"))
    estimated = ecmoe.upcycle(model, num_experts=4)
    assert "thresholds are estimates" in caplog.text
    caplog.clear()
    texts = ["The quick brown fox jumps over the lazy dog. " * 30, "Lorem ipsum. " * 50]
    measured = ecmoe.upcycle(model, num_experts=4, calibrate_on=texts, tokenizer=tiny_tokenizer())
    assert "estimates" not in caplog.text
    report = ecmoe.routing_report(measured, texts, tiny_tokenizer())
    assert 0.8 < report["summary"]["load_min"] <= report["summary"]["load_max"] < 1.2
    for one, two in zip(sparse_blocks(estimated).values(), sparse_blocks(measured).values(), strict=True):
        assert one.gate.threshold_updates == 1 and two.gate.threshold_updates == 10
        assert torch.equal(one.gate.weight, two.gate.weight) and not torch.equal(one.gate.threshold, two.gate.threshold)


def test_mode_and_settings_are_the_dense_model_s(dense_of: Callable) -> None:
    model = load(dense_of("Llama"), attn_implementation="eager").train()
    model.model.embed_tokens.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted = ecmoe.upcycle(model, num_experts=4)
    assert converted.training and converted.config._attn_implementation == "eager" and model.training
    assert converted.generation_config.temperature == model.generation_config.temperature == 0.7
    assert converted.generation_config is not model.generation_config
    assert not converted.model.embed_tokens.weight.requires_grad and converted.lm_head.weight.requires_grad
    assert model.config.model_type == "llama" and type(model.model.layers[0].mlp).__name__ == "LlamaMLP"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("family", CORE)
def test_shapes_alone_on_the_meta_device_and_a_real_model_beside_it(family: str, dense_of: Callable) -> None:
    """Whatever the default device is: what is drawn and measured here is so on the CPU."""
    dense = load(dense_of(family))
    real = ecmoe.upcycle(dense, num_experts=4, init="drop").state_dict()
    with torch.device("meta"):
        shapes = ecmoe.upcycle(AutoModelForCausalLM.from_config(dense.config), num_experts=4, init="drop").state_dict()
        again = ecmoe.upcycle(dense, num_experts=4, init="drop").state_dict()
    assert {tensor.device.type for tensor in shapes.values()} == {"meta"}
    assert {name: tensor.shape for name, tensor in shapes.items()} == {name: t.shape for name, t in real.items()}
    assert all(torch.equal(again[name], tensor) for name, tensor in real.items())


MEMORY = """
import sys, torch, ecmoe
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5, "vocab_size": 4000}
config = LlamaConfig(num_attention_heads=8, **sizes)
model = LlamaForCausalLM(config)
ecmoe.upcycle(LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=99)))

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

before = kilobytes("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
converted = ecmoe.upcycle(model, num_experts=4, init=sys.argv[1])
peak = (kilobytes("VmHWM:") - before) * 1024
own = {p.untyped_storage().data_ptr() for p in model.parameters()}
new = sum(p.nbytes for p in converted.parameters() if p.untyped_storage().data_ptr() not in own)
print(sum(p.nbytes for p in model.parameters()), new, peak)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("init", ["copy", "shared"])
def test_peak_memory_is_the_new_tensors(init: str) -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY, init], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    dense, new, peak = map(int, done.stdout.split())
    assert dense > 100e6 and new > 2 * dense
    assert peak <= 1.1 * new, f"{peak / 1e6:.0f} MB at the peak, {new / 1e6:.0f} MB of new tensors"


def test_ten_lines_of_a_notebook(dense_of: Callable, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    tokenizer, model = AutoTokenizer.from_pretrained(dense_of("Llama")), load(dense_of("Llama"))
    model = ecmoe.upcycle(model, num_experts=4, init="copy", capacity_factor=2)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(["The quick brown fox."] * 12)["input_ids"]]
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, report_to="none")
    losses = Trainer(model, arguments, train_dataset=rows).train().training_loss
    ecmoe.calibrate_thresholds(model, ["The quick brown fox. " * 20], tokenizer)
    inputs = tokenizer("The quick", return_tensors="pt").to(model.device)
    text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert losses > 0 and torch.equal(again.generate(**inputs, max_new_tokens=4, do_sample=False), text)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_convert_takes_a_model_in_memory(dense_of: Callable, few_tokens: None, tmp_path: Path) -> None:
    model, tokenizer = load(dense_of("Qwen3")).train(), tiny_tokenizer()
    record = ecmoe.convert(model, str(tmp_path / "memory"), num_experts=4, tokenizer=tokenizer)
    ecmoe.convert(str(dense_of("Qwen3")), str(tmp_path / "folder"), num_experts=4)
    assert model.training and abs(record["verification"]["loss_change"]) < 1e-5
    assert record["source"] == "Qwen3, in memory" and record["sources"][0]["sha256"] == {}
    written, expected = all_tensors(tmp_path / "memory"), all_tensors(tmp_path / "folder")
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in written)
    assert AutoTokenizer.from_pretrained(tmp_path / "memory")("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    assert load(tmp_path / "memory").generation_config.temperature == 0.7
    assert "Qwen3, in memory" in (tmp_path / "memory" / "README.md").read_text()
    with pytest.raises(ConversionError, match="tokenizer=None: text is needed"):
        ecmoe.convert(model, str(tmp_path / "none"))
    with pytest.raises(ConversionError, match="tokenizer is of a model in memory"):
        ecmoe.convert(str(dense_of("Qwen3")), str(tmp_path / "none"), tokenizer=tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "memory"]


def test_a_model_on_several_devices_is_spread_as_the_dense_one(
    dense_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = load(dense_of("Llama")), []
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1}
    monkeypatch.setattr(accelerate, "dispatch_model", lambda spread, places: asked.append(places) or spread)
    ecmoe.upcycle(model, num_experts=4)
    assert asked == [model.hf_device_map]


def test_each_is_moved_cast_and_frozen_by_itself_and_both_are_trained(dense_of: Callable) -> None:
    model = load(dense_of("Llama"))
    ids = torch.arange(3, 35).view(2, 16)
    before = model(ids).logits.detach()
    converted = ecmoe.upcycle(model, num_experts=4, init="copy")
    ecmoe.upcycle(model, num_experts=4).to(torch.bfloat16)
    peft.get_peft_model(ecmoe.upcycle(model, num_experts=4), peft.LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(model(ids).logits, before) and all(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.SGD(converted.train().parameters(), lr=0.1)
    converted(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model.model.norm.weight, converted.model.norm.weight)


def test_frequencies_that_follow_the_length_go_on_doing_so(tmp_path: Path) -> None:
    """A dense model that has read a text beyond its context has other frequencies, and goes back for a short one."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    write_dense(tmp_path / "dense", "Llama", rope_parameters=rope)
    model, short = load(tmp_path / "dense"), torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        model(torch.arange(300).view(1, 300) % 297 + 3)
        converted = ecmoe.upcycle(model, num_experts=4, init="copy")
        expected, found = model(short).logits, converted(short).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_other_defaults_of_torch_change_no_bit(dense_of: Callable) -> None:
    model = load(dense_of("Llama"))
    expected = ecmoe.upcycle(model, num_experts=4, init="noise").state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = ecmoe.upcycle(model, num_experts=4, init="noise").state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_gradient_checkpointing_stays_on_and_the_name_is_its_own(dense_of: Callable) -> None:
    model = load(dense_of("Llama"))
    if not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("Transformers before 5.22 has another word for it")
    model.activation_checkpointing_enable()
    converted = ecmoe.upcycle(model, num_experts=4)
    assert converted.is_activation_checkpointing and not converted.config.name_or_path


def test_layers_are_a_list_too(dense_of: Callable) -> None:
    model = load(dense_of("Llama"))
    for layers in ([1], (1,), "1"):
        assert ecmoe.upcycle(model, num_experts=4, layers=layers).config.mlp_layer_types == ["dense", "sparse"]


def test_a_generation_config_is_written_as_it_is(dense_of: Callable, tmp_path: Path) -> None:
    """Also what save_pretrained would refuse, and none at all."""
    model = load(dense_of("Llama"))
    model.generation_config.do_sample = False  # and a temperature
    ecmoe.convert(model, str(tmp_path / "out"), num_experts=2, verify=False)
    assert load(tmp_path / "out").generation_config.temperature == 0.7
    model.generation_config = None
    ecmoe.convert(model, tmp_path / "none", num_experts=2, verify=False)
    assert not (tmp_path / "none" / "generation_config.json").exists()
    mixed = {"init": "mix", "mix_with": [str(dense_of("Llama"))], "verify": False}
    ecmoe.convert(model, str(tmp_path / "mixed"), num_experts=2, **mixed)


def test_paths_are_taken_wherever_names_are(dense_of: Callable, few_tokens: None, text: Path, tmp_path: Path) -> None:
    ecmoe.convert(dense_of("Llama"), tmp_path / "out", num_experts=2, init="copy", text=text)
    assert ecmoe.evaluate(tmp_path / "out", data=text, max_tokens=500)["loss"] > 0
    ecmoe.report(tmp_path / "out", tmp_path / "page.html", text="a b")
    ecmoe.export(tmp_path / "out", tmp_path / "plain", text=text)
    matrices = {"tokens": [[1]], "experts": [[1], [2]], "w1": [[[1]], [[1]]], "w2": [[[1]], [[1]]]}
    (tmp_path / "m.json").write_text(json.dumps(matrices))
    assert "E1" in ecmoe.draw(top=1, matrices=tmp_path / "m.json")


def offloaded(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1].to("meta")
    return model


def damaged(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    return model


def untied(model: PreTrainedModel) -> PreTrainedModel:
    model.config.tie_word_embeddings = True
    return model


def quantised(model: PreTrainedModel) -> PreTrainedModel:
    model.hf_quantizer = SimpleNamespace()
    return model


OTHERS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "a name": (lambda folder: str(folder), {}, "is a name, and this takes a model in memory"),
    "no model": (lambda _: 7, {}, "source=7 is neither a checkpoint's folder or Hub id nor a model"),
    "a module": (lambda _: torch.nn.Linear(2, 2), {}, "source=Linear is no model of Transformers"),
    "base model": (
        lambda f: load(f).model,
        {},
        "LlamaModel is not the language model, LlamaForCausalLM; give that one",
    ),
    "a head": (
        AutoModelForSequenceClassification.from_pretrained,
        {},
        "LlamaForSequenceClassification is not the language model, LlamaForCausalLM; give that one",
    ),
    "adapters": (
        lambda f: peft.get_peft_model(load(f), peft.LoraConfig(target_modules=["q_proj"])),
        {},
        "source=PeftModel carries PEFT adapters; merge them first",
    ),
    "expert choice": (
        lambda f: ecmoe.upcycle(load(f)),
        {},
        "is an expert-choice checkpoint already",
    ),
    "quantised": (lambda f: quantised(load(f)), {}, "is quantised; load it without quantization_config"),
    "offloaded": (lambda f: offloaded(load(f)), {}, "has weights offloaded to disk or CPU; load it without device_map"),
    "damaged": (lambda f: damaged(load(f)), {"init": "copy"}, "model.layers.1.mlp.up_proj.weight of Llama, in memory"),
    "untied": (lambda f: untied(load(f)), {}, "set tie_word_embeddings to false in model.config"),
    "init": (load, {"init": "coppy"}, "init=coppy is unknown"),
    "layers": (load, {"layers": "9"}, "layers=9 must be all, every-second, last-half or a list"),
    "a layer": (load, {"layers": None}, "layers='None' must be str or list or tuple, and is NoneType"),
    "a number": (load, {"num_experts": "8"}, "num_experts='8' must be int, and is str"),
    "a seed": (load, {"seed": None}, "seed='None' must be int"),
    "a list": (load, {"init": ["copy"]}, "must be str, and is list"),
    "a tokenizer alone": (load, {"tokenizer": tiny_tokenizer}, "tokenizer is for the texts of calibrate_on"),
    "offloaded whole": (lambda f: accelerate.cpu_offload(load(f)), {}, "has weights offloaded to disk or CPU"),
    "texts": (load, {"calibrate_on": ["a"]}, "texts are given; give their tokenizer too"),
    "empty": (load, {"calibrate_on": []}, "there is no batch and no text"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_refusals_are_one_line(case: str, dense_of: Callable) -> None:
    make, options, message = OTHERS[case]
    with pytest.raises(ValueError) as refusal:
        ecmoe.upcycle(make(dense_of("Llama")), **options)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_dense_model_can_be_copied_first(dense_of: Callable) -> None:
    """Shared weights are trained together; a copy keeps the dense model apart."""
    model = load(dense_of("Llama"))
    shared, apart = ecmoe.upcycle(model), ecmoe.upcycle(copy.deepcopy(model))
    assert storages(model) & storages(shared) and not storages(model) & storages(apart)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("init", EXACT)
def test_on_a_gpu_the_bits_are_the_same(init: str, dense_of: Callable) -> None:
    on_cpu = ecmoe.upcycle(load(dense_of("Llama")), init=init).state_dict()
    on_gpu: dict[str, Tensor] = ecmoe.upcycle(load(dense_of("Llama")).cuda(), init=init).state_dict()
    assert all(tensor.is_cuda for tensor in on_gpu.values())
    assert all(torch.equal(on_gpu[name].cpu(), tensor) for name, tensor in on_cpu.items())
