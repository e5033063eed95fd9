"""Negative controls: what Transformers calls deprecated fails a test, whichever way it says so."""

import warnings
from collections.abc import Callable

import deprecations
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_ecmoe.versions_ecmoe import CACHE


def test_a_deprecated_method_is_an_error(make_model: Callable) -> None:
    model = make_model("Llama")
    if not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("this Transformers has no new name for it yet")
    with pytest.raises(FutureWarning, match="gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable()


@pytest.mark.parametrize("both", [False, True])
def test_a_deprecated_argument_is_an_error_whoever_called_the_module(both: bool) -> None:
    if CACHE == "past_key_values":
        pytest.skip("this Transformers has no new name for it yet")
    caches = {"past_key_values": DynamicCache()} | ({"cache": DynamicCache()} if both else {})
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    dense = LlamaForCausalLM(config)
    with pytest.raises(FutureWarning, match="past_key_values"):
        dense(torch.ones(1, 4, dtype=torch.long), **caches)


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_warnings_of_transformers_are_errors_and_others_are_not(category: type[Warning]) -> None:
    with pytest.raises(category, match="old"):
        warnings.warn_explicit("old", category, "x.py", 1, module="transformers.modeling_utils")
    with pytest.warns(category, match="old"):
        warnings.warn_explicit("old", category, "x.py", 1, module="datasets.table")


def test_the_logger_is_heard(make_config: Callable) -> None:
    make_config("Llama").torch_dtype = "float32"
    (message,) = deprecations.recorder.take()
    assert "torch_dtype" in message and "deprecated" in message


def test_what_was_heard_fails_the_test(make_config: Callable) -> None:
    """The fixture's own end, driven by hand."""
    rounds = deprecations.no_deprecations.__wrapped__()
    next(rounds)
    deprecations.recorder.messages.append("`x` is deprecated")
    with pytest.raises(pytest.fail.Exception, match="`x` is deprecated"):
        next(rounds)
