"""The plain Transformers classes that an expert-choice checkpoint can leave as, and what each has room for.

All route by top-k: Mixtral, Qwen2-MoE and Qwen3-MoE weight the k experts of the highest router logits by a softmax,
GLM-4-MoE takes the k highest sigmoid scores plus a bias and weights by the scores. Known to conversions too, which say
what they close.
"""

import contextlib
import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    Glm4MoeConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.activations import ACT2FN

from .errors import ConversionError

# Of a class that has a shared expert where the source has none: it adds nothing, so the width matters little; kernels
# and quantisers want a round one.
EMPTY_WIDTH = 64
# What the dense families and the plain classes call by the same name and mean the same by.
_COMMON = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
_COMMON += ["num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"]
_COMMON += ["tie_word_embeddings", "rope_parameters", "attention_dropout"]
_COMMON += ["pad_token_id", "bos_token_id", "eos_token_id"]
_GRANITE = ["attention_bias", "embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"]


@dataclass(frozen=True)
class Target:
    """A plain class, and the names that its checkpoints have on disk, which are not those in memory.

    block: the module of a layer that holds router and experts.
    router: the router in the block.
    matrices: the names of an expert's gate_proj, up_proj and down_proj; where there are two, all experts are stacked,
        gate_proj before up_proj.
    shared_expert: the name of its shared expert in the layer, "" where it has none; its matrices are as the experts'
        where these are stacked.
    has_gated_shared: whether the shared expert is weighted by the sigmoid of a learned score.
    any_weights: whether the softmax weights of the k experts may stay as they are, not divided by their sum.
    by_score: whether it routes by biased sigmoid scores, which can express thresholds.
    """

    title: str
    config_class: type[PreTrainedConfig]
    block: str = "mlp"
    router: str = "gate"
    matrices: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    shared_expert: str = ""
    has_gated_shared: bool = False
    any_weights: bool = True
    by_score: bool = False

    @property
    def is_stacked(self) -> bool:
        """Whether all experts of a layer are one tensor."""
        return len(self.matrices) == 2

    @property
    def architecture(self) -> str:
        return self.config_class.__name__.removesuffix("Config") + "ForCausalLM"


MIXTRAL = Target("Mixtral", MixtralConfig, "block_sparse_moe", matrices=("w1", "w3", "w2"), any_weights=False)
QWEN2_MOE = Target("Qwen2-MoE", Qwen2MoeConfig, shared_expert="mlp.shared_expert", has_gated_shared=True)
QWEN3_MOE = Target("Qwen3-MoE", Qwen3MoeConfig)
GLM4_MOE = Target("GLM-4-MoE", Glm4MoeConfig, shared_expert="mlp.shared_experts", by_score=True)
DEEPSEEK_V3 = replace(GLM4_MOE, title="DeepSeek-V3", config_class=DeepseekV3Config)
OLMOE = Target("OLMoE", OlmoeConfig)
GRANITE_MOE = Target(
    "GraniteMoE",
    GraniteMoeConfig,
    "block_sparse_moe",
    "router.layer",
    matrices=("input_linear", "output_linear"),
    any_weights=False,
)
GRANITE_MOE_SHARED = replace(
    GRANITE_MOE, title="GraniteMoE-Shared", config_class=GraniteMoeSharedConfig, shared_expert="shared_mlp"
)

# --to -> the class for each family whose attention and norms it computes.
DESTINATIONS = {
    "token-choice": {
        "ecmoe_llama": MIXTRAL,
        "ecmoe_mistral": MIXTRAL,
        "ecmoe_qwen2": QWEN2_MOE,
        "ecmoe_qwen3": QWEN3_MOE,
        "ecmoe_granite": GRANITE_MOE,
        "ecmoe_olmoe": OLMOE,
        "ecmoe_glm4_moe": GLM4_MOE,
        "ecmoe_deepseek_v3": DEEPSEEK_V3,
    },
    "glm4-moe": dict.fromkeys(("ecmoe_llama", "ecmoe_mistral", "ecmoe_qwen2", "ecmoe_qwen3"), GLM4_MOE),
}


