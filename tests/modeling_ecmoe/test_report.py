"""The numbers a person can ask for, against counts made by hand from the router's own logits."""

from collections.abc import Callable

import pytest
import torch
from blocks import BATCH, LENGTH, build_block, oracle_pairs, random_hidden

from modeling_ecmoe import RoutingRecord, record_routing, routing_report, sparse_blocks, training_routes


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_report_counts_what_the_routes_are(score: str, make_routed_model: Callable, make_tokens: Callable) -> None:
    model = make_routed_model("Qwen3", router_score_function=score).train()
    ids = make_tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    report = routing_report(model, [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1]}])
    assert model.training
    model.eval()
    seen = [
        model(ids, attention_mask=mask, output_router_logits=True).router_logits,
        model(ids[:1], output_router_logits=True).router_logits,
    ]
    real = [mask.flatten().bool(), torch.ones(20, dtype=torch.bool)]
    for layer, (name, block) in enumerate(sparse_blocks(model).items()):
        logits = torch.cat([each[layer][where] for each, where in zip(seen, real, strict=True)])
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        routes = scores > block.gate.threshold
        found = report["layers"][name]
        share = 1.5 * 73 / 4
        assert found["load"] == pytest.approx([int(count) / share for count in routes.sum(0)])
        counts = [int((routes.sum(1) == number).sum()) / 73 for number in range(5)]
        assert found["experts_per_token"] == pytest.approx(counts)
        assert found["uncovered"] == pytest.approx(counts[0])
        assert found["threshold"] == pytest.approx(block.gate.threshold.tolist())
        probabilities = logits.softmax(-1)
        assert found["entropy"] == pytest.approx(-(probabilities * probabilities.log()).sum(-1).mean().item(), rel=1e-5)
        assert found["dropped"] == 0
    assert report["summary"]["load_max"] == max(load for layer in report["layers"].values() for load in layer["load"])


def test_drift_is_how_far_the_threshold_is_from_balance(make_routed_model: Callable, make_tokens: Callable) -> None:
    model = make_routed_model("Llama")
    batch = {"input_ids": make_tokens(4, 32)}
    before = next(iter(routing_report(model, [batch])["layers"].values()))["threshold_drift"]
    with torch.no_grad():
        next(iter(sparse_blocks(model).values())).gate.threshold.add_(0.125)
    after = next(iter(routing_report(model, [batch])["layers"].values()))["threshold_drift"]
    assert after == pytest.approx([drift - 0.125 for drift in before], abs=1e-6)


def test_dropped_choices_of_token_choice(make_model: Callable, make_tokens: Callable) -> None:
    fields = {"routing": "token_choice", "inference_routing": "token_choice", "capacity_factor": 2}
    batch = [{"input_ids": make_tokens(4, 16)}]
    for factor, dropped in ((None, False), (4, False), (0.5, True)):
        report = routing_report(make_model("Mistral", token_choice_capacity_factor=factor, **fields), batch)
        for layer in report["layers"].values():
            assert (layer["dropped"] > 0) is dropped
            assert layer["experts_per_token"] == [0, 0, 1, 0, 0]
            # Half of all room was taken away, so at least half of the two choices per token were dropped.
            assert factor != 0.5 or layer["dropped"] >= 1


def test_an_empty_record_says_so() -> None:
    with pytest.raises(ValueError, match="no forward pass was recorded"):
        RoutingRecord(4, 1.0).summary()


def test_records_of_two_passes_add_up(make_routed_model: Callable, make_tokens: Callable) -> None:
    model, halves = make_routed_model("Llama"), make_tokens(4, 8).split(2)
    with torch.no_grad(), record_routing(model) as both:
        for half in halves:
            model(half)
    records = []
    for half in halves:
        with torch.no_grad(), record_routing(model) as record:
            model(half)
        records.append(record)
    records[0].merge(records[1])
    assert records[0].report() == both.report()


TRAINING = {
    "expert choice": {},
    "bounded": {"min_experts_per_token": 1, "max_experts_per_token": 2},
    "dropless": {"routing": "token_choice", "inference_routing": "token_choice", "capacity_factor": 2},
    "full experts": {
        "routing": "token_choice",
        "inference_routing": "token_choice",
        "capacity_factor": 2,
        "token_choice_capacity_factor": 0.5,
    },
    "threshold": {"routing": "threshold", "threshold_capacity_clamp": 0.1},
    "threshold, cold": {"routing": "threshold", "threshold_after_steps": 5},
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_routes_are_those_of_the_oracle(name: str) -> None:
    """In eval mode as well, since they are asked for by name."""
    block = build_block(**TRAINING[name]).train()
    block.gate.threshold_updates.fill_(1)
    _, scores_TE, threshold_E = block.gate(random_hidden().flatten(0, 1))
    expected = oracle_pairs(block, scores_TE, BATCH, LENGTH)
    for training in (True, False):
        routes_TE, dropped = training_routes(block.train(training), scores_TE)
        assert {(e, t) for t, e in routes_TE.nonzero().tolist()} == expected
    if name == "full experts":
        assert dropped == 2 * len(scores_TE) - len(expected) > 0
    elif name == "threshold":
        above = {(e, t) for t, e in (scores_TE > threshold_E).nonzero().tolist()}
        assert dropped == len(above - expected) > 0
    else:
        assert dropped == 0
