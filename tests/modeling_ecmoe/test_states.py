"""States a model should not be left in unnoticed: never calibrated, overridden by another thread, a replica."""

import logging
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from modeling_ecmoe import calibrate_thresholds, use_inference_routing
from modeling_ecmoe.calibration_ecmoe import sparse_blocks


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was logged so far about calibration; Transformers' memory of what it has warned of is emptied."""
    transformers_logging.warning_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="modeling_ecmoe.router_ecmoe")
    yield lambda: [text for text in caplog.messages if "calibrate" in text]
    transformers_logging.warning_once.cache_clear()


def test_a_fresh_model_warns_once(
    family: str, make_model: Callable, make_tokens: Callable, warnings_of: Callable
) -> None:
    model = make_model(family)
    for _ in range(3):
        model(make_tokens(1, 5))
    model.generate(make_tokens(1, 5), max_new_tokens=2, do_sample=False)
    (warning,) = warnings_of()
    assert "ecmoe.calibrate_thresholds(model, texts, tokenizer)" in warning


@pytest.mark.parametrize("how", ["calibrated", "stepped", "training", "expert choice", "token choice"])
def test_what_needs_no_calibration_does_not_warn(
    how: str, make_model: Callable, make_tokens: Callable, warnings_of: Callable
) -> None:
    token_choice = {"routing": "token_choice", "inference_routing": "token_choice", "capacity_factor": 2}
    model = make_model("Llama", **(token_choice if how == "token choice" else {}))
    ids = make_tokens(2, 9)
    if how == "calibrated":
        calibrate_thresholds(model, [{"input_ids": ids}])
    elif how in ("stepped", "training"):
        model.train()(ids, labels=ids).loss.backward()
    if how == "stepped":
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    if how == "expert choice":
        with use_inference_routing(model, "expert_choice"):
            model(ids)
    elif how != "training":
        model.eval()(ids)
    assert warnings_of() == []


def test_a_checkpoint_without_thresholds_warns_when_it_is_run(
    make_routed_model: Callable, make_tokens: Callable, warnings_of: Callable
) -> None:
    model = make_routed_model("Llama")
    weights = {name: tensor for name, tensor in model.state_dict().items() if "threshold" not in name}
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=weights).eval()
    assert all(block.gate.threshold_updates == 0 for block in sparse_blocks(loaded).values())
    loaded(make_tokens(1, 5))
    assert len(warnings_of()) == 1


def overlap(model: PreTrainedModel, first: str | None, second: str | None) -> list[str | None]:
    """Opens the context in two threads and closes them in the order they opened; what held meanwhile."""
    steps = [threading.Event() for _ in range(3)]
    block = next(iter(sparse_blocks(model).values()))
    seen: list[str | None] = []

    def opens_first() -> None:
        with use_inference_routing(model, first):
            seen.append(block.routing_override)
            steps[0].set()
            steps[1].wait(10)
        seen.append(block.routing_override)
        steps[2].set()

    def opens_second() -> None:
        steps[0].wait(10)
        with use_inference_routing(model, second):
            seen.append(block.routing_override)
            steps[1].set()
            steps[2].wait(10)
        seen.append(block.routing_override)

    threads = [threading.Thread(target=each) for each in (opens_first, opens_second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return seen


@pytest.mark.parametrize(
    ("first", "second"),
    [(None, None), ("threshold", "expert_choice"), ("expert_choice", "threshold"), ("token_choice", None)],
)
def test_overlapping_threads_leave_no_override(first: str | None, second: str | None, make_model: Callable) -> None:
    model = make_model("Llama").train()
    expected = [first or "threshold", second or "threshold", second or "threshold", None]
    assert overlap(model, first, second) == expected
    assert all(block.routing_overrides == [] for block in sparse_blocks(model).values())


def test_an_error_inside_leaves_no_override(make_model: Callable) -> None:
    model = make_model("Llama")
    with pytest.raises(KeyError), use_inference_routing(model, "expert_choice"), use_inference_routing(model):
        raise KeyError
    assert all(block.routing_override is None for block in sparse_blocks(model).values())


def test_a_replica_of_data_parallel_is_refused_in_training(make_routed_model: Callable, make_tokens: Callable) -> None:
    model = make_routed_model("Llama").model
    expected = model(make_tokens(1, 5)).last_hidden_state
    replica = model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"nn\.DataParallel cannot train this model.*accelerate launch"):
        replica.train()(make_tokens(1, 5))
    with torch.no_grad():
        torch.testing.assert_close(replica.eval()(make_tokens(1, 5)).last_hidden_state, expected)
    model.train()(make_tokens(1, 5))