# The families whose dense class is a mixture itself: they leave as that class.
OWN_CLASS = {"ecmoe_olmoe", "ecmoe_glm4_moe", "ecmoe_deepseek_v3"}


def target_of(config: Any, to: str) -> Target:
    """The class that a source of this config leaves as.

    Raises:
        ConversionError: when there is none that computes what the source computes outside its experts.
    """
    if to not in DESTINATIONS:
        raise ConversionError(f"to={to} is unknown; choose {' or '.join(DESTINATIONS)}")
    target = DESTINATIONS[to].get(config.model_type)
    if target is None:
        raise ConversionError(
            f"model_type={config.model_type}: no plain class that --to {to} writes computes its attention, norms and "
            f"FFNs; {', '.join(DESTINATIONS[to])} can leave, keep this one as it is"
        )
    if target is GRANITE_MOE and config.shared_expert_intermediate_size:
        target = GRANITE_MOE_SHARED
    if target is MIXTRAL and _dense_layers(config):
        target = QWEN2_MOE  # without biases its attention is the same, and it may have dense layers
    for reason in _obstacles(config, target):
        raise ConversionError(f"{reason}; keep this checkpoint as it is")
    return target


def ways_out(config: Any) -> dict[str, str]:
    """Which --to a model of this config can take, and the title of the class that it leaves as."""
    found = {}
    for to in DESTINATIONS:
        with contextlib.suppress(ConversionError):
            found[to] = target_of(config, to).title
    return found


def _obstacles(config: Any, target: Target) -> list[str]:
    """Why a class cannot hold what this config asks for."""
    found = []
    kind = config.model_type
    is_granite = target in (GRANITE_MOE, GRANITE_MOE_SHARED)
    is_own = kind in OWN_CLASS
    if getattr(config, "attention_bias", False) and target is not QWEN3_MOE and not is_granite and not is_own:
        found.append(f"attention_bias=True: {target.title} has no bias in the attention's output projection")
    if config.ffn_has_bias:
        found.append(f"the FFNs have biases, and experts of {target.title} have none")
    if any(True for _ in ACT2FN[config.hidden_act].parameters()):
        found.append(f"hidden_act={config.hidden_act} learns, and Transformers would load {target.title} without it")
    dense = _dense_layers(config)
    if config.shared_expert_weighting == "gate" and not target.has_gated_shared:
        found.append(f"shared_expert_weighting=gate: {target.title} has no gate on a shared expert")
    if dense and is_granite:
        found.append(
            f"mlp_layer_types has dense layers ({_listed(dense)}), and every layer of {target.title} has experts"
        )
    if dense and target.by_score and dense != list(range(len(dense))):
        found.append(f"mlp_layer_types has dense layers ({_listed(dense)}), and those of {target.title} come first")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = _window(config)
    if target.by_score and (len(layer_types) > 1 or (window and window < config.max_position_embeddings)):
        found.append(f"sliding_window={config.sliding_window}: {target.title} attends to everything")
    if target is QWEN3_MOE and len(layer_types) > 1:
        found.append("layer_types has full and sliding attention, and all layers of Qwen3-MoE have the same")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if target is QWEN2_MOE and head_dim * config.num_attention_heads != config.hidden_size:
        found.append(f"head_dim={head_dim}: the heads of Qwen2-MoE are hidden_size / num_attention_heads wide")
    if target.by_score and config.router_score_function != "sigmoid":
        found.append(
            f"router_score_function={config.router_score_function} of {kind}: {target.title} scores by sigmoid"
        )
    if target.by_score and config.routing == "token_choice" and config.token_choice_bias_update_rate is None:
        found.append("routing=token_choice has no thresholds to carry over")
    if target.by_score and config.normalize_combine_weights and not is_own and config.routing != "token_choice":
        found.append(f"normalize_combine_weights=True: idle experts of {target.title} would count among the weights")
    return found


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


def _dense_layers(config: Any) -> list[int]:
    return [layer for layer, kind in enumerate(config.mlp_layer_types) if kind == "dense"]


