"""Token choice with a correction bias: ranked by score - threshold, nudged after each optimiser step."""

from collections.abc import Callable

import pytest
import torch
from checkpointing import recompute_layers
from torch import Tensor

from modeling_ecmoe import record_routing, sparse_blocks
from modeling_ecmoe.routing_ecmoe import choose_experts

BIASED = {"routing": "token_choice", "inference_routing": "token_choice", "capacity_factor": 2}


def load_cv(model: torch.nn.Module, ids: Tensor) -> float:
    with record_routing(model) as record, torch.no_grad():
        model.eval()(ids)
    return max(float(torch.tensor(load).std(correction=0)) for load in record.load())


def test_the_choice_ranks_by_the_distance_and_the_weights_are_the_scores() -> None:
    scores_TE = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.9, 0.8]])
    expert_TK, _ = choose_experts(scores_TE, 1, None, None, torch.tensor([0.3, 0.0, 0.0]))
    assert expert_TK.flatten().tolist() == [1, 1]
    assert choose_experts(scores_TE, 1, None, None)[0].flatten().tolist() == [0, 1]


def test_a_step_nudges_by_the_sign_of_what_is_too_much(make_model: Callable, make_tokens: Callable) -> None:
    """Over all micro-batches of the step, padding apart."""
    rate = 0.01
    model = make_model("Llama", token_choice_bias_update_rate=rate, **BIASED).train()
    blocks = sparse_blocks(model)
    loads = {name: torch.zeros(4) for name in blocks}

    def count(name: str, mask: Tensor) -> Callable:
        def hook(_module: torch.nn.Module, _args: tuple, output: tuple) -> None:
            expert_TK = output[1].topk(2, dim=-1).indices[mask.flatten().bool()]
            loads[name] += expert_TK.flatten().bincount(minlength=4)

        return hook

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for seed in range(2):
        ids = make_tokens(2, 16, seed=seed)
        mask = torch.ones_like(ids)
        mask[0, 10:] = 0
        handles = [b.gate.register_forward_hook(count(name, mask)) for name, b in blocks.items()]
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        for handle in handles:
            handle.remove()
    assert not any(block.gate.threshold.any() for block in blocks.values())
    optimizer.step()
    for name, block in blocks.items():
        expected = rate * (loads[name] - loads[name].mean()).sign()
        torch.testing.assert_close(block.gate.threshold, expected)
        assert block.gate.threshold_updates == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_evens_out_the_load(checkpointing: bool, make_model: Callable, make_tokens: Callable) -> None:
    model = make_model("Llama", token_choice_bias_update_rate=0.02, router_score_function="sigmoid", **BIASED)
    if checkpointing:
        recompute_layers(model, use_reentrant=False)
    ids = make_tokens(8, 32)
    before = load_cv(model, ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(40):
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 0.2 and load_cv(model, ids) < 0.5 * before


def test_without_a_rate_thresholds_stay_and_count_for_nothing(make_model: Callable, make_tokens: Callable) -> None:
    ids = make_tokens(2, 16)
    model = make_model("Llama", **BIASED)
    with torch.no_grad():
        expected = model(ids).logits
        for block in sparse_blocks(model).values():
            block.gate.threshold.uniform_()
        assert torch.equal(model(ids).logits, expected)
        model.config.token_choice_bias_update_rate = 0.0  # a bias that is kept
        assert not torch.equal(model(ids).logits, expected)
    kept = [block.gate.threshold.clone() for block in sparse_blocks(model).values()]
    model.train()(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = [block.gate.threshold for block in sparse_blocks(model).values()]
    assert all(torch.equal(one, other) for one, other in zip(kept, after, strict=True))


@pytest.mark.parametrize("fields", [{"routing": "expert_choice", "inference_routing": "threshold"}, {}])
def test_what_the_rate_does_not_go_with_is_refused(fields: dict, make_config: Callable) -> None:
    rate = -0.1 if not fields else 0.1
    with pytest.raises(Exception, match=f"token_choice_bias_update_rate={rate} is of routing=token_choice"):
        make_config("Llama", **BIASED | fields | {"token_choice_bias_update_rate": rate})


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_the_scaling_factor_multiplies_what_the_experts_add(
    routing: str, make_model: Callable, make_tokens: Callable
) -> None:
    fields = BIASED if routing == "token_choice" else {}
    block = next(iter(sparse_blocks(make_model("Llama", **fields)).values()))
    hidden = torch.randn(2, 8, 32)
    with torch.no_grad():
        for mode in (True, False):
            block.train(mode)
            block.config.routed_scaling_factor = 1.0
            once = block(hidden)
            block.config.routed_scaling_factor = 2.5
            torch.testing.assert_close(block(hidden), 2.5 * once)
