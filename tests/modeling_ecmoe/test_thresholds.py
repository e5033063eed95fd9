"""The threshold each router keeps: when it is averaged, in which precision it lives, and calibration."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import oracle
import pytest
import torch
from checkpointing import recompute_layers
from checkpoints import tiny_tokenizer
from families import CORE, PARALLEL, family_and
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_accelerate_available

from modeling_ecmoe import (
    calibrate_thresholds,
    calibration_ecmoe,
    record_routing,
    routing_report,
    use_inference_routing,
)
from modeling_ecmoe.batches_ecmoe import as_batches
from modeling_ecmoe.block_ecmoe import EcMoeRouter
from modeling_ecmoe.calibration_ecmoe import sparse_blocks
from modeling_ecmoe.routing_ecmoe import between


def gates(model: PreTrainedModel) -> dict[str, EcMoeRouter]:
    return {name: block.gate for name, block in sparse_blocks(model).items()}


def training_step(model: PreTrainedModel, *batches: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    for ids in batches:
        model(ids, labels=ids).loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def frozen_sgd(*models: PreTrainedModel) -> torch.optim.Optimizer:
    """An optimiser whose steps change no weight, so that each step's thresholds can be compared."""
    return torch.optim.SGD([parameter for model in models for parameter in model.parameters()], lr=0.0)


@torch.no_grad()
def midpoints(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Each layer's threshold of one training forward pass, by the oracle, from the scores of the layer."""
    scores: dict[str, Tensor] = {}
    handles = [
        gate.register_forward_hook(lambda _m, _i, output, name=name: scores.__setitem__(name, output[1]))
        for name, gate in gates(model).items()
    ]
    model(ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    is_real = None if mask is None else mask.flatten().bool().tolist()
    pools = [list(range(ids.numel()))]
    factor = model.config.capacity_factor
    return {
        name: torch.tensor(oracle.choice_threshold(score_TE, factor, pools, is_real))
        for name, score_TE in scores.items()
    }


def assert_thresholds(model: PreTrainedModel, expected: dict[str, Tensor], updates: int = 1) -> None:
    for name, gate in gates(model).items():
        torch.testing.assert_close(gate.threshold, expected[name].float(), atol=2e-6, rtol=1e-5, msg=name)
        assert gate.threshold_updates == updates
        assert gate.pending[-1] == 0
        assert not gate.has_pending


def test_a_plain_loop_updates_once_per_step(family: str, make_model: Callable, make_tokens: Callable) -> None:
    model = make_model(family).train()
    optimizer = frozen_sgd(model)
    first, second = make_tokens(2, 9, seed=1), make_tokens(3, 7, seed=2)
    expected = midpoints(model, first)
    model(first, labels=first).loss.backward()
    assert all((gate.threshold == 0).all() and gate.threshold_updates == 0 for gate in gates(model).values())
    optimizer.step()
    assert_thresholds(model, expected)
    optimizer.step()  # without a forward pass nothing is added
    assert_thresholds(model, expected)
    optimizer.zero_grad()
    training_step(model, second, optimizer=optimizer)
    decay, later = model.config.threshold_decay, midpoints(model, second)
    averages = {
        name: torch.tensor(
            [
                oracle.moving_average(pair, decay)
                for pair in zip(expected[name].tolist(), later[name].tolist(), strict=True)
            ]
        )
        for name in expected
    }
    assert_thresholds(model, averages, updates=2)


def test_accumulation_averages_over_the_tokens_of_the_micro_batches(
    make_model: Callable, make_tokens: Callable
) -> None:
    model = make_model("Llama").train()
    batches = [make_tokens(2, 9, seed=1), make_tokens(1, 5, seed=2), make_tokens(4, 6, seed=3)]
    each = [midpoints(model, ids) for ids in batches]
    tokens = [ids.numel() for ids in batches]
    expected = {
        name: sum(count * found[name] for count, found in zip(tokens, each, strict=True)) / sum(tokens)
        for name in each[0]
    }
    training_step(model, *batches, optimizer=frozen_sgd(model))
    assert_thresholds(model, expected)


def test_padding_has_no_part_in_a_threshold(make_model: Callable, make_tokens: Callable) -> None:
    model = make_model("Qwen3").train()
    ids = make_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = midpoints(model, ids, mask)
    assert any((found - expected[name]).abs().max() > 1e-3 for name, found in midpoints(model, ids).items())
    optimizer = frozen_sgd(model)
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(gate.pending[-1] == mask.sum() for gate in gates(model).values())
    optimizer.step()
    assert_thresholds(model, expected)


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "eval", "context"])
def test_passes_that_train_nothing_add_nothing(how: str, make_model: Callable, make_tokens: Callable) -> None:
    model = make_model("Llama").train(how != "eval")
    optimizer = frozen_sgd(model)
    context = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "eval": torch.enable_grad(),
        "context": use_inference_routing(model),
    }[how]
    with context:
        model(make_tokens(2, 9))
    optimizer.step()
    assert_thresholds(model, {name: torch.zeros(4) for name in gates(model)}, updates=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("num_batches", [1, 2])
def test_gradient_checkpointing_leaves_the_mean(
    use_reentrant: bool, num_batches: int, make_model: Callable, make_tokens: Callable
) -> None:
    batches = [make_tokens(2, 9, seed=1), make_tokens(1, 5, seed=2)][:num_batches]
    plain = make_model("Llama").train()
    training_step(plain, *batches, optimizer=frozen_sgd(plain))
    model = make_model("Llama").train()
    recompute_layers(model, use_reentrant=use_reentrant)
    training_step(model, *batches, optimizer=frozen_sgd(model))
    assert_thresholds(model, {name: gate.threshold for name, gate in gates(plain).items()})


def test_a_deep_copy_keeps_its_own(make_model: Callable, make_tokens: Callable) -> None:
    model = make_model("Llama").train()
    twin = copy.deepcopy(model)
    expected = midpoints(twin, make_tokens(2, 9))
    training_step(twin, make_tokens(2, 9), optimizer=frozen_sgd(twin))
    assert_thresholds(twin, expected)
    assert_thresholds(model, {name: torch.zeros(4) for name in expected}, updates=0)


def test_only_the_model_that_ran_forward_is_updated(make_model: Callable, make_tokens: Callable) -> None:
    policy, reference = make_model("Llama").train(), make_model("Qwen3", seed=1).train()
    expected = midpoints(policy, make_tokens(2, 9))
    training_step(policy, make_tokens(2, 9), optimizer=frozen_sgd(policy, reference))
    assert_thresholds(policy, expected)
    assert_thresholds(reference, {name: torch.zeros(4) for name in gates(reference)}, updates=0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99, 0.9999])
