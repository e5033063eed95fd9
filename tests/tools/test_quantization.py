"""bitsandbytes in 4 bits: experts hold its bits, on disk and in memory; adapters learn on them, are saved, merged."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpointing import recompute_layers
from converted import expert_adapters, losses_of_steps
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from ecmoe.finetune.adapters import add_lora
from modeling_ecmoe import quantizer_ecmoe, sparse_blocks
from modeling_ecmoe.quantized_ecmoe import Stacked4bit

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

# Linear layers left as they are, so that nothing but the experts differs.
ONLY_EXPERTS = {"llm_int8_skip_modules": [r".*\.self_attn", r".*\.shared_expert", "lm_head"]}
SIZE = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 80}


@pytest.fixture(scope="module")
def folder(make_routed_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routed Llama in many shards."""
    folder = tmp_path_factory.mktemp("llama")
    make_routed_model("Llama", **SIZE, shared_expert_intermediate_size=48).save_pretrained(
        folder, max_shard_size="50KB"
    )
    assert len(list(folder.glob("*.safetensors"))) > 4
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype} | settings
    config = BitsAndBytesConfig(load_in_4bit=True, **settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def stacks(model: nn.Module) -> dict[str, Stacked4bit]:
    return {name: weight for name, weight in model.named_parameters() if isinstance(weight, Stacked4bit)}


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model.eval()(input_ids=ids, use_cache=False, **inputs).logits.float()


def by_hand(matrix: Tensor, quant_type: str, double: bool) -> Tensor:
    """A matrix in 4 bits and back: bitsandbytes quantises, its table and the scales of 64 numbers each undo it."""
    bits, state = bnb.functional.quantize_4bit(matrix, blocksize=64, compress_statistics=double, quant_type=quant_type)
    scales = state.absmax
    if double:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    numbers = torch.stack([bits.flatten() >> 4, bits.flatten() & 15], dim=-1).flatten().int()
    table = bnb.functional.get_4bit_type(quant_type, device="cpu")
    return (table[numbers] * scales.repeat_interleave(64)[: len(numbers)]).view_as(matrix)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "Glm4Moe"])
