"""What the experts of every initialisation are, and what the converted model computes at step 0."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STORIES_MODEL, STORIES_TEXT, all_tensors, contents, write_dense
from families import EVERY_DENSE_FAMILY, FAMILIES, family_and
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ecmoe.conversion import convert
from ecmoe.conversion.models import TOLERANCE
from ecmoe.conversion.upcycling.initialisations import INITIALISATIONS
from modeling_ecmoe import routing_report, sparse_blocks

LAYERS, WIDTH, HIDDEN = 2, 48, 32
PARTS = ("gate_proj", "up_proj", "down_proj")
EXACT = {
    "blend": {},
    "shared": {},
    "copy": {},
    "split": {},
    "split, a quarter": {"ratio": 0.25},
    "granular": {},
    "granular, quarters": {"granularity": 4},
}
EXACT_IN_EVERY_FAMILY = ["blend", "shared", "copy", "split, a quarter", "granular"]
MakeDense = Callable[..., Path]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def make_dense(tmp_path_factory: pytest.TempPathFactory) -> MakeDense:
    """Dense checkpoints, each written once."""
    written: dict[str, Path] = {}

    def make(family: str = "Llama", **fields: Any) -> Path:
        key = f"{family}{sorted(fields.items())}"
        if key not in written:
            written[key] = tmp_path_factory.mktemp(family)
            model = write_dense(written[key], family, **fields)
            model.to(fields.get("dtype", torch.float32)).save_pretrained(written[key])
        return written[key]

    return make


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def converted(dense: Path, folder: Path, **options: Any) -> Path:
    """Converts without running a model."""
    convert(str(dense), str(folder), **{"num_experts": 4, "verify": False} | options)
    return folder


def both(dense: Path, folder: Path, **options: Any) -> tuple[Tensors, Tensors]:
    """The tensors of the converted model and of the dense one."""
    return all_tensors(converted(dense, folder, **options)), all_tensors(dense)


def dense_neurons(tensors: Tensors, layer: int, inner: str = "") -> Tensors:
    """The three matrices of a dense FFN or of a shared expert, the neurons along the first axis."""
    found = {part: tensors[f"model.layers.{layer}.mlp.{inner}{part}.weight"] for part in PARTS}
    return found | {"down_proj": found["down_proj"].T}


def shared_neurons(tensors: Tensors, layer: int) -> Tensors:
    return dense_neurons(tensors, layer, "shared_expert.")


def expert_neurons(tensors: Tensors, layer: int, expert: int) -> Tensors:
    """The same of an expert."""
    prefix = f"model.layers.{layer}.mlp.experts."
    gate, up = tensors[f"{prefix}gate_up_proj"][expert].chunk(2)
    return {"gate_proj": gate, "up_proj": up, "down_proj": tensors[f"{prefix}down_proj"][expert].T}


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert all(torch.equal(found[part], expected[part]) for part in PARTS)


@pytest.mark.parametrize(("family", "case"), family_and(EXACT, EXACT_IN_EVERY_FAMILY, FAMILIES))
def test_step_0_is_exact(tmp_path: Path, make_dense: MakeDense, family: str, case: str, make_tokens) -> None:
    init = case.partition(",")[0]
    out = converted(make_dense(family), tmp_path / "out", init=init, **EXACT[case])
    ids, model = make_tokens(3, 40), load(out)
    with torch.no_grad():
        expected = load(make_dense(family))(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=2e-5)
        if init in ("blend", "shared"):  # exact whatever the routes are, so in train mode too
            torch.testing.assert_close(model.train()(ids).logits, expected, atol=2e-5, rtol=2e-5)


def test_every_exact_initialisation_is_tested_here() -> None:
    assert {case.partition(",")[0] for case in EXACT} == {name for name, i in INITIALISATIONS.items() if i.exact}


@pytest.mark.parametrize("case", EXACT)
def test_sixteen_bits_stay_within_their_tolerance(
    tmp_path: Path, make_dense: MakeDense, case: str, make_tokens
) -> None:
    dense = make_dense(dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in all_tensors(dense).values()} == {torch.bfloat16}
    out = converted(dense, tmp_path / "out", init=case.partition(",")[0], **EXACT[case])
    ids = make_tokens(8, 64)
    with torch.no_grad():
        losses = [load(folder)(ids, labels=ids).loss.float().item() for folder in (dense, out)]
    assert abs(losses[0] - losses[1]) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("init", ["blend", "shared", "copy"])
def test_copies(tmp_path: Path, make_dense: MakeDense, init: str) -> None:
    """Every expert is the dense FFN, and so is the shared one; those of `shared` have a down_proj of zero."""
    found, source = both(make_dense(), tmp_path / "out", init=init)
    for layer in range(LAYERS):
        dense = dense_neurons(source, layer)
        expected = dense | {"down_proj": torch.zeros_like(dense["down_proj"])} if init == "shared" else dense
        for expert in range(4):
            assert_equal(expert_neurons(found, layer, expert), expected)
        if init != "copy":
            assert_equal(shared_neurons(found, layer), dense)


@pytest.mark.parametrize("ratio", [None, 0.3])
def test_noise_is_in_proportion(tmp_path: Path, make_dense: MakeDense, ratio: float | None) -> None:
    found, source = both(make_dense(), tmp_path / "out", init="noise", num_experts=8, ratio=ratio)
    for layer in range(LAYERS):
        dense = dense_neurons(source, layer)
        for part in PARTS:
            noise = torch.stack([expert_neurons(found, layer, expert)[part] for expert in range(8)]) - dense[part]
            relative = noise / dense[part].std()
            assert relative.std().item() == pytest.approx(ratio or 0.01, rel=0.04)  # 12,288 values: 0.6 % expected
            assert abs(relative.mean().item()) < 0.04 * (ratio or 0.01)
            correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(8)  # of 1,536 values: 0.026 expected
            assert correlation.abs().max() < 0.12


@pytest.mark.parametrize("ratio", [None, 0.3, 1.0])
def test_drop_redraws_the_same_neurons_of_all_three_matrices(
    tmp_path: Path, make_dense: MakeDense, ratio: float | None
) -> None:
    """One neuron is forty times as wide as the others, so that its block's deviation is told from the matrix's."""
    model = load(make_dense(num_hidden_layers=1))
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T):
            weight += 0.5
            weight[7] *= 40
    model.save_pretrained(tmp_path / "dense")
    tensors, source = both(tmp_path / "dense", tmp_path / "out", init="drop", num_experts=6, ratio=ratio)
    dense, redrawn_sets = dense_neurons(source, 0), []
    for expert in range(6):
        found = expert_neurons(tensors, 0, expert)
        redrawn = {part: (found[part] != dense[part]).any(1) for part in PARTS}
        assert redrawn["gate_proj"].sum() == round((ratio or 0.5) * WIDTH)
        assert torch.equal(redrawn["gate_proj"], redrawn["up_proj"])
        assert torch.equal(redrawn["gate_proj"], redrawn["down_proj"])
        redrawn_sets.append(redrawn["gate_proj"])
        for part in PARTS:
            new, old = found[part][redrawn[part]], dense[part][redrawn[part]]
            assert new.std().item() == pytest.approx(old.std().item(), rel=0.15)  # at least 448 values: 3 % expected
            assert abs(new.mean() - old.mean()) < 0.2 * old.std()
            if not redrawn[part][7]:
                assert old.std() < 0.1 * dense[part].std()
    assert ratio == 1 or len({tuple(redrawn.tolist()) for redrawn in redrawn_sets}) == 6
    assert ratio == 1 or 0 < sum(int(redrawn[7]) for redrawn in redrawn_sets) < 6


def test_drop_of_nothing_is_a_copy(tmp_path: Path, make_dense: MakeDense) -> None:
    found, source = both(make_dense(), tmp_path / "out", init="drop", ratio=0)
    assert_equal(expert_neurons(found, 0, 1), dense_neurons(source, 0))


@pytest.mark.parametrize(("ratio", "shared"), [(None, 24), (0.25, 12), (0.02, 1), (0.98, 47)])
def test_split_shares_the_first_neurons(
    tmp_path: Path, make_dense: MakeDense, ratio: float | None, shared: int
) -> None:
    found, source = both(make_dense(), tmp_path / "out", init="split", ratio=ratio)
    dense = dense_neurons(source, 1)
    assert_equal(shared_neurons(found, 1), {part: matrix[:shared] for part, matrix in dense.items()})
    for expert in range(4):
        assert_equal(expert_neurons(found, 1, expert), {part: matrix[shared:] for part, matrix in dense.items()})


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("granularity", "num_experts"), [(2, 4), (4, 8), (3, 6)])
def test_granular_replicas_stay_together(
    tmp_path: Path,
    make_dense: MakeDense,
    granularity: int,
    num_experts: int,
    verify: bool,
    few_tokens: None,
    text: Path,
    make_tokens,
) -> None:
    """Shards of the dense neurons; one router row, threshold and route for each replica."""
    options = {"init": "granular", "granularity": granularity, "num_experts": num_experts, "router": "centroid"}
    found, source = both(make_dense(), tmp_path / "out", verify=verify, text=str(text), **options)
    width = WIDTH // granularity
    for layer in range(LAYERS):
        dense = dense_neurons(source, layer)
        for expert in range(num_experts):
            first = expert % granularity * width
            shard = {part: matrix[first : first + width] for part, matrix in dense.items()}
            assert_equal(expert_neurons(found, layer, expert), shard)
    model = load(tmp_path / "out")
    assert model.config.capacity_factor == model.config.min_experts_per_token == granularity
    assert model.config.num_expert_groups == model.config.routed_scaling_factor == granularity
    routes = routes_of(model, make_tokens(8, 64))
    for layer, block in enumerate(sparse_blocks(model).values()):
        replicas = block.gate.weight.unflatten(0, (-1, granularity))
        assert torch.equal(replicas, replicas[:, :1].expand_as(replicas))
        assert len(set(block.gate.weight[:, 0].tolist())) == num_experts // granularity
        assert len(set(block.gate.threshold.tolist())) == num_experts // granularity
        whole = routes[layer].unflatten(1, (-1, granularity))
        assert torch.equal(whole, whole[..., :1].expand_as(whole))
        assert (whole[..., 0].sum(0) > 0).all()


def routes_of(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """[T, E] bool for each sparse layer: the routes that inference takes."""
    routes: list[Tensor] = []
    handles = [
        block.gate.register_forward_hook(
            lambda _gate, _inputs, output, block=block: routes.append(block.routes(output[1]))
        )
        for block in sparse_blocks(model).values()
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return routes


@pytest.mark.parametrize("attention", ["average", "first"])
def test_mix_takes_ffns_in_turn(tmp_path: Path, make_dense: MakeDense, attention: str) -> None:
    sources = [make_dense(), make_dense(seed=1), make_dense(seed=2)]
    mixed = {"init": "mix", "mix_with": [str(source) for source in sources[1:]], "mix_attention": attention}
    tensors = all_tensors(converted(sources[0], tmp_path / "out", num_experts=6, **mixed))
    dense = [all_tensors(source) for source in sources]
    for layer in range(LAYERS):
        for expert in range(6):
            assert_equal(expert_neurons(tensors, layer, expert), dense_neurons(dense[expert % 3], layer))
    others = [name for name in tensors if ".mlp." not in name]
    assert {name for name in dense[0] if ".mlp." not in name} == set(others)
    for name in others:
        mean = torch.stack([each[name] for each in dense]).mean(0)
        assert torch.equal(tensors[name], mean if attention == "average" else dense[0][name])
    assert convert(str(sources[0]), str(tmp_path / "default"), verify=False, **mixed)["num_experts"] == 3


def test_mix_of_one_checkpoint_is_that_checkpoint(tmp_path: Path, make_dense: MakeDense, make_tokens) -> None:
    out = converted(make_dense(), tmp_path / "out", init="mix", mix_with=[str(make_dense())])
    ids = make_tokens(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(load(out)(ids).logits, load(make_dense())(ids).logits, atol=2e-5, rtol=2e-5)


LAYER_CHOICES = {"all": [0, 1, 2, 3, 4], "every-second": [1, 3], "last-half": [2, 3, 4], "1": [1], "4, 0": [0, 4]}


@pytest.mark.parametrize("layers", LAYER_CHOICES)
def test_only_the_chosen_layers_get_experts(tmp_path: Path, make_dense: MakeDense, layers: str, make_tokens) -> None:
    dense = make_dense(num_hidden_layers=5)
    out = converted(dense, tmp_path / "out", layers=layers, init="copy")
    model = load(out)
    chosen = LAYER_CHOICES[layers]
    assert model.config.mlp_layer_types == ["sparse" if layer in chosen else "dense" for layer in range(5)]
    assert list(sparse_blocks(model)) == [f"model.layers.{layer}.mlp" for layer in chosen]
    for layer in set(range(5)) - set(chosen):
        assert_equal(dense_neurons(all_tensors(out), layer), dense_neurons(all_tensors(dense), layer))
    ids = make_tokens(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, load(dense)(ids).logits, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("options", [{"init": "noise"}, {"init": "drop"}, {"router": "centroid"}], ids=str)
def test_drawn_weights_follow_the_seed(tmp_path: Path, make_dense: MakeDense, text: Path, options: dict) -> None:
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        converted(make_dense("Mistral"), tmp_path / name, seed=seed, text=str(text), **options)
    assert contents(tmp_path / "first") == contents(tmp_path / "again")
    first, other = all_tensors(tmp_path / "first"), all_tensors(tmp_path / "other")
    drawn = [name for name in first if (".gate.weight" if "router" in options else ".experts.") in name]
    assert len(drawn) >= LAYERS
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert all(torch.equal(first[name], other[name]) for name in first if ".mlp." not in name)


@pytest.mark.parametrize("init", [name for name in INITIALISATIONS if name != "mix"])
def test_unverified_conversion_runs_no_model_and_estimates_thresholds(
    tmp_path: Path, make_dense: MakeDense, init: str, make_tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a tokenizer, too. On random tokens every expert's load is between half and twice its share."""
    source = tmp_path / "dense"
    write_dense(source, "Llama")
    for path in source.glob("*token*"):
        path.unlink()

    def run(*_: object, **__: object) -> None:
        raise AssertionError("a model was run")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", run)
        patch.setattr(AutoModelForCausalLM, "from_pretrained", run)
        patch.setattr(nn.Linear, "forward", run)
        record = convert(str(source), str(tmp_path / "out"), num_experts=4, init=init, verify=False)
    assert (record["verification"], record["calibration_tokens"]) == (None, 0)
    model = load(tmp_path / "out")
    assert {int(block.gate.threshold_updates) for block in sparse_blocks(model).values()} == {1}
    report = routing_report(model, [{"input_ids": make_tokens(16, 64)}])
    assert 0.5 < report["summary"]["load_min"] < report["summary"]["load_max"] < 2