def test_bias_corrected_average_of_five_steps(decay: float, make_config: Callable) -> None:
    router = EcMoeRouter(make_config("Llama", threshold_decay=decay))
    values = torch.rand(5, 4, generator=torch.Generator().manual_seed(3))
    moment = torch.zeros(4, dtype=torch.float64)
    for step, value in enumerate(values, start=1):
        router.record_threshold(value, 7)
        router.update_threshold()
        moment = decay * moment + (1 - decay) * value.double()
        torch.testing.assert_close(router.threshold.double(), moment / (1 - decay**step), atol=2e-6, rtol=0)
        by_sum = [oracle.moving_average(column.tolist(), decay) for column in values[:step].T]
        torch.testing.assert_close(router.threshold.double(), torch.tensor(by_sum).double(), atol=2e-6, rtol=0)
        assert router.threshold_updates == step


def test_threshold_converges_under_training(make_model: Callable, make_tokens: Callable) -> None:
    """On the same data again and again, without a calibration, eval mode takes about the load of training."""
    model = make_model("Llama", threshold_decay=0.5).train()
    optimizer = frozen_sgd(model)
    ids = make_tokens(8, 32)
    for _ in range(3):
        training_step(model, ids, optimizer=optimizer)
    with record_routing(model.eval()) as record:
        model(ids)
    assert record.load()[0] == [1.0] * 4


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_leaves_the_thresholds_in_float32(cast: str, make_routed_model: Callable) -> None:
    model = make_routed_model("Llama")
    before = {name: gate.threshold.clone() for name, gate in gates(model).items()}
    CASTS[cast](model)
    for name, gate in gates(model).items():
        assert gate.weight.dtype != torch.float32
        assert gate.threshold.dtype == gate.pending.dtype == torch.float32
        assert gate.threshold_updates.dtype == torch.int64
        assert torch.equal(gate.threshold, before[name])


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "auto"])
def test_saving_and_loading_keeps_the_thresholds(
    family: str, dtype: torch.dtype | str, make_routed_model: Callable, tmp_path: Path
) -> None:
    model = make_routed_model(family)
    model.bfloat16().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    for name, gate in gates(loaded).items():
        assert gate.threshold.dtype == torch.float32
        assert torch.equal(gate.threshold, gates(model)[name].threshold)
        assert gate.threshold_updates == gates(model)[name].threshold_updates == 10
        assert (gate.train().pending == 0).all()
    assert not any("pending" in name for name in loaded.state_dict())