def test_each_matrix_has_bitsandbytes_bits(
    make_model: Callable, tmp_path: Path, family: str, quant_type: str, double: bool
) -> None:
    """With and without a gate, biases, widths that are no number of blocks; also of a family of mixtures."""
    whole = make_model(family, moe_intermediate_size=18)
    whole.save_pretrained(tmp_path)
    found = stacks(load(tmp_path, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double))
    expected = {name: weight for name, weight in whole.named_parameters() if weight.dim() == 3}
    assert found.keys() == expected.keys() and found
    for name, stack in found.items():
        assert stack.shape == expected[name].shape and stack.dtype == torch.float32 and not stack.requires_grad
        for expert, matrix in enumerate(expected[name].detach()):
            torch.testing.assert_close(stack[expert], by_hand(matrix, quant_type, double), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
def test_saved_and_loaded(
    folder: Path, make_tokens: Callable, tmp_path: Path, dtype: torch.dtype, double: bool
) -> None:
    """The same bits and logits, a quarter of the size."""
    model = load(folder, dtype, bnb_4bit_use_double_quant=double)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and again.dtype == dtype
    for name, stack in stacks(model).items():
        other = again.get_parameter(name)
        assert (
            other.dtype == dtype
            and other.compute_dtype == stack.compute_dtype
            and other.parts().keys() == stack.parts().keys()
        )
        assert all(torch.equal(part, other.parts()[key]) for key, part in stack.parts().items())
    ids = make_tokens(2, 24)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    experts = sum(stack.numel() for stack in stacks(model).values())
    assert sum(stack.nbytes for stack in stacks(model).values()) < 0.6 * experts
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert model.num_parameters() >= experts and plain.num_parameters(only_active=True) < plain.num_parameters()
    assert plain.get_memory_footprint() - model.get_memory_footprint() > experts * (dtype.itemsize - 0.6)


@pytest.mark.parametrize("bits", [4, 8])
def test_saved_again(folder: Path, make_tokens: Callable, tmp_path: Path, bits: int) -> None:
    """What was read in few bits is saved as it is, whole or dequantised; Transformers would fail."""
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(tmp_path / "first")
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "first"), make_tokens(2, 16)
    with torch.no_grad():
        sparse_blocks(model)["model.layers.0.mlp"].gate.threshold.add_(0.1)
    model.save_pretrained(tmp_path / "second")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not any(info.values())
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids), atol=0, rtol=0)
    if bits == 4:
        again.dequantize().save_pretrained(tmp_path / "plain")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        torch.testing.assert_close(logits_of(plain, ids), logits_of(again, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_a_base_model_and_one_with_a_head_read_each_other_s(
    make_model: Callable, make_tokens: Callable, tmp_path: Path, family: str
) -> None:
    """Whose names differ by what stands before the layers, `layers.0` or `h.0`."""
    make_model(family, hidden_size=64).save_pretrained(tmp_path / "whole")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **ONLY_EXPERTS)
    ids = make_tokens(2, 16)
    for written, read in ((AutoModelForCausalLM, AutoModel), (AutoModel, AutoModelForCausalLM)):
        model = written.from_pretrained(tmp_path / "whole", quantization_config=config)
        model.save_pretrained(tmp_path / written.__name__)
        again = read.from_pretrained(tmp_path / written.__name__)
        assert len(stacks(again)) == len(stacks(model)) > 0
        with torch.no_grad():
            hidden = [one.base_model.eval()(input_ids=ids).last_hidden_state for one in (model, again)]
        assert torch.equal(*hidden)


def test_one_stack_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a stack is quantised no other one is there in 16 bits."""
    alive = []
    quantize = quantizer_ecmoe.quantize_stack

    def watched(stack: Tensor, *options: Any) -> dict[str, Tensor]:
        tensors = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter) and item.dim() == 3]
        here = {t.data_ptr() for t in tensors if t.device.type == "cpu" and t.dtype == torch.bfloat16}
        alive.append(len(here | {stack.data_ptr()}))
        return quantize(stack, *options)

    monkeypatch.setattr(quantizer_ecmoe, "quantize_stack", watched)
    load(folder, torch.bfloat16)
    assert alive == [1, 1, 1, 1]


def test_left_out_by_name(folder: Path, tmp_path: Path) -> None:
    """Experts that are named stay in 16 bits, also when they are loaded again."""
    model = load(folder, torch.bfloat16, llm_int8_skip_modules=["experts", "lm_head"])
    model.save_pretrained(tmp_path)
    for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert not stacks(one)
        for block in sparse_blocks(one).values():
            assert block.experts.down_proj.dtype == torch.bfloat16
            assert type(block.shared_expert.up_proj) is bnb.nn.Linear4bit
    part = load(folder, llm_int8_skip_modules=["layers.0.mlp.experts", "lm_head"])
    assert {name.split(".")[2] for name in stacks(part)} == {"1"}


@pytest.mark.parametrize(
    "name", ["experts.down_proj", r".*\.experts\.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
)
def test_one_stack_of_two_cannot_be_left_out(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r'llm_int8_skip_modules names .* together or not at all; name "experts"'):
        load(folder, llm_int8_skip_modules=[name, "lm_head"])


def test_refused_storage(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"bnb_4bit_quant_storage=torch.bfloat16 is for linear layers.*uint8"):
        load(folder, bnb_4bit_quant_storage=torch.bfloat16)


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
def test_computes_what_its_numbers_say(
    make_routed_model: Callable, make_tokens: Callable, tmp_path: Path, family: str
) -> None:
    """As a plain model of the dequantised numbers, in inference, training's routes, and step by step with padding."""
    make_routed_model(family, **(SIZE if family == "Llama" else {})).save_pretrained(tmp_path)
    settings = {"llm_int8_skip_modules": [r".*\.self_attn", r".*\.attention", "lm_head"]}
    model, ids = load(tmp_path, **settings), make_tokens(3, 20)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, stack in stacks(model).items():
        plain.get_parameter(name).data = torch.stack([stack[expert] for expert in range(len(stack))])
    torch.testing.assert_close(logits_of(model, ids), logits_of(plain, ids), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        trained = [one.train()(input_ids=ids, use_cache=False).logits for one in (model, plain)]
    torch.testing.assert_close(*trained, atol=1e-5, rtol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    texts = [
        one.eval().generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for one in (model, plain)
    ]
    assert torch.equal(*texts)
    row = texts[0][1:2]
    last = logits_of(model, row)[0, len(ids[0]) - 1 : -1].argmax(-1)
    assert torch.equal(last, row[0, len(ids[0]) :])


def test_in_bfloat16(folder: Path, make_tokens: Callable) -> None:
    """Products in bfloat16 of weights in float32, by the config or by autocast."""
    ids = make_tokens(2, 32)
    expected = logits_of(load(folder, **ONLY_EXPERTS), ids).softmax(-1)
    model = load(folder, **ONLY_EXPERTS, bnb_4bit_compute_dtype=torch.bfloat16)
    assert 0 < (logits_of(model, ids).softmax(-1) - expected).abs().sum(-1).median() < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits_of(model, ids).softmax(-1) - expected).abs().sum(-1).median() < 0.1


def test_copied_and_dequantized(folder: Path, make_tokens: Callable) -> None:
    """A copy and a pickle hold the same bits; `dequantize` leaves plain weights of the same numbers, also after the
    linear layers have computed on a CPU, which reorders their bits."""
    model, ids = load(folder), make_tokens(2, 16)
    for stack in stacks(model).values():
        for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), stack.clone()):
            assert all(torch.equal(part, other.parts()[key]) for key, part in stack.parts().items())
            assert torch.equal(other[1], stack[1])
    numbers = {name: torch.stack([stack[e] for e in range(len(stack))]) for name, stack in stacks(model).items()}
    linear = sparse_blocks(model)["model.layers.0.mlp"].shared_expert.up_proj.weight
    numbers["model.layers.0.mlp.shared_expert.up_proj.weight"] = bnb.functional.dequantize_4bit(
        linear, linear.quant_state
    )
    logits_of(model, ids)
    plain = model.dequantize()
    assert not stacks(plain) and plain.config.to_dict().get("quantization_config") is None
    for name, expected in numbers.items():
        assert type(plain.get_parameter(name)) is nn.Parameter
        torch.testing.assert_close(plain.get_parameter(name).data, expected, atol=0, rtol=0)


