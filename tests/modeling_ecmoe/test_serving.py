"""What the Transformers back-ends of vLLM and SGLang ask of a model; tests/server.py drives it as they do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import MODEL_TYPES, NO_SERVER, NO_STAGES, WHOLE_ATTENTION, family_and
from server import Server
from transformers import AutoConfig, PreTrainedModel

from modeling_ecmoe import sparse_blocks
from modeling_ecmoe.block_ecmoe import EcMoeBlock
from modeling_ecmoe.serving_ecmoe import wants_slots

REQUESTS = {"a": [5, 9, 17, 40, 23, 8, 99], "b": [61], "c": [12, 33, 7, 7, 120, 64, 3, 31, 90, 11, 54]}
KINDS = {
    "any number": {},
    "at most 2": {"max_experts_per_token": 2},
    "1 to 2": {"min_experts_per_token": 1, "max_experts_per_token": 2, "normalize_combine_weights": True},
    "blend": {
        "router_score_function": "sigmoid",
        "shared_expert_intermediate_size": 48,
        "shared_expert_weighting": "complement",
    },
    "token choice": {"routing": "token_choice", "inference_routing": "token_choice", "capacity_factor": 2},
}
SLOTS = {"any number": 4, "at most 2": 2, "1 to 2": 2, "blend": 4, "token choice": 2}


@pytest.fixture
def make_saved(make_routed_model: Callable, tmp_path: Path) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """A model in float64 and its folder; a family whose experts are not silu is none that these servers can serve."""

    def make(family: str, **fields: object) -> tuple[PreTrainedModel, Path]:
        if family in NO_SERVER:
            pytest.skip(NO_SERVER[family])
        model = make_routed_model(family, **fields).double()
        if model.config.hidden_act != "silu":
            pytest.skip("vLLM and SGLang compute every custom model's experts with silu")
        model.save_pretrained(tmp_path)
        return model, tmp_path

    return make


@torch.no_grad()
@pytest.mark.parametrize(("family", "kind"), family_and(KINDS, ["blend"]))
def test_served_requests_have_the_states_of_the_model_itself(family: str, kind: str, make_saved: Callable) -> None:
    """Three requests in one row of 19 tokens: the hidden states that the model gives each of them alone."""
    model, folder = make_saved(family, **KINDS[kind])
    server = Server(folder)
    states = server.step(REQUESTS)
    for name, ids in REQUESTS.items():
        alone = model.model(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(states[name], alone, atol=1e-5, rtol=0)
    layers = model.config.num_hidden_layers
    assert [kernel.calls for kernel in server.kernels] == [1] * layers and server.requests.calls == layers
    assert {kernel.num_slots for kernel in server.kernels} == {SLOTS[kind]}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_served_text_is_that_of_generate(kind: str, make_saved: Callable) -> None:
    """Greedy, the third request joining two that are decoding already; logits within 1e-5."""
    model, folder = make_saved("Llama", **KINDS[kind])
    server = Server(folder)
    texts = {name: list(ids) for name, ids in REQUESTS.items()}
    pending = {"a": REQUESTS["a"], "b": REQUESTS["b"]}
    for step in range(12):
        if step == 4:
            pending["c"] = REQUESTS["c"]
        for name, states in server.step(pending).items():
            logits = states[-1] @ server.head.T
            expected = model(torch.tensor([texts[name]])).logits[0, -1]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
            texts[name].append(int(logits.argmax()))
            pending[name] = texts[name][-1:]
    for name, ids in REQUESTS.items():
        length = len(texts[name]) - len(ids)
        greedy = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=length, min_new_tokens=length, eos_token_id=None
        )
        assert texts[name] == greedy[0].tolist()


def test_rows_of_routes_would_be_refused(make_saved: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's kernel cannot take one row per route, so the test above can fail."""
    _, folder = make_saved("Llama")
    monkeypatch.setattr("modeling_ecmoe.block_ecmoe.wants_slots", lambda *_: False)
    with pytest.raises(AssertionError):
        Server(folder).step(REQUESTS)


@torch.no_grad()
def test_vllm_leaves_the_routing_alone(make_model: Callable) -> None:
    """vLLM 0.32 routes itself where a router has no state but `weight` and `e_score_correction_bias`. 0.33 also runs
    blocks itself that call their router with the hidden states alone and hand its second and third output on to the
    experts. Neither knows thresholds."""
    block = next(iter(sparse_blocks(make_model("Llama", max_experts_per_token=2)).values()))
    state = {name for name, _ in (*block.gate.named_parameters(), *block.gate.named_buffers())}
    assert state - {"weight", "e_score_correction_bias"}
    seen: dict[str, tuple] = {}
    block.gate.register_forward_hook(lambda *call: seen.update(gate=call[2:]), with_kwargs=True)
    block.experts.register_forward_pre_hook(lambda _module, arguments: seen.update(experts=arguments))
    block(torch.randn(1, 5, 32))
    keywords, (_, scores, thresholds) = seen["gate"]
    assert keywords
    for handed in seen["experts"][1:]:
        assert handed.shape not in (scores.shape, thresholds.shape)


def test_adapters_do_not_change_the_way(make_model: Callable) -> None:
    """A wrapper that keeps the experts' weights takes one row per route, as the experts themselves do."""
    peft = pytest.importorskip("peft")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=names, lora_dropout=0.0)
    model = peft.get_peft_model(make_model("Llama"), config)
    blocks = [module for module in model.modules() if isinstance(module, EcMoeBlock)]
    assert len(blocks) == 2 and not any(wants_slots(block.experts, None) for block in blocks)


def test_the_folder_says_what_servers_read(family: str, make_saved: Callable) -> None:
    model, folder = make_saved(family)
    config = AutoConfig.from_pretrained(folder)
    assert config.num_experts_per_tok == config.num_experts == 4 and config.moe_intermediate_size == 48
    assert config.auto_map["AutoModel"] == f"{MODEL_TYPES[family]}_ecmoe.EcMoe{family}Model"
    assert model.model.is_backend_compatible() and model._supports_attention_backend
    if family not in WHOLE_ATTENTION:
        assert any("q_proj" in name or "qkv" in name for name in model.model.tp_plan)
    assert ("layers" in model.model._pp_plan) == (family not in NO_STAGES)
    for block in sparse_blocks(model).values():
        assert {parameter.dim() for parameter in block.experts.parameters()} == {3}


def test_the_number_of_slots_follows_from_the_bounds(make_config: Callable) -> None:
    assert make_config("Llama", num_experts_per_tok=4).num_experts_per_tok == 4
    assert "num_experts_per_tok" not in make_config("Llama").to_dict()
    with pytest.raises(ValueError, match=r"num_experts_per_tok=2 follows from other fields.*set max_experts_per_token"):
        make_config("Llama", num_experts_per_tok=2)