def test_a_resumed_average_goes_on(make_model: Callable, make_tokens: Callable, tmp_path: Path) -> None:
    model = make_model("Llama").train()
    optimizer = frozen_sgd(model)
    for seed in range(3):
        training_step(model, make_tokens(2, 9, seed=seed), optimizer=optimizer)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    for one in (model, loaded):
        training_step(one, make_tokens(2, 9, seed=9), optimizer=frozen_sgd(one))
    assert_thresholds(loaded, {name: gate.threshold for name, gate in gates(model).items()}, updates=4)


def batches_of(make_tokens: Callable, padded: bool) -> list[dict[str, Tensor]]:
    batches = [{"input_ids": make_tokens(3, length, seed=length)} for length in (17, 8, 21)]
    for batch in batches if padded else []:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :5] = 0
        batch["attention_mask"][2, -3:] = 0
    return batches


@torch.no_grad()
def scores_of(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[T, E] each layer's scores of the real tokens, the layers below routing by expert choice."""
    scores: dict[str, list[Tensor]] = {name: [] for name in gates(model)}
    handles = [
        gate.register_forward_hook(lambda _m, _i, output, name=name: scores[name].append(output[1]))
        for name, gate in gates(model).items()
    ]
    with use_inference_routing(model, "expert_choice"):
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    real = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool() for batch in batches]
    return {
        name: torch.cat([score_TE[mask_T] for score_TE, mask_T in zip(each, real, strict=True)])
        for name, each in scores.items()
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_batches", [1, 3])
@pytest.mark.parametrize("factor", [0.3, 1.1, 4])
def test_calibration_is_the_exact_quantile(
    padded: bool, num_batches: int, factor: float, make_model: Callable, make_tokens: Callable
) -> None:
    model = make_model("Qwen3", capacity_factor=factor, router_score_function="sigmoid")
    batches = batches_of(make_tokens, padded)[:num_batches]
    scores = scores_of(model, batches)
    calibrate_thresholds(model, iter(batches))
    for name, gate in gates(model).items():
        num_tokens = len(scores[name])
        wanted = oracle.capacity(num_tokens, 4, factor)
        ranked = scores[name].sort(dim=0, descending=True).values
        refused = ranked[wanted] if wanted < num_tokens else torch.zeros(4)
        expected = (ranked[wanted - 1] + refused) / 2
        assert torch.equal(gate.threshold, expected), name
        assert ((scores[name] > gate.threshold).sum(0) == wanted).all()
        assert gate.threshold_updates == 10


@pytest.mark.parametrize("padded", [False, True])
def test_few_scores_are_kept_and_many_computed_again(
    padded: bool, make_model: Callable, make_tokens: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass or two, the same bits; and never more than what may be kept."""
    model = make_model("Llama")
    batches = batches_of(make_tokens, padded)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = []
    num_scores = 2 * 4 * sum(batch["input_ids"].numel() for batch in batches)
    for most, wanted in ((4 * num_scores, 1), (4 * num_scores - 1, 2)):
        monkeypatch.setattr(calibration_ecmoe, "_KEPT_BYTES", most)
        passes.clear()
        calibrate_thresholds(model, batches)
        assert len(passes) == wanted * len(batches)
        found.append([gate.threshold.clone() for gate in gates(model).values()])
    assert all(map(torch.equal, *found))


def test_the_config_says_where_the_thresholds_come_from(
    make_model: Callable, make_tokens: Callable, tmp_path: Path
) -> None:
    model = make_model("Llama")
    assert model.config.thresholds_from is None
    shown: list[int] = []

    def progress(batches: list) -> Iterator:
        for batch in batches:
            shown.append(1)
            yield batch

    batches = batches_of(make_tokens, padded=False)
    calibrate_thresholds(model, batches, progress=progress)
    assert model.config.thresholds_from == "text given to calibrate_thresholds" and len(shown) == len(batches)
    calibrate_thresholds(model, batches, text_name="letters of 1912")
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.thresholds_from == "letters of 1912"


def test_conversations_are_texts_of_the_chat_template(make_model: Callable) -> None:
    """As lists of messages, or rows of a dataset that hold them; without a template as plain text."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    model = make_model("Llama", vocab_size=300)

    def decoded(batches: object) -> list[str]:
        return [tokenizer.decode(row[row > 0]) for b in as_batches(model, batches, tokenizer) for row in b["input_ids"]]

    asked = "<user>Why?<assistant>Because."
    assert decoded(chat) == [asked]
    assert decoded([chat, "Plain."]) == [asked, "Plain."]
    assert decoded([{"messages": chat, "id": 3}] * 2) == [asked] * 2
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages }}"
    )
    assert "Be brief.\\n\\nWhy?" in decoded([[{"role": "system", "content": "Be brief."}, *chat]])[0]
    tokenizer.chat_template = "{{ raise_exception('it is Sunday') }}"
    with pytest.raises(ValueError, match="the chat template refuses a conversation: it is Sunday"):
        decoded([chat])
    tokenizer.chat_template = None
    assert decoded([chat]) == ["User: Why?\n\nAssistant: Because."]


