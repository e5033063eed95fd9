"""Every head of every family answers what Transformers asks of a model. Transformers' generic heads take Llama's names
for granted, and other families have others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpointing import recompute_layers
from conftest import random_tokens
from torch import Tensor, nn

from modeling_ecmoe.configuration_ecmoe import AUTO_CLASSES


def first(output: Any) -> Tensor:
    """The first tensor of a head's output that is no loss: hidden states, logits or start logits."""
    return next(value for value in output.values() if isinstance(value, Tensor))


def shows_its_embedding(model: Any) -> None:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding) and embedding.num_embeddings == 128
    assert embedding is model.base_model.get_input_embeddings()


def takes_another_embedding(model: Any) -> None:
    ids = random_tokens(2, 7)
    before = first(model(ids))
    old = model.get_input_embeddings()
    other = nn.Embedding(*old.weight.shape)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other and model.base_model.get_input_embeddings() is other
    assert not torch.equal(first(model(ids)), before)
    model.set_input_embeddings(old)
    assert torch.equal(first(model(ids)), before)


def takes_embedded_tokens(model: Any) -> None:
    """A row at a time: of embedded tokens a classifier cannot tell the last."""
    ids = random_tokens(1, 7)
    torch.testing.assert_close(first(model(inputs_embeds=model.get_input_embeddings()(ids))), first(model(ids)))


def lets_gradients_through_a_frozen_embedding(model: Any) -> None:
    """What adapters need under gradient checkpointing."""
    model.requires_grad_(False)
    ids = random_tokens(2, 7)
    assert not first(model(ids)).requires_grad
    model.enable_input_require_grads()
    assert first(model(ids)).requires_grad
    model.disable_input_require_grads()
    assert not first(model(ids)).requires_grad
    model.requires_grad_(True)


def recomputes_its_layers(model: Any) -> None:
    """To the gradients it has without, dropout of a head included."""
    plain = embedding_gradient(model)
    recompute_layers(model, use_reentrant=False)
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(embedding_gradient(model), plain)


def embedding_gradient(model: Any) -> Tensor:
    torch.manual_seed(0)
    first(model.train()(random_tokens(2, 7), use_cache=False)).square().sum().backward()
    gradient = model.eval().get_input_embeddings().weight.grad
    assert gradient.any()
    model.zero_grad()
    return gradient


def gives_other_outputs(model: Any) -> None:
    model.set_attn_implementation("eager")
    output = model(random_tokens(2, 7), output_hidden_states=True, output_attentions=True)
    assert [hidden.shape for hidden in output.hidden_states[:-1]] == [(2, 7, 32)] * 2
    assert len(output.hidden_states) == 3 and output.hidden_states[-1].shape[:2] == (2, 7)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 2
    num_attentions = sum(kind not in ("linear_attention", "conv") for kind in kinds)
    assert [attention.shape for attention in output.attentions] == [(2, 4, 7, 7)] * num_attentions


def gives_a_tuple(model: Any) -> None:
    ids = random_tokens(2, 7)
    found = model(ids, return_dict=False)
    assert isinstance(found, tuple) and torch.equal(found[0], first(model(ids)))


def has_a_decoder(model: Any) -> None:
    """The one that tells its layers which tokens are real."""
    assert model.get_decoder() is model.base_model


def grows(model: Any) -> None:
    """Last: the vocabulary stays longer."""
    ids = random_tokens(2, 7)
    before = first(model(ids))
    embedding = model.resize_token_embeddings(140)
    assert embedding is model.get_input_embeddings() and embedding.num_embeddings == 140
    assert model.config.vocab_size == model.base_model.config.vocab_size == 140
    torch.testing.assert_close(first(model(ids))[..., : before.shape[-1]], before)
    first(model(torch.full((1, 3), 139)))


ABILITIES: list[Callable[[Any], None]] = [
    shows_its_embedding,
    takes_another_embedding,
    takes_embedded_tokens,
    lets_gradients_through_a_frozen_embedding,
    recomputes_its_layers,
    gives_other_outputs,
    gives_a_tuple,
    has_a_decoder,
    grows,
]


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_heads_can_do_what_is_asked_of_a_model(family: str, auto_class: str, make_model: Callable) -> None:
    model = make_model(family, head=AUTO_CLASSES[auto_class])
    for ability in ABILITIES:
        ability(model)
