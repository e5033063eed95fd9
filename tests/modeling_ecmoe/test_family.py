"""The classes as Transformers sees them: saving, Auto classes, outputs, precision, device maps, pipelines, adapters."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from checkpointing import recompute_layers
from families import CORE, FAMILIES, MIXED, SCALED_RESIDUALS, SHARED_KEYS, STATEFUL, family_and
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import modeling_ecmoe
from modeling_ecmoe.block_ecmoe import EcMoeBlock
from modeling_ecmoe.calibration_ecmoe import sparse_blocks
from modeling_ecmoe.configuration_ecmoe import AUTO_CLASSES

HEADS = {
    "AutoModel": ("Model", ()),
    "AutoModelForCausalLM": ("ForCausalLM", ()),
    "AutoModelForSequenceClassification": ("ForSequenceClassification", ("score.weight",)),
    "AutoModelForTokenClassification": ("ForTokenClassification", ("score.weight", "score.bias")),
    "AutoModelForQuestionAnswering": ("ForQuestionAnswering", ("qa_outputs.weight", "qa_outputs.bias")),
}
VARIANTS = {
    "plain": {},
    "shared": {"shared_expert_intermediate_size": 24, "shared_expert_weighting": "complement"},
    "some dense": {"mlp_layer_types": ["dense", "sparse", "dense"], "num_hidden_layers": 3},
    "tied": {"tie_word_embeddings": True},
    "narrow experts": {"moe_intermediate_size": 16, "max_experts_per_token": 2},
}


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the last bits, which move with the memory layout of loaded weights."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "variant"), family_and(VARIANTS, ["shared", "some dense"]))
def test_saved_and_loaded_model_is_equal(
    family: str, variant: str, make_routed_model: Callable, make_tokens: Callable, tmp_path: Path
) -> None:
    model = make_routed_model(family, **VARIANTS[variant])
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = make_tokens(2, 9)
    assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    for block in sparse_blocks(loaded).values():
        for stack in block.experts.parameters():
            if stack.dim() > 1:  # or it is of an activation that learns, which they share
                assert len({tuple(expert.flatten().tolist()) for expert in stack}) == 4
    assert not list(tmp_path.glob("*.bin"))


GATED = {"experts.gate_up_proj": [4, 96, 32], "experts.down_proj": [4, 32, 48]}
GATED |= {"experts.gate_up_proj_bias": [4, 96], "experts.down_proj_bias": [4, 32]}
UNGATED = {"experts.up_proj": [4, 48, 32], "experts.down_proj": [4, 32, 48]}
UNGATED |= {"experts.up_proj_bias": [4, 48], "experts.down_proj_bias": [4, 32]}


def test_saved_names_and_shapes(family: str, make_model: Callable, make_config: Callable, tmp_path: Path) -> None:
    from safetensors import safe_open

    make_model(family).save_pretrained(tmp_path)
    config = make_config(family)
    wanted = GATED if config.dense_ffn.has_gate else UNGATED
    wanted = {name: shape for name, shape in wanted.items() if not name.endswith("_bias") or config.ffn_has_bias}
    multiple = config.ffn_width_multiple(1)
    wanted = {name: [multiple * n if n in (48, 96) else n for n in shape] for name, shape in wanted.items()}
    if config.hidden_act == "xielu":  # which the experts of a layer share
        wanted |= {"experts.act_fn.alpha_p": [1], "experts.act_fn.alpha_n": [1]}
        wanted |= {"experts.act_fn.beta": [], "experts.act_fn.eps": []}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys() if ".1.mlp." in key}  # noqa: SIM118
    assert {key.partition(".1.mlp.")[2]: shape for key, shape in shapes.items()} == {
        "gate.weight": [4, 32],
        "gate.threshold": [4],
        "gate.threshold_updates": [],
    } | wanted


@pytest.mark.parametrize(("family", "auto_class"), family_and(HEADS, ["AutoModelForQuestionAnswering"]))
def test_every_auto_class_loads_a_language_model_folder(
    family: str, auto_class: str, make_routed_model: Callable, make_tokens: Callable, tmp_path: Path
) -> None:
    model = make_routed_model(family)
    model.save_pretrained(tmp_path)
    suffix, head = HEADS[auto_class]
    loaded, info = getattr(transformers, auto_class).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is getattr(modeling_ecmoe, f"EcMoe{family}{suffix}")
    assert set(info["missing_keys"]) == set(head)
    assert set(info["unexpected_keys"]) <= {"lm_head.weight", "lm_head.bias"}
    ids = make_tokens(2, 9)
    hidden = loaded(ids, output_hidden_states=True).hidden_states[-1]
    assert_close(hidden, model(ids, output_hidden_states=True).hidden_states[-1])


@pytest.mark.parametrize("auto_class", [name for name, (_, head) in HEADS.items() if head])
def test_every_head_trains_and_its_thresholds_follow(
    family: str, auto_class: str, make_model: Callable, make_tokens: Callable
) -> None:
    model = make_model(family, head=HEADS[auto_class][0], num_labels=3).train()
    targets = {
        "AutoModelForSequenceClassification": {"labels": torch.tensor([0, 2])},
        "AutoModelForTokenClassification": {"labels": torch.randint(0, 3, (2, 9))},
        "AutoModelForQuestionAnswering": {
            "start_positions": torch.tensor([1, 2]),
            "end_positions": torch.tensor([3, 4]),
        },
    }[auto_class]
    model(make_tokens(2, 9), **targets).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(block.gate.threshold_updates == 1 for block in sparse_blocks(model).values())


def test_router_logits_are_returned_when_asked_for(family: str, make_model: Callable, make_tokens: Callable) -> None:
    model = make_model(family, num_hidden_layers=3, mlp_layer_types=["sparse", "dense", "sparse"])
    ids = make_tokens(2, 9)
    assert model(ids).router_logits is None
    for output in (model(ids, output_router_logits=True), model.base_model(ids, output_router_logits=True)):
        assert [logits.shape for logits in output.router_logits] == [(18, 4), (18, 4)]
        assert all(logits.dtype == torch.float32 for logits in output.router_logits)
    model.config.output_router_logits = True
    assert len(model(ids).router_logits) == 2
    layers = model.config.dense_ffn.layers_of(model)
    assert isinstance(layers[0].mlp, EcMoeBlock)
    assert not isinstance(getattr(layers[1], "mlp", None), EcMoeBlock)


def test_other_outputs(family: str, make_model: Callable, make_tokens: Callable) -> None:
    model = make_model(family)
    model.set_attn_implementation("eager")
    output = model(make_tokens(2, 9), output_hidden_states=True, output_attentions=True, logits_to_keep=2)
    assert [hidden.shape for hidden in output.hidden_states[:-1]] == [(2, 9, 32)] * 2
    assert output.hidden_states[-1].shape == (2, 9, model.lm_head.in_features)
    num_attentions = 2 - len(STATEFUL.get(family, []))
    assert [attention.shape for attention in output.attentions] == [(2, 4, 9, 9)] * num_attentions
    assert output.logits.shape == (2, 2, 128)


def test_tuples_instead_of_dictionaries(family: str, make_model: Callable, make_tokens: Callable) -> None:
    model = make_model(family)
    ids = make_tokens(2, 9)
    output = model(ids, labels=ids, output_router_logits=True)
    as_tuple = model(ids, labels=ids, output_router_logits=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
    assert torch.equal(as_tuple[-1][1], output.router_logits[1])
    base = model.base_model(ids, return_dict=False)
    assert isinstance(base, tuple)
    assert torch.equal(base[0], model.base_model(ids).last_hidden_state)


def test_loss_is_the_next_token_cross_entropy(family: str, make_model: Callable, make_tokens: Callable) -> None:
    model = make_model(family)
    ids = make_tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(output.loss, expected)


def test_inputs_embeds_give_the_logits_of_input_ids(
    family: str, make_routed_model: Callable, make_tokens: Callable
) -> None:
    model = make_routed_model(family)
    ids = make_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(
        model(inputs_embeds=embeds, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "checkpointing"), family_and([None, False, True], [None, True]))
def test_padded_training_batch_gives_each_sequence_what_it_gets_alone(
    family: str, side: str, checkpointing: bool | None, make_model: Callable, make_tokens: Callable
) -> None:
    """With the sequence as pool: same logits at the real tokens, and gradients that add up."""
    padded, alone = (make_model(family, routing_pool="sequence").train() for _ in range(2))
    if checkpointing is not None:
        recompute_layers(padded, use_reentrant=checkpointing)
    lengths = (5, 9)
    ids = make_tokens(2, 9)
    mask = torch.stack([torch.arange(9) >= 9 - n if side == "left" else torch.arange(9) < n for n in lengths])
    if checkpointing and family in SHARED_KEYS:
        with pytest.raises(ValueError, match="use_reentrant=True: num_kv_shared_layers=1 "):
            padded(ids, attention_mask=mask.long())
        return
    position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = padded(ids, attention_mask=mask.long(), position_ids=position_ids).logits
    logits[mask].square().sum().backward()
    for row in range(2):
        single = alone(ids[row, mask[row]][None]).logits[0]
        torch.testing.assert_close(logits[row, mask[row]], single, atol=1e-4, rtol=1e-4)
        single.square().sum().backward()
    for (name, found), wanted in zip(padded.named_parameters(), alone.parameters(), strict=True):
        scale = wanted.grad.abs().max()
        # A bias of keys without rotary positions changes nothing, and its gradient is rounding.
        assert (found.grad - wanted.grad).abs().max() <= 1e-4 * scale + 1e-5, name


def test_bfloat16_trains(family: str, make_model: Callable, make_tokens: Callable) -> None:
    model = make_model(family, shared_expert_intermediate_size=16).bfloat16()
    ids = make_tokens(2, 9)
    for training in (True, False):
        output = model.train(training)(ids, labels=ids, output_router_logits=True)
        assert output.logits.dtype == torch.bfloat16
        assert output.router_logits[0].dtype == torch.float32
        output.loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.dtype == torch.bfloat16 and torch.isfinite(parameter.grad).all(), name
        model.zero_grad()


@pytest.mark.parametrize(("family", "training"), family_and([True, False], [True]))
def test_autocast_runs_and_routes_in_float32(
    family: str, training: bool, make_model: Callable, make_tokens: Callable
) -> None:
    model = make_model(family).train(training)
    ids = make_tokens(2, 9)
    full = model(ids, output_router_logits=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids, output_router_logits=True)
    assert all(logits.dtype == torch.float32 for logits in output.router_logits)
    output.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert (output.logits.float() - full.logits).abs().mean() < 0.2 * full.logits.abs().mean()


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"])
def test_device_maps(
    family: str, device_map: str | dict, make_routed_model: Callable, make_tokens: Callable, tmp_path: Path
) -> None:
    model = make_routed_model(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path, device_map=device_map)
    ids = make_tokens(2, 9)
    device = next(loaded.parameters()).device
    torch.testing.assert_close(loaded(ids.to(device)).logits.cpu(), model(ids).logits, atol=1e-4, rtol=1e-4)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, 128))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def test_text_generation_pipeline(family: str, make_routed_model: Callable, tmp_path: Path) -> None:
    make_routed_model(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    prompts = ["w9 w10 w11", "w20 w21 w22 w23 w24 w25"]
    choices = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_full_text": False}
    alone = [pipe(prompt, **choices)[0]["generated_text"] for prompt in prompts]
    together = [found[0]["generated_text"] for found in pipe(prompts, batch_size=2, **choices)]
    assert together == alone
    assert all(text.split() for text in alone)


def test_resized_embeddings(family: str, make_routed_model: Callable, make_tokens: Callable, tmp_path: Path) -> None:
    model = make_routed_model(family)
    ids = make_tokens(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(140)
    assert model.config.vocab_size == 140
    after = model(ids, labels=ids)
    assert after.logits.shape[-1] == 140
    torch.testing.assert_close(after.logits[..., :128], before)
    model.save_pretrained(tmp_path)
    assert_close(type(model).from_pretrained(tmp_path)(ids).logits, after.logits)


def test_tied_embeddings(family: str, make_model: Callable, make_tokens: Callable, tmp_path: Path) -> None:
    model = make_model(family, tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert_close(loaded(make_tokens(1, 5)).logits, model(make_tokens(1, 5)).logits)
    untied = make_model(family, tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


def test_initialisation_is_seeded_and_complete(family: str, make_model: Callable) -> None:
    first, second, other = (make_model(family, seed=seed) for seed in (3, 3, 4))
    for (name, one), two, three in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.isfinite(one).all() and torch.equal(one, two), name
        if one.dim() > 1 and "bias" not in name and "norm" not in name:
            assert not torch.equal(one, three), name
            is_scaled = family in SCALED_RESIDUALS and name.endswith(("attn.c_proj.weight", "attn.o_proj.weight"))
            assert one.std().item() == pytest.approx(0.1 if is_scaled else 0.2, rel=0.25), name


def test_lora_on_the_experts_trains_and_reloads(
    make_routed_model: Callable, make_tokens: Callable, tmp_path: Path
) -> None:
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ids = make_tokens(4, 12)
    base = make_routed_model("Qwen3")
    before = base(ids).logits.detach()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_parameters=targets, target_modules=[]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".mlp.experts." in name and "lora_" in name for name in trained)
    torch.testing.assert_close(model(ids).logits, before)
    losses = train(model, ids)
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    after = model(ids).logits
    assert (after - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    # The thresholds moved with the training; an adapter file holds its own tensors alone.
    fresh = make_routed_model("Qwen3")
    fresh.load_state_dict(thresholds(model), strict=False)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, after)
    torch.testing.assert_close(again.merge_and_unload()(ids).logits, after, atol=1e-4, rtol=1e-4)


def train(model: torch.nn.Module, ids: Tensor, steps: int = 12) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def thresholds(model: torch.nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {
        name.removeprefix("base_model.model."): tensor for name, tensor in state.items() if "gate.threshold" in name
    }


def test_training_lowers_the_loss_in_both_routings(family: str, make_model: Callable, make_tokens: Callable) -> None:
    model = make_model(family, threshold_decay=0.8)
    ids = make_tokens(4, 12)
    before = model(ids, labels=ids).loss.item()
    losses = train(model, ids, steps=15)
    assert losses[-1] < 0.7 * losses[0]
    assert model.eval()(ids, labels=ids).loss.item() < 0.8 * before


def test_public_names() -> None:
    installed = [name for name in FAMILIES | MIXED if hasattr(transformers, f"{name}Config")]
    assert len(modeling_ecmoe.families()) == len(installed) > 50
    for dense in modeling_ecmoe.families():
        for auto_class in AUTO_CLASSES:
            model_class = modeling_ecmoe.model_class(dense, auto_class)
            assert getattr(modeling_ecmoe, model_class.__name__) is model_class
            assert model_class.__name__ in modeling_ecmoe.__all__
    with pytest.raises(AttributeError, match="EcMoeQwen3ForEverything"):
        modeling_ecmoe.EcMoeQwen3ForEverything  # noqa: B018
    for name in ("calibrate_thresholds", "record_routing", "use_inference_routing", "RoutingRecord"):
        assert hasattr(modeling_ecmoe, name)