@pytest.mark.parametrize(("family", "padded"), family_and([False, True], [True]))
def test_load_on_the_calibration_data(family: str, padded: bool, make_model: Callable, make_tokens: Callable) -> None:
    model = make_model(family, num_hidden_layers=3)
    batches = batches_of(make_tokens, padded)
    calibrate_thresholds(model, batches)
    with record_routing(model) as record, torch.no_grad():
        for batch in batches:
            model(**batch)
    num_tokens = sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in batches)
    assert set(record.tokens.values()) == {num_tokens}
    first, *later = record.chosen.values()
    share = 1.5 * num_tokens / 4
    if family not in PARALLEL:
        assert first.tolist() == [oracle.capacity(num_tokens, 4, 1.5)] * 4
    assert ((first / share - 1).abs() < 0.1).all()
    for chosen in later:  # their input differs, the layers below now routing by threshold
        assert abs(float(chosen.sum()) / (4 * share) - 1) < 0.25


@pytest.mark.parametrize("training", [False, True])
def test_calibration_leaves_the_model_as_it_was(training: bool, make_model: Callable, make_tokens: Callable) -> None:
    model = make_model("Llama").train(training)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    calibrate_thresholds(model, batches_of(make_tokens, padded=False))
    assert model.training == training
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert not any(gate._forward_hooks or gate.has_pending for gate in gates(model).values())
    assert all(block.routing_override is None for block in sparse_blocks(model).values())


def test_calibration_does_not_depend_on_the_thresholds_before(make_model: Callable, make_tokens: Callable) -> None:
    model = make_model("Llama")
    batches = batches_of(make_tokens, padded=True)
    calibrate_thresholds(model, batches)
    expected = {name: gate.threshold.clone() for name, gate in gates(model).items()}
    for gate in gates(model).values():
        gate.threshold.fill_(0.9)
    calibrate_thresholds(model, batches)
    assert all(torch.equal(gate.threshold, expected[name]) for name, gate in gates(model).items())


def test_calibration_refuses_what_it_cannot_do(make_model: Callable, make_tokens: Callable) -> None:
    with pytest.raises(ValueError, match="no batch and no text"):
        calibrate_thresholds(make_model("Llama"), [])
    with pytest.raises(ValueError, match="EcMoeLlamaForCausalLM has no expert-choice layer"):
        calibrate_thresholds(make_model("Llama", mlp_layer_types=["dense"] * 2), batches_of(make_tokens, padded=False))


