"""What Transformers offers around `generate`, for every family: each way gives the greedy text of the plain one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import random_tokens
from families import SLIDING_CACHE, STATEFUL
from torch.nn.attention.flex_attention import flex_attention
from transformers import PreTrainedModel
from transformers.integrations import flex_attention as flex_integration
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
PROMPTS = random_tokens(2, 14)  # longer than the sliding windows


@pytest.fixture
def model(family: str, make_routed_model: Callable) -> PreTrainedModel:
    """Without gradients, which flex attention and torch.export do not have on a CPU."""
    return make_routed_model(family).requires_grad_(False)


@pytest.fixture
def fresh_compiler() -> None:
    """As a new process: compilations of other models count towards torch's limit otherwise."""
    torch._dynamo.reset()


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_attention_back_ends_agree_with_eager(
    family: str, model: PreTrainedModel, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flex attention is run uncompiled: not every processor has what its compiled form needs."""
    monkeypatch.setattr(flex_integration.WrappedFlexAttention, "__call__", lambda _self: flex_attention)
    if implementation == "sdpa" and family == "Gemma2" and model._supports_sdpa:
        pytest.skip(
            "an older Transformers, whose SDPA leaves out what caps Gemma-2's attention, also of the dense model"
        )
    if implementation == "sdpa" and not model._supports_sdpa:
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            model.set_attn_implementation("sdpa")
        return
    if implementation == "flex_attention" and not model._supports_flex_attn:
        pytest.skip("nor has the plain class")
    mask = torch.ones_like(PROMPTS)
    mask[0, :4] = 0
    model.set_attn_implementation("eager")
    expected = model(PROMPTS, attention_mask=mask).logits
    model.set_attn_implementation(implementation)
    found = model(PROMPTS, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


def test_static_cache_and_none(model: PreTrainedModel) -> None:
    expected = model.generate(PROMPTS, **GREEDY)
    assert torch.equal(model.generate(PROMPTS, cache_implementation="static", **GREEDY), expected)
    assert torch.equal(model.generate(PROMPTS, use_cache=False, **GREEDY), expected)


def test_quantized_cache(family: str, model: PreTrainedModel) -> None:
    """Keys and values in few bits move the logits, fewer bits more; Transformers refuses it where windows slide or a
    layer has a state."""
    pytest.importorskip("optimum.quanto")
    outputs = {"return_dict_in_generate": True, "output_logits": True, "cache_implementation": "quantized"}
    if family in (*SLIDING_CACHE, *STATEFUL):
        with pytest.raises(ValueError, match="only full attention layers"):
            model.generate(PROMPTS, **outputs, **GREEDY)
        return
    expected = model(torch.cat([PROMPTS, model(PROMPTS).logits[:, -1:].argmax(-1)], dim=1)).logits[:, -1]

    def error(nbits: int) -> float:
        cache_config = {"backend": "quanto", "nbits": nbits, "q_group_size": 32}
        found = model.generate(PROMPTS, cache_config=cache_config, **outputs, **GREEDY)
        return float((found.logits[1] - expected).abs().mean())  # the first logits that read the cache

    assert 0 < error(4) < 0.7 * error(2)


def test_beams_do_not_see_each_other(model: PreTrainedModel) -> None:
    together = model.generate(PROMPTS, num_beams=3, **GREEDY)
    alone = [model.generate(prompt[None], num_beams=3, **GREEDY) for prompt in PROMPTS]
    assert torch.equal(together, torch.cat(alone))


def test_assistants_change_no_greedy_text(model: PreTrainedModel, family: str, make_routed_model: Callable) -> None:
    """A token-by-token check of several drafted tokens at once: the same routes, or the text would differ."""
    prompt = PROMPTS[:1]
    if model._is_stateful:
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(prompt, prompt_lookup_num_tokens=2, **GREEDY)
        return
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, assistant_model=make_routed_model(family, seed=3), **GREEDY), expected)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=2, **GREEDY), expected)


def test_compiled_generation(model: PreTrainedModel, fresh_compiler: None) -> None:
    expected = model.generate(PROMPTS, **GREEDY)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(PROMPTS, cache_implementation="static", **GREEDY), expected)


def test_exported_decoding_step(family: str, model: PreTrainedModel, fresh_compiler: None) -> None:
    if family in STATEFUL:
        pytest.skip("Transformers exports caches of keys and values alone")
    if family in ("DeepseekV3", "Youtu"):
        pytest.skip("Transformers sizes an exported cache by head_dim, which is not that of latent attention's keys")
    expected = model(PROMPTS[:1, :6]).logits
    model.generation_config.use_cache = True
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 32}
    exportable = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=32)
    step = exportable.export(input_ids=torch.tensor([[5]]), cache_position=torch.tensor([0])).module()
    found = [step(input_ids=PROMPTS[:1, i : i + 1], cache_position=torch.tensor([i])) for i in range(6)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_offloaded_layers(model: PreTrainedModel, tmp_path: Path) -> None:
    """`device_map="auto"` with room for a part of the model in memory; the rest is read from disk in each pass."""
    expected = model.generate(PROMPTS, **GREEDY)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    total = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    loaded = type(model).from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": total * 2 // 3},
        offload_folder=str(tmp_path / "offload"),
    )
    assert "disk" in loaded.hf_device_map.values() and len(set(loaded.hf_device_map.values())) > 1
    assert torch.equal(loaded.generate(PROMPTS, **GREEDY), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_in_sixteen_bits(model: PreTrainedModel, dtype: torch.dtype, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in loaded.state_dict().items():
        wanted = {"threshold": torch.float32, "threshold_updates": torch.int64}.get(name.rpartition(".")[2], dtype)
        assert tensor.dtype == wanted, name
        assert torch.equal(tensor, model.state_dict()[name].to(wanted)), name
    logits = loaded(PROMPTS).logits
    assert logits.dtype == dtype and logits.isfinite().all()