def _window(config: Any) -> int | None:
    """The sliding window of all layers, None for full attention."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def plain_config(
    source: Any,
    target: Target,
    dtype: torch.dtype,
    num_experts: int,
    top_k: int,
    width: int,
    shared_width: int,
    normalised: bool,
) -> PreTrainedConfig:
    """The config of the checkpoint that is written.

    width, shared_width: of an expert and of the shared expert, 0 for none.
    normalised: whether the weights of a token's experts are divided by their sum.
    """
    fields = {name: getattr(source, name) for name in _COMMON}
    if source.model_type in OWN_CLASS:
        known = {field.name for field in dataclasses.fields(target.config_class)}
        fields |= {name: value for name, value in source.to_dict().items() if name in known}
    fields |= {"num_experts_per_tok": top_k, "router_aux_loss_coef": float(source.router_aux_loss_coef)}
    dense, kind = _dense_layers(source), source.model_type
    head_dim = getattr(source, "head_dim", None)
    if head_dim is not None:  # also where no field of the class says so: its attention looks for it
        fields["head_dim"] = head_dim
    if target is MIXTRAL:
        fields |= {"num_local_experts": num_experts, "intermediate_size": width}
        fields |= {"router_jitter_noise": float(source.router_jitter_noise), "sliding_window": _window(source)}
    elif target in (GRANITE_MOE, GRANITE_MOE_SHARED):
        fields |= {"num_local_experts": num_experts, "intermediate_size": width}
        fields |= {name: getattr(source, name) for name in _GRANITE}
        if target is GRANITE_MOE_SHARED:
            fields["shared_intermediate_size"] = shared_width
    elif target is OLMOE:
        fields |= {"num_experts": num_experts, "intermediate_size": width, "norm_topk_prob": normalised}
    elif target.by_score:
        fields.pop("router_aux_loss_coef")
        fields |= {"n_routed_experts": num_experts, "moe_intermediate_size": width}
        fields |= {"n_shared_experts": max(1, shared_width // width), "n_group": 1, "topk_group": 1}
        fields |= {"norm_topk_prob": normalised, "first_k_dense_replace": len(dense), "num_nextn_predict_layers": 0}
        fields["routed_scaling_factor"] = float(source.routed_scaling_factor)
        if source.model_type in OWN_CLASS:
            return _finished(target, fields, dtype)
        fields["attention_bias"] = kind == "ecmoe_qwen2"
        fields |= {"use_qk_norm": kind == "ecmoe_qwen3", "partial_rotary_factor": 1.0}
        fields["head_dim"] = head_dim or source.hidden_size // source.num_attention_heads
    else:
        fields |= {"num_experts": num_experts, "moe_intermediate_size": width, "norm_topk_prob": normalised}
        fields |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        window = _window(source)
        fields |= {"use_sliding_window": window is not None, "sliding_window": window}
        if target is QWEN3_MOE:
            fields |= {"head_dim": head_dim, "attention_bias": source.attention_bias}
        else:
            every = ["full_attention" if window is None else "sliding_attention"] * source.num_hidden_layers
            fields |= {"qkv_bias": kind == "ecmoe_qwen2", "shared_expert_intermediate_size": shared_width}
            fields |= {"layer_types": getattr(source, "layer_types", None) or every}
            fields |= {"max_window_layers": getattr(source, "max_window_layers", 0)}
    return _finished(target, fields, dtype)


def _finished(target: Target, fields: dict[str, Any], dtype: torch.dtype) -> PreTrainedConfig:
    config = target.config_class(**fields)
    config.dtype = dtype
    config.architectures = [target.architecture]
    return config


def fields_for_older_tools(config: Any) -> dict[str, Any]:
    """Names that config.json had before Transformers 5 and that tools outside it still look for.

    Without them they do not fail but take a default: the wrong base frequency, or 128 experts.
    """
    rope = dict(config.rope_parameters)
    fields: dict[str, Any] = {"rope_theta": rope.pop("rope_theta"), "torch_dtype": str(config.dtype).split(".")[-1]}
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = rope
    if isinstance(config, Qwen3MoeConfig):
        fields["num_experts"] = config.num_experts
    return fields