@pytest.mark.parametrize("bounds", [{}, {"min_experts_per_token": 1, "max_experts_per_token": 3}], ids=["", "bounds"])
def test_calibration_says_what_is_wrong_with_its_input(
    bounds: dict[str, int], make_model: Callable, make_tokens: Callable
) -> None:
    """Weights that are no numbers, by the first layer that shows it, and padding alone; no threshold is changed."""
    model, ids = make_model("Llama", **bounds), make_tokens(2, 16)
    padding = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(ValueError, match=r"attention_mask of every batch is 0 .* tokens that are no padding"):
        calibrate_thresholds(model, [padding, padding])
    calibrate_thresholds(model, [padding, {"input_ids": ids}])
    before = {name: gate.threshold.clone() for name, gate in gates(model).items()}
    assert all((threshold > 0).all() for threshold in before.values())
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] = torch.nan
        model.model.layers[1].mlp.gate.weight[0, 0] = torch.nan
    for layer in (0, 1):
        with pytest.raises(ValueError, match=rf"router scores of model.layers.{layer}.mlp are no numbers: .* damaged"):
            calibrate_thresholds(model, [{"input_ids": ids}])
        model.model.layers[0].self_attn.o_proj.weight.data[0, 0] = 0
    assert all(torch.equal(gate.threshold, before[name]) for name, gate in gates(model).items())


@pytest.mark.parametrize(("family", "padded"), family_and([False, True], [True]))
def test_record_routing_counts_the_routes(
    family: str, padded: bool, make_routed_model: Callable, make_tokens: Callable
) -> None:
    model = make_routed_model(family)
    batches = batches_of(make_tokens, padded)
    with record_routing(model) as record, torch.no_grad():
        logits = [model(**batch, output_router_logits=True).router_logits for batch in batches]
    total_pairs = total_tokens = total_uncovered = 0
    loads = []
    for layer, (name, gate) in enumerate(gates(model).items()):
        chosen, tokens, uncovered = [0] * 4, 0, 0
        for batch, by_layer in zip(batches, logits, strict=True):
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten()
            for token, row in enumerate(by_layer[layer].softmax(-1)):
                if real[token]:
                    taken = [float(score) > float(level) for score, level in zip(row, gate.threshold, strict=True)]
                    chosen = [count + add for count, add in zip(chosen, taken, strict=True)]
                    tokens += 1
                    uncovered += not any(taken)
        assert record.chosen[name].tolist() == chosen
        assert record.tokens[name] == tokens
        assert record.uncovered[name] == uncovered
        loads.append([count / (tokens * 1.5 / 4) for count in chosen])
        total_pairs, total_tokens = total_pairs + sum(chosen), total_tokens + tokens
        total_uncovered += uncovered
    assert record.load() == [pytest.approx(layer) for layer in loads]
    assert record.summary() == pytest.approx(
        {
            "load_min": min(map(min, loads)),
            "load_max": max(map(max, loads)),
            "uncovered": total_uncovered / total_tokens,
            "experts_per_token": total_pairs / total_tokens,
        }
    )
    model(make_tokens(1, 4))
    assert sum(record.tokens.values()) == total_tokens  # closed: no longer counting


