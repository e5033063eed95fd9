"""In eval mode a token's route and logits depend on nothing after it, beside it or around it."""

from collections.abc import Callable

import pytest
import torch
from checkpointing import recompute_layers
from families import family_and
from torch import Tensor
from transformers import PreTrainedModel

from modeling_ecmoe import use_inference_routing
from modeling_ecmoe.calibration_ecmoe import sparse_blocks
from modeling_ecmoe.routing_ecmoe import router_scores
from modeling_ecmoe.versions_ecmoe import CACHE

LENGTH = 24
BOUNDS = [{}, {"max_experts_per_token": 2}, {"min_experts_per_token": 1, "max_experts_per_token": 2}]


@torch.no_grad()
def routes_and_logits(model: PreTrainedModel, ids: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Routes [layers, B, S, E] bool, read off the router logits, and logits [B, S, V]."""
    output = model(ids, output_router_logits=True, **inputs)
    blocks = sparse_blocks(model).values()
    assert len(output.router_logits) == len(blocks) == model.config.num_hidden_layers
    routes = [
        block.routes(router_scores(logits, model.config.router_score_function)).view(*ids.shape, -1)
        for block, logits in zip(blocks, output.router_logits, strict=True)
    ]
    return torch.stack(routes), output.logits


def assert_mixed(routes: Tensor) -> None:
    """Every expert of every layer takes some tokens and refuses others, and the load is about the wanted one."""
    share_LE = routes.double().mean((1, 2))
    assert ((share_LE > 0) & (share_LE < 1)).all(), share_LE
    assert ((share_LE.mean(-1) > 0.2) & (share_LE.mean(-1) < 0.7)).all(), share_LE


def with_other_end(ids: Tensor, last: int, make_tokens: Callable) -> Tensor:
    """The same tokens up to and including position `last`, others after it."""
    other = make_tokens(*ids.shape, seed=77)
    other = torch.where(other == ids, other % 100 + 3, other)
    return torch.cat([ids[:, : last + 1], other[:, last + 1 :]], dim=1)


@pytest.mark.parametrize(("family", "bounds"), family_and(BOUNDS, BOUNDS[:1]))
def test_later_tokens_change_nothing_before(
    family: str, bounds: dict, make_routed_model: Callable, make_tokens: Callable
) -> None:
    model = make_routed_model(family, **bounds)
    ids = make_tokens(2, LENGTH)
    routes, logits = routes_and_logits(model, ids)
    assert_mixed(routes)
    for last in (0, 1, 7, LENGTH - 2):
        other_routes, other_logits = routes_and_logits(model, with_other_end(ids, last, make_tokens))
        assert torch.equal(other_routes[:, :, : last + 1], routes[:, :, : last + 1])
        difference = (other_logits - logits).abs()
        assert difference[:, : last + 1].max() <= 1e-6 * logits.abs().max()
        assert difference[:, last + 1 :].max() > 0.1  # the tokens did change
        assert not torch.equal(other_routes, routes)


@pytest.mark.parametrize(("family", "how"), family_and(["config", "context"], ["config"]))
def test_expert_choice_at_inference_leaks(
    family: str, how: str, make_routed_model: Callable, make_tokens: Callable
) -> None:
    """Negative control: the same comparison sees the leak of expert choice among the batch."""
    model = make_routed_model(family)
    ids = make_tokens(2, LENGTH)
    other_ids = with_other_end(ids, LENGTH - 9, make_tokens)
    if how == "config":
        model.config.inference_routing = "expert_choice"
        logits, other_logits = (routes_and_logits(model, tokens)[1] for tokens in (ids, other_ids))
    else:
        with use_inference_routing(model, "expert_choice"):
            logits, other_logits = (routes_and_logits(model, tokens)[1] for tokens in (ids, other_ids))
    assert (other_logits - logits)[:, : LENGTH - 8].abs().max() > 1e-3


def test_context_restores_causal_routing(make_routed_model: Callable, make_tokens: Callable) -> None:
    model = make_routed_model("Llama")
    ids = make_tokens(2, LENGTH)
    before = model(ids).logits
    with use_inference_routing(model, "expert_choice"):
        inside = model(ids).logits
        with use_inference_routing(model):
            assert torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, inside)
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(RuntimeError), use_inference_routing(model, "expert_choice"):
        raise RuntimeError
    assert torch.equal(model(ids).logits, before)


def test_unknown_inference_routing_is_refused(make_model: Callable, make_tokens: Callable) -> None:
    model = make_model("Llama")
    with pytest.raises(ValueError, match="expert_choise"), use_inference_routing(model, "expert_choise"):
        model(make_tokens(1, 5))


@pytest.mark.parametrize(("family", "bounds"), family_and(BOUNDS, BOUNDS[2:]))
def test_cached_steps_give_the_logits_of_the_full_forward(
    family: str, bounds: dict, make_routed_model: Callable, make_tokens: Callable
) -> None:
    model = make_routed_model(family, **bounds)
    ids = make_tokens(2, LENGTH)
    routes, logits = routes_and_logits(model, ids)
    assert_mixed(routes)
    cache, steps = None, []
    with torch.no_grad():
        for start, stop in [(0, 5), *((position, position + 1) for position in range(5, LENGTH))]:
            output = model(ids[:, start:stop], cache=cache, use_cache=True)
            cache = getattr(output, CACHE)
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["Llama", "Qwen3_5Text"])
def test_a_cache_has_two_names(family: str, make_routed_model: Callable, make_tokens: Callable) -> None:
    """Transformers' own, which 5.24 changes, and the other; also with positions that begin again, which without a cache
    would be packed documents."""
    model = make_routed_model(family)
    ids = make_tokens(2, LENGTH)
    positions = torch.tensor([[5, 6, 5, 6]])

    def continued(name: str, **options: Tensor) -> Tensor:
        cache = getattr(model(ids[:, :5], use_cache=True), CACHE)
        return model(ids[:, 5:9], **{name: cache}, **options).logits

    with torch.no_grad():
        torch.testing.assert_close(continued("cache"), model(ids[:, :9]).logits[:, 5:], atol=1e-4, rtol=0)
        assert torch.equal(continued("past_key_values"), continued("cache"))
        found, expected = (continued(name, position_ids=positions) for name in ("past_key_values", "cache"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_gives_the_logits_of_each_sequence_alone(
    family: str, side: str, make_routed_model: Callable, make_tokens: Callable
) -> None:
    model = make_routed_model(family)
    lengths = (LENGTH, LENGTH - 5, 3)
    ids = make_tokens(len(lengths), LENGTH)
    position = torch.arange(LENGTH)
    mask = torch.stack([position >= LENGTH - n if side == "left" else position < n for n in lengths])
    ids = ids.masked_fill(~mask, 0)
    position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
    routes, logits = routes_and_logits(model, ids, attention_mask=mask.long(), position_ids=position_ids)
    assert_mixed(routes)
    for row in range(len(lengths)):
        alone_routes, alone_logits = routes_and_logits(model, ids[row, mask[row]][None])
        torch.testing.assert_close(logits[row, mask[row]], alone_logits[0], atol=1e-4, rtol=0)
        assert torch.equal(routes[:, row, mask[row]], alone_routes[:, 0])


def test_batch_of_one_gives_the_logits_of_the_batch(
    family: str, make_routed_model: Callable, make_tokens: Callable
) -> None:
    model = make_routed_model(family)
    ids = make_tokens(5, LENGTH)
    routes, logits = routes_and_logits(model, ids)
    assert_mixed(routes)
    for row in range(len(ids)):
        alone_routes, alone_logits = routes_and_logits(model, ids[row : row + 1])
        torch.testing.assert_close(alone_logits[0], logits[row], atol=1e-4, rtol=0)
        assert torch.equal(alone_routes[:, 0], routes[:, row])


@pytest.mark.parametrize(("family", "checkpointing"), family_and([False, True], [False]))
def test_generate_in_train_mode_is_generate_in_eval_mode(
    family: str, checkpointing: bool, make_routed_model: Callable, make_tokens: Callable
) -> None:
    model = make_routed_model(family)
    ids = make_tokens(2, 9).index_put((torch.tensor([0, 0]), torch.tensor([0, 1])), torch.tensor(0))
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "max_new_tokens": 12, "do_sample": False}
    inputs |= {"min_new_tokens": 12}
    expected = model.generate(**inputs)
    alone = model.generate(**inputs | {"input_ids": ids[:1, 2:], "attention_mask": inputs["attention_mask"][:1, 2:]})
    assert torch.equal(expected[:1, 2:], alone)
    assert torch.equal(model.generate(**inputs, use_cache=False), expected)

    thresholds = {name: block.gate.threshold.clone() for name, block in sparse_blocks(model).items()}
    model.train()
    if checkpointing:  # Transformers drops the cache of a checkpointed layer in train mode, in the dense model too
        recompute_layers(model)
    assert torch.equal(model.generate(**inputs, use_cache=not checkpointing), expected)
    with torch.no_grad():  # the same model does route by expert choice when it trains
        assert (model(ids).logits - model.eval()(ids).logits).abs().max() > 1e-3
    for name, block in sparse_blocks(model).items():
        assert torch.equal(block.gate.threshold, thresholds[name])
        assert not block.gate.has_pending
        assert block.gate.pending[-1] == 0
        assert block.routing_override is None


def test_beam_search_and_sampling_run(make_routed_model: Callable, make_tokens: Callable) -> None:
    model = make_routed_model("Qwen3")
    ids = make_tokens(2, 6)
    for choice in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        generated = model.generate(ids, max_new_tokens=5, min_new_tokens=5, **choice)
        assert generated.shape[1] == 11
