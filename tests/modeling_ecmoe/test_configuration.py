"""Configurations: wrong values are refused by name, unknown words of dense checkpoints pass, files round-trip."""

from collections.abc import Callable
from pathlib import Path

import pytest
from families import CORE, MODEL_TYPES
from transformers import AutoConfig

import modeling_ecmoe

WRONG = [
    ("num_experts", 0, {}),
    ("num_experts", -3, {}),
    ("capacity_factor", 0, {}),
    ("capacity_factor", -1.0, {}),
    ("capacity_factor", 4.5, {}),
    ("min_experts_per_token", -1, {}),
    ("min_experts_per_token", 5, {}),
    ("max_experts_per_token", 0, {}),
    ("max_experts_per_token", 5, {}),
    ("max_experts_per_token", 1, {"min_experts_per_token": 2}),
    ("threshold_decay", 1.0, {}),
    ("threshold_decay", -0.1, {}),
    ("moe_intermediate_size", 0, {}),
    ("shared_expert_intermediate_size", -1, {}),
    ("shared_expert_weighting", "complement", {"shared_expert_intermediate_size": 0}),
    ("mlp_layer_types", ["sparse"], {}),
    ("mlp_layer_types", ["sparse", "moe"], {}),
]
TOKEN_CHOICE = {"routing": "token_choice", "inference_routing": "token_choice", "capacity_factor": 1}
WRONG += [
    ("inference_routing", "token_choice", {}),
    ("inference_routing", "threshold", TOKEN_CHOICE | {"inference_routing": "threshold"}),
    ("inference_routing", "expert_choice", TOKEN_CHOICE | {"inference_routing": "expert_choice"}),
    ("routing", "token_choice", {"capacity_factor": 1}),
    ("routing", "threshold", {"inference_routing": "token_choice"}),
    ("capacity_factor", 1.5, TOKEN_CHOICE | {"capacity_factor": 1.5}),
    ("capacity_factor", 2.5, {"max_experts_per_token": 2}),
    ("capacity_factor", 0.5, {"min_experts_per_token": 1}),
    ("min_experts_per_token", 1, {"routing": "threshold"}),
    ("max_experts_per_token", 2, {"routing": "threshold"}),
    ("min_experts_per_token", 1, TOKEN_CHOICE),
    ("max_experts_per_token", 2, TOKEN_CHOICE),
    ("routing_pool", "sequence", {"routing": "threshold"}),
    ("routing_pool", "global", {"routing": "threshold"}),
    ("threshold_capacity_clamp", -0.1, {}),
    ("threshold_capacity_clamp", 1.5, {}),
    ("router_jitter_noise", -0.1, {}),
    ("router_jitter_noise", 1.5, {}),
    ("threshold_after_steps", -1, {}),
    ("router_z_loss_coef", -0.1, {}),
    ("router_aux_loss_coef", -0.1, TOKEN_CHOICE),
    ("router_aux_loss_coef", 0.1, {}),
    ("router_aux_loss_coef", 0.1, {"routing": "threshold"}),
    ("token_choice_capacity_factor", 0, TOKEN_CHOICE),
    ("token_choice_capacity_factor", -1.0, TOKEN_CHOICE),
]
WRONG_KINDS = [
    ("num_experts", "8"),
    ("num_experts", 2.5),
    ("capacity_factor", "1.0"),
    ("routing", "tokens_choose"),
    ("inference_routing", "top_k"),
    ("routing_pool", "world"),
    ("router_score_function", "tanh"),
    ("shared_expert_weighting", "half"),
    ("normalize_combine_weights", "yes"),
    ("max_experts_per_token", 1.5),
    ("mlp_layer_types", "sparse"),
    ("threshold_decay", None),
]
MISSPELLED = [
    ("capacity_factors", "capacity_factor"),
    ("capacity_facter", "capacity_factor"),
    ("num_expert", "num_experts"),
    ("max_expert_per_token", "max_experts_per_token"),
    ("router_score_fn_function", "router_score_function"),
    ("inference_route", "inference_routing"),
    ("normalise_combine_weights", "normalize_combine_weights"),
    ("threshold_decays", "threshold_decay"),
    ("shared_expert_weights", "shared_expert_weighting"),
    ("moe_intermediate_sizes", "moe_intermediate_size"),
]


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize(("field", "value", "others"), WRONG)
def test_wrong_values_are_refused_by_name(
    family: str, field: str, value: object, others: dict, make_config: Callable
) -> None:
    with pytest.raises(Exception, match=field) as error:
        make_config(family, **others | {field: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize(
    "fields",
    [
        TOKEN_CHOICE | {"router_aux_loss_coef": 0.01, "token_choice_capacity_factor": 1.25},
        {"routing": "threshold", "threshold_after_steps": 100, "threshold_capacity_clamp": 1},
        {"min_experts_per_token": 2, "max_experts_per_token": 2, "capacity_factor": 2},
        {"max_experts_per_token": 2, "routing_pool": "global", "router_z_loss_coef": 0.001},
    ],
)
def test_right_combinations_round_trip(family: str, fields: dict, make_config: Callable, tmp_path: Path) -> None:
    make_config(family, **fields).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {field: getattr(loaded, field) for field in fields} == fields


@pytest.mark.parametrize(("field", "value"), WRONG_KINDS)
def test_wrong_kinds_are_refused_by_name(field: str, value: object, make_config: Callable) -> None:
    with pytest.raises(Exception, match=field):
        make_config("Llama", **{field: value})


@pytest.mark.parametrize(("written", "meant"), MISSPELLED)
def test_misspelled_fields_are_refused_with_the_nearest(written: str, meant: str, make_config: Callable) -> None:
    with pytest.raises(ValueError, match=f"{written}=1.*did you mean {meant}"):
        make_config("Qwen3", **{written: 1})


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize(
    "carried",
    [
        {"pretraining_tp": 1},
        {"torch_dtype": "bfloat16"},
        {"num_local_experts": 8},
        {"output_hidden_states": True},
        {"quantization_bits": 4},
        {"my_own_note": "kept"},
    ],
)
def test_unknown_attributes_are_carried_along(family: str, carried: dict, make_config: Callable) -> None:
    (name,) = carried
    if name in modeling_ecmoe.config_class(MODEL_TYPES[family]).attribute_map:
        pytest.skip("another name of a field that the family has")
    config = make_config(family, **carried)
    if name != "torch_dtype":
        assert getattr(config, name) == carried[name]
        assert getattr(type(config).from_dict(config.to_dict()), name) == carried[name]


def test_biases_are_those_of_the_dense_ffn(make_config: Callable) -> None:
    assert not make_config("Llama").ffn_has_bias
    assert make_config("Llama", mlp_bias=True).ffn_has_bias
    assert not make_config("Qwen3", mlp_bias=True).ffn_has_bias  # a word that the dense family does not know
    assert not make_config("Starcoder2", use_bias=False).ffn_has_bias
    assert make_config("GPTNeoX").ffn_has_bias


def test_the_block_drops_what_the_dense_ffn_drops(make_model: Callable) -> None:
    """StarCoder-2 reads `residual_dropout`; in a file of another family it is a word that nothing reads."""
    for family, dropped in (("Starcoder2", 0.25), ("Llama", 0.0)):
        fields = {"residual_dropout": 0.25, "shared_expert_intermediate_size": 8}
        block = make_model(family, **fields).base_model.layers[0].mlp
        assert block.dropout.p == dropped
        assert getattr(block.shared_expert, "residual_dropout", 0.0) == 0.0  # not a second time
    assert make_model("Qwen3", residual_dropout=None).base_model.layers[0].mlp.dropout.p == 0.0


@pytest.mark.parametrize("name", ["Gemma2", "Gemma3Text"])
def test_gemma_s_activation_is_its_own_whatever_else_a_file_says(name: str, make_config: Callable) -> None:
    """The dense classes read `hidden_activation`; files hold `hidden_act` beside it, not always the same."""
    config = make_config(name, hidden_act="gelu", hidden_activation="gelu_pytorch_tanh")
    assert config.hidden_act == config.hidden_activation == "gelu_pytorch_tanh"
    assert type(config).from_dict(config.to_dict()).hidden_act == "gelu_pytorch_tanh"


def test_derived_defaults(family: str, make_config: Callable) -> None:
    config = make_config(family)
    assert config.moe_intermediate_size == config.intermediate_size == 48
    assert config.mlp_layer_types == ["sparse", "sparse"]
    assert config.model_type == f"ecmoe_{MODEL_TYPES[family]}"
    assert config.inference_routing == "threshold"


CHANGED = {
    "num_experts": 6,
    "moe_intermediate_size": 24,
    "capacity_factor": 1.25,
    "mlp_layer_types": ["dense", "sparse"],
    "routing_pool": "sequence",
    "inference_routing": "expert_choice",
    "router_score_function": "sigmoid",
    "normalize_combine_weights": True,
    "min_experts_per_token": 1,
    "max_experts_per_token": 3,
    "shared_expert_intermediate_size": 16,
    "shared_expert_weighting": "complement",
    "threshold_decay": 0.9,
    "output_router_logits": True,
}


def test_round_trip_keeps_every_field(family: str, make_config: Callable, tmp_path: Path) -> None:
    config = make_config(family, **CHANGED)
    again = type(config).from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    for one in (again, loaded):
        assert {field: getattr(one, field) for field in CHANGED} == CHANGED


def test_saved_file_names_the_model_type(family: str, make_config: Callable, tmp_path: Path) -> None:
    make_config(family).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert f'"model_type": "ecmoe_{MODEL_TYPES[family]}"' in text


@pytest.mark.parametrize("field", ["num_experts", "capacity_factor"])
def test_values_changed_later_are_validated_when_loaded(field: str, make_config: Callable) -> None:
    values = make_config("Llama").to_dict() | {field: 0}
    with pytest.raises(Exception, match=field):
        type(make_config("Llama")).from_dict(values)
