"""Router rows that are measured: centroids of the FFN's inputs, and the mean inputs of prompts."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import all_tensors, write_dense
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ecmoe.conversion import convert
from ecmoe.conversion.texts import read_documents, sample_windows
from ecmoe.conversion.upcycling.plan import generator_of
from ecmoe.conversion.upcycling.router import centroid_rows, ffn_inputs, k_means, rescaled_rows
from modeling_ecmoe.configuration_ecmoe import DenseFFN

LAYERS = 2
# Texts of one kind share few tokens with those of another.
PROMPTS = [
    ["0123456789 9876543210 31415926 1000", "1989 2024 1066 42 7 90210"],
    ["EVERY WORD OF THIS IS IN CAPITALS", "SO IS THIS ONE HERE"],
    ["}{)(][;:,.!?", "([{}]);;::,,.."],
    ["éàüößñçø", "øæåéèêëü"],
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_dense(folder, "Qwen3")
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return path


def inputs_of(dense: Path, batches: list[Tensor]) -> dict[int, Tensor]:
    """What the FFNs see of these token ids, [T, D] for each layer."""
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    return ffn_inputs(model, batches, list(range(LAYERS)), DenseFFN())


def inputs_on(dense: Path, texts: list[str]) -> dict[int, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(dense)
    return inputs_of(dense, [torch.tensor([tokenizer(text)["input_ids"][:128]]) for text in texts])


def router_rows(folder: Path) -> list[Tensor]:
    tensors = all_tensors(folder)
    return [tensors[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(LAYERS)]


@pytest.mark.parametrize("router", ["centroid", "hidden"])
def test_rows_are_centred_and_as_decided_as_drawn_ones(
    tmp_path: Path, dense: Path, text: Path, prompts: Path, router: str
) -> None:
    """Their logits spread as those of rows from N(0, initializer_range) would, on text they were not measured on."""
    options = {"router_prompts": str(prompts)} if router == "hidden" else {}
    convert(str(dense), str(tmp_path / "out"), num_experts=4, router=router, verify=False, text=str(text), **options)
    documents = text.read_text().split("<|endoftext|>")
    inputs = inputs_on(dense, [document.strip()[1000:3000] for document in documents[:20]])
    generator = torch.Generator().manual_seed(0)
    for layer, rows_ED in enumerate(router_rows(tmp_path / "out")):
        torch.testing.assert_close(rows_ED.mean(0), torch.zeros(32), atol=1e-6, rtol=0)
        drawn_RD = torch.randn(2000, 32, generator=generator) * 0.2  # the initializer_range
        spread, usual = ((inputs[layer] @ rows.T).std(0).mean() for rows in (rows_ED, drawn_RD))
        assert 0.7 < spread / usual < 1.4


def test_rescaled_rows_have_the_deviation_that_is_promised() -> None:
    directions = torch.randn(6, 32) + 3
    inputs = torch.randn(500, 32) * 5
    rows = rescaled_rows(directions, inputs, 0.02)
    wanted = 0.02 * inputs.square().sum(1).mean().sqrt()
    assert (inputs @ rows.T).std(0).mean().item() == pytest.approx(wanted.item(), rel=1e-5)
    centred = directions - directions.mean(0)
    torch.testing.assert_close(rows / rows.norm(), centred / centred.norm(), atol=1e-6, rtol=1e-5)


def test_prompts_go_to_their_expert(tmp_path: Path, dense: Path, text: Path, prompts: Path) -> None:
    """In every layer most tokens of the e-th list prefer expert e, and no other expert gets as many."""
    options = {"router": "hidden", "router_prompts": str(prompts), "text": str(text), "verify": False}
    convert(str(dense), str(tmp_path / "out"), num_experts=4, **options)
    for expert, texts in enumerate(PROMPTS):
        inputs = inputs_on(dense, texts)
        for layer, rows_ED in enumerate(router_rows(tmp_path / "out")):
            preferred = (inputs[layer] @ rows_ED.T).argmax(1).bincount(minlength=4) / len(inputs[layer])
            assert preferred.argmax() == expert
            assert preferred[expert] > 0.5


def test_prompts_of_granular_experts_are_one_list_per_replica(
    tmp_path: Path, dense: Path, text: Path, prompts: Path
) -> None:
    options = {"router": "hidden", "router_prompts": str(prompts), "text": str(text), "verify": False}
    convert(str(dense), str(tmp_path / "plain"), num_experts=4, **options)
    convert(str(dense), str(tmp_path / "shards"), num_experts=8, init="granular", **options)
    for plain, shards in zip(router_rows(tmp_path / "plain"), router_rows(tmp_path / "shards"), strict=True):
        assert torch.equal(shards, plain.repeat_interleave(2, dim=0))


def test_centroid_rows_find_clusters() -> None:
    """Three tight clusters: one row each, and every point prefers the row of its own."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(3, 32, generator=generator))
    cluster = torch.randint(3, (600,), generator=generator)
    points = centres[cluster] + 0.03 * torch.randn(600, 32, generator=generator)
    rows = centroid_rows(points, 3, 0.02, generator_of(0, "x"))
    preferred = (points @ rows.T).argmax(1)
    table = torch.zeros(3, 3).index_put_((cluster, preferred), torch.ones(600), accumulate=True)
    assert sorted(table.argmax(1).tolist()) == [0, 1, 2]
    assert table.max(1).values.sum() == 600


def test_k_means_of_few_and_equal_points() -> None:
    points = torch.eye(4)
    found = k_means(points, 4, generator_of(0, "x"))
    assert torch.equal(found.sort(0).values, points.sort(0).values)
    assert torch.equal(k_means(torch.ones(5, 3), 2, generator_of(0, "x")), torch.ones(2, 3))


def test_thresholds_of_measured_routers_give_every_expert_its_share(tmp_path: Path, dense: Path, text: Path) -> None:
    """Measured on the dense model's inputs, without a pass of the converted model."""
    convert(str(dense), str(tmp_path / "out"), num_experts=4, router="centroid", verify=False, text=str(text))
    windows = sample_windows(AutoTokenizer.from_pretrained(dense), read_documents(text), 128, 160, seed=0)
    inputs, tensors = inputs_of(dense, list(windows[:32].split(4))), all_tensors(tmp_path / "out")
    for layer, rows_ED in enumerate(router_rows(tmp_path / "out")):
        threshold_E = tensors[f"model.layers.{layer}.mlp.gate.threshold"]
        chosen_E = ((inputs[layer] @ rows_ED.T).sigmoid() > threshold_E).sum(0)
        assert (chosen_E - 4096 / 4).abs().max() <= 2  # but for rounding, exactly a quarter of the tokens