@pytest.fixture
def no_delta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where PEFT would build what an adapter adds to a whole stack."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the delta of a stack was built")

    for name in ("get_delta_weight", "_activate_lora"):
        monkeypatch.setattr(peft.tuners.lora.layer.ParamWrapper, name, refuse)
    yield


def adapters() -> peft.LoraConfig:
    config = expert_adapters()
    config.init_lora_weights = False  # they speak from the start
    return config


def prepared(model: Any) -> Any:
    """As PEFT wants a quantised model: what is in 16 bits goes into float32. Its checkpointing is left out."""
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_adapters(folder: Path, make_tokens: Callable, no_delta: None) -> None:
    """As on a plain model of the same numbers, with activations kept or computed again; no matrix in full is kept."""
    model, ids = load(folder, **ONLY_EXPERTS), make_tokens(4, 24)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name, stack in stacks(model).items():
        plain.get_parameter(name).data = torch.stack([stack[expert] for expert in range(len(stack))])
    shapes = {tuple(stack.shape[1:]) for stack in stacks(model).values()}
    adapted, other = peft.get_peft_model(model, adapters()), peft.get_peft_model(plain, adapters())
    peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(adapted))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        found = gradients(adapted, ids)
    assert kept and not shapes & set(kept)
    expected = gradients(other, ids)
    assert found.keys() == expected.keys() and sum(".experts." in name for name in found) == 8
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-3, msg=name)
    recompute_layers(adapted.base_model.model, use_reentrant=False)
    for name, grad in gradients(adapted, ids).items():
        torch.testing.assert_close(grad, found[name], atol=1e-6, rtol=1e-4, msg=name)