@pytest.mark.parametrize("family", EVERY_DENSE_FAMILY)
def test_estimated_thresholds_know_the_family_s_norms(tmp_path: Path, family: str, make_tokens) -> None:
    """Or there would be none: OLMo's FFNs see sums of many layers, Gemma's norms multiply by 1 + weight."""
    write_dense(tmp_path / "dense", family, num_hidden_layers=4)
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), num_experts=4, capacity_factor=1.5, verify=False)
    report = routing_report(load(tmp_path / "out"), [{"input_ids": make_tokens(16, 64)}])
    assert 1.1 < report["summary"]["experts_per_token"] < 1.9


@pytest.mark.skipif(
    not (STORIES_MODEL.is_dir() and STORIES_TEXT.is_file()),
    reason="stories260K and its text are not beside the repository (ECMOE_TEST_DATA)",
)
@pytest.mark.parametrize("case", sorted(EXACT.keys() - {"split, a quarter"}))
def test_stories260k_keeps_its_loss(tmp_path: Path, case: str, few_tokens: None) -> None:
    options = {"text": str(STORIES_TEXT), "verify": True} | EXACT[case]
    out = converted(STORIES_MODEL, tmp_path / "out", init=case.partition(",")[0], **options)
    record = json.loads((out / "ecmoe_conversion.json").read_text())
    assert abs(record["verification"]["loss_change"]) <= 1e-5
    tokenizer = AutoTokenizer.from_pretrained(STORIES_MODEL)
    ids = tokenizer(STORIES_TEXT.read_text(encoding="utf-8")[:8_000], return_tensors="pt")["input_ids"][:, : 8 * 128]
    rows = ids.view(8, 128)
    with torch.no_grad():
        losses = [load(folder)(rows, labels=rows).loss.item() for folder in (STORIES_MODEL, out)]
    assert abs(losses[0] - losses[1]) <= 1e-5
    assert losses[0] < 2 < math.log(512)  # it is the trained model
