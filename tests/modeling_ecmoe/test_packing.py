"""Packed sequences: several documents in one row, told apart by their position_ids alone."""

from collections.abc import Callable

import torch
from families import NO_PACKING

LENGTHS = (11, 7, 14)


def positions() -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])[None]


@torch.no_grad()
def test_packed_documents_give_the_logits_of_single_ones(
    family: str, make_routed_model: Callable, make_tokens: Callable
) -> None:
    model = make_routed_model(family)
    ids = make_tokens(1, sum(LENGTHS))
    packed = model(ids, position_ids=positions(), use_cache=False).logits
    alone = torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    assert model.config.supports_packing == (family not in NO_PACKING)
    if family in NO_PACKING:  # once its dense class can, this fails
        assert (packed - alone).abs().max() > 1e-2
        return
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    # Without position_ids the documents see each other, so the comparison can fail.
    assert (model(ids, use_cache=False).logits - alone).abs().max() > 1e-2


def test_packing_is_one_pool_in_training(make_routed_model: Callable, make_tokens: Callable) -> None:
    """The experts choose among the row's documents together, and the loss has a gradient for every router."""
    model = make_routed_model("Qwen3").train()
    ids = make_tokens(1, sum(LENGTHS))
    model(ids, position_ids=positions(), labels=ids, use_cache=False).loss.backward()
    for layer in model.config.dense_ffn.layers_of(model):
        assert layer.mlp.gate.pending[-1] == sum(LENGTHS)
        assert layer.mlp.gate.weight.grad.abs().sum() > 0