@pytest.mark.skipif(
    not is_accelerate_available("1.15.0"), reason="Accelerate before 1.15 refuses to put a whole model on the disk"
)
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_model_offloaded_to_disk(
    offload_buffers: bool, make_routed_model: Callable, make_tokens: Callable, tmp_path: Path
) -> None:
    """The same logits; thresholds can be set unless they are offloaded themselves, which is said in one line."""
    model, ids = make_routed_model("Qwen3"), make_tokens(2, 16)
    model.save_pretrained(tmp_path / "model")
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off", "offload_buffers": offload_buffers}
    offloaded = type(model).from_pretrained(tmp_path / "model", **options).eval()
    with torch.no_grad():
        torch.testing.assert_close(offloaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    if offload_buffers:
        with pytest.raises(ValueError, match="offload_buffers=False"):
            calibrate_thresholds(offloaded, [{"input_ids": ids}])
        return
    calibrate_thresholds(offloaded, [{"input_ids": ids}])
    calibrate_thresholds(model, [{"input_ids": ids}])
    for name, gate in gates(offloaded).items():
        torch.testing.assert_close(gate.threshold, gates(model)[name].threshold, atol=1e-6, rtol=1e-6)


def test_texts_are_as_batches_their_tokens(make_model: Callable) -> None:
    """Rows of the context's length at most, padded on the right, in pools of some four thousand tokens."""
    tokenizer = tiny_tokenizer()
    texts = ["A short one.", "A much longer text. " * 400, "The end."]
    model = make_model("Llama", vocab_size=300)
    by_text = copy.deepcopy(model)
    batches = as_batches(model, texts, tokenizer)
    ids = [batch["input_ids"][batch["attention_mask"].bool()] for batch in batches]
    assert torch.cat(ids).tolist() == [token for row in tokenizer(texts)["input_ids"] for token in row]
    assert max(batch["input_ids"].shape[1] for batch in batches) == 128 and len(batches) == 2  # max_position_embeddings
    calibrate_thresholds(model, batches)
    calibrate_thresholds(by_text, texts, tokenizer)
    for one, two in zip(sparse_blocks(model).values(), sparse_blocks(by_text).values(), strict=True):
        assert torch.equal(one.gate.threshold, two.gate.threshold) and one.gate.threshold.any()
    assert routing_report(model, texts, tokenizer) == routing_report(by_text, batches)
    assert len(as_batches(model, "a lone text", tokenizer)) == 1
    for wrong, message in (
        ((texts,), "texts are given; give their tokenizer too"),
        ((batches, tokenizer), "tokenizer is for texts"),
        (([*texts, *batches], tokenizer), "must all be texts, or all mappings"),
        (([ids],), "must all be texts, or all mappings"),
        ((["", ""], tokenizer), "not a single token"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate_thresholds(model, *wrong)


def test_one_batch_by_itself_and_lists_of_numbers(make_model: Callable) -> None:
    """What a tokenizer returns is a batch, whatever it is made of, and never a list of texts."""
    tokenizer = tiny_tokenizer()
    texts = ["A short one.", "A much longer text, with more words."]
    model = make_model("Llama", vocab_size=300)
    wanted = tokenizer(texts, return_tensors="pt", padding=True)
    calibrate_thresholds(model, [wanted])
    expected = [block.gate.threshold.clone() for block in sparse_blocks(model).values()]
    for batches in (wanted, dict(wanted), [tokenizer(texts, padding=True)], iter([wanted])):
        for block in sparse_blocks(model).values():
            block.gate.threshold.zero_()
        calibrate_thresholds(model, batches)
        assert all(map(torch.equal, expected, (block.gate.threshold for block in sparse_blocks(model).values())))
    for wrong, message in (
        ((wanted, tokenizer), "tokenizer is for texts"),
        (([{"text": "a"}], tokenizer), r'one is text; of a dataset give its column of text, such as dataset\["text"\]'),
        (([], tokenizer), "there is no batch and no text"),
        ((texts, "a name"), "tokenizer='a name': texts are given"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate_thresholds(model, *wrong)


def test_a_long_text_among_short_ones_fills_no_memory(make_model: Callable) -> None:
    model = make_model("Llama", vocab_size=300, max_position_embeddings=512)
    batches = as_batches(model, ["Hi."] * 300 + ["A much longer text. " * 100] + ["Hi."] * 300, tiny_tokenizer())
    assert max(batch["input_ids"].numel() for batch in batches) <= 4096


@pytest.mark.parametrize("bounds", [(0, None), (1, None), (1, 2)])
@pytest.mark.parametrize("keeps_scores", [True, False])
def test_a_threshold_lies_on_no_score(
    bounds: tuple[int, int | None], keeps_scores: bool, make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where equal tokens have equal scores, as in the first layer of GPT-NeoX, a frequent one may be at the border; a
    rounding error, of another batch for one, must not decide whether it has the expert."""
    if not keeps_scores:
        monkeypatch.setattr(calibration_ecmoe, "_KEPT_BYTES", 0)
    least, most = bounds
    model = make_model("GPTNeoX", min_experts_per_token=least, max_experts_per_token=most).eval()
    ids = torch.randint(3, 90, (8, 64), generator=torch.Generator().manual_seed(0))
    ids[:, ::2] = 7  # half of all tokens
    calibrate_thresholds(model, [{"input_ids": ids}])
    gate = next(iter(gates(model).values()))
    scores: list[Tensor] = []
    handle = gate.register_forward_hook(lambda _m, _i, output: scores.append(output[1]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    distance_TE = (scores[0] - gate.threshold).abs()
    assert (distance_TE.min(0).values > 1e-5 * gate.threshold.abs()).all()
    assert (scores[0][ids.flatten() == 7].std(0) < 1e-6).all()


def test_between_two_scores_and_above_one() -> None:
    found = between(torch.tensor([0.5, 0.5, 0.5, 0.0]), torch.tensor([0.3, 0.5, 0.5 - 3e-8, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.4, 0.50005, 0.50005, 0.0]), rtol=0, atol=1e-7)