def test_gradients_after_inference(folder: Path, make_tokens: Callable) -> None:
    """The same with linear layers in 4 bits before and after a pass without gradients, which has the same logits."""
    adapted, ids = peft.get_peft_model(load(folder), adapters()), make_tokens(2, 16)
    before = gradients(adapted, ids)
    logits = logits_of(adapted, ids)
    with torch.enable_grad():
        again = adapted.eval()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(again.detach(), logits, atol=1e-4, rtol=1e-4)
    after = gradients(adapted, ids)
    assert any("q_proj" in name for name in before) and before.keys() == after.keys()
    for name, grad in before.items():
        torch.testing.assert_close(after[name], grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_learn_and_come_back(
    folder: Path, make_tokens: Callable, tmp_path: Path, no_delta: None, dtype: torch.dtype
) -> None:
    """The loss falls; saved, PEFT loads them on a model in 4 bits with the same logits; merged they say the same."""
    settings = {"bnb_4bit_use_double_quant": True, **ONLY_EXPERTS}
    model, ids = prepared(load(folder, dtype, **settings)), make_tokens(4, 32)
    adapted = add_lora(model, {"r": 4})
    losses = losses_of_steps(adapted, ids, learning_rate=1e-2, steps=6)
    assert losses[-1] < losses[0] - 0.2
    adapted.eval().save_pretrained(tmp_path)
    expected = logits_of(adapted, ids)
    base = prepared(load(folder, dtype, **settings))
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits_of(again, ids), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gated_shared_expert(make_routed_model: Callable, make_tokens: Callable, tmp_path: Path, bits: int) -> None:
    """Its gate is not quantised: modules_to_save=["gate"] goes by the end of a name, and trains it with the router."""
    fields = {"shared_expert_intermediate_size": 64, "shared_expert_weighting": "gate"}
    make_routed_model("Llama", **SIZE, **fields).save_pretrained(tmp_path / "whole")
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=config)
    model.save_pretrained(tmp_path / "bits")
    for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "bits")):
        gate = sparse_blocks(one)["model.layers.0.mlp"].shared_expert_gate
        assert gate.weight.dtype == torch.float32
        adapted, ids = peft.get_peft_model(one, expert_adapters() if bits == 4 else gates_alone()), make_tokens(2, 16)
        trained = {name for name in gradients(adapted, ids) if "modules_to_save" in name}
        assert {name.rsplit(".", 4)[1] for name in trained} == {"gate", "shared_expert_gate"}


def gates_alone() -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"])


def test_merged(folder: Path, make_tokens: Callable, tmp_path: Path) -> None:
    """Into the numbers that they were trained on, exactly; into those of before, up to what 4 bits lose."""
    ids = make_tokens(4, 32)
    adapted = peft.get_peft_model(load(folder, **ONLY_EXPERTS), adapters())
    adapted.save_pretrained(tmp_path)
    expected = logits_of(adapted, ids)
    bits = {name: stack.qdata.clone() for name, stack in stacks(adapted).items()}
    for merge in ("merge_adapter", "merge_and_unload"):
        other = copy.deepcopy(adapted)
        with pytest.raises(NotImplementedError, match=r"no adapter can be merged into them.*call dequantize\(\)"):
            getattr(other, merge)()
        assert bits and all(torch.equal(stack.qdata, bits[name]) for name, stack in stacks(other).items())
    with pytest.raises(NotImplementedError, match=r"aten.mul.* on experts in 4 bits.*dequantize\(\) before"):
        next(iter(stacks(adapted).values())) * 2
    dequantized = peft.PeftModel.from_pretrained(load(folder, **ONLY_EXPERTS).dequantize(), tmp_path)
    torch.testing.assert_close(logits_of(dequantized.merge_and_unload(), ids), expected, atol=1e-4, rtol=1e-3)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: weight.clone() for name, weight in plain.named_parameters() if weight.dim() == 3}
    merged = peft.PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
    for name, stack in stacks(adapted.base_model.model).items():
        plain_name = name.replace(".base_layer", "")
        for expert, matrix in enumerate(merged.get_parameter(plain_name).detach()):
            added = matrix - before[plain_name][expert]
            error = (stack[expert] - before[plain_name][expert]).norm() / before[plain_name][expert].norm()
            assert added.abs().max() > 0 and error < 0.12


def test_an_adapter_dequantises_no_more(
    folder: Path, make_tokens: Callable, monkeypatch: pytest.MonkeyPatch, no_delta: None
) -> None:
    """Of each token that is generated, the matrices of the experts that it meets, with and without an adapter."""
    read: list[int] = []
    matrix = Stacked4bit.matrix

    def counted(stack: Stacked4bit, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        read.append(expert)
        return matrix(stack, expert, dtype)

    monkeypatch.setattr(Stacked4bit, "matrix", counted)
    config = expert_adapters()  # which say nothing, so that routes are the same
    adapted, counts = peft.get_peft_model(load(folder, **ONLY_EXPERTS), config).eval(), []
    for context in (adapted.disable_adapter, torch.no_grad):
        read.clear()
        with context():
            adapted.generate(input_ids=make_tokens(1, 8), max_new_tokens=6, do_sample=False, pad_token_id=0)
        counts.append(len(read))
    assert counts[0] == counts[1] > 0
