"""Token-choice mixtures of Transformers, in the terms of the family that computes all of them but the experts.

Their experts and routers are taken over as they are; who chooses whom is what changes. A checkpoint holds an expert's
matrices one by one, as on the Hub, or stacked, as Transformers has them in memory; both are read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.source import DTYPES, Source
from ..checkpoints.writer import PlannedTensor
from ..errors import ConversionError
from .settings import Settings

KEPT = "kept"  # what a record calls the initialisation: experts and routers are those of the source


@dataclass(frozen=True)
class Mixture:
    """Where a class has what this family calls `mlp.gate`, `mlp.experts` and `mlp.shared_expert`.

    family: the dense model_type whose attention, norms and head it has.
    blocks: the module of a layer that holds router and experts, in files and in memory.
    router: the router's weight in the block, in files and in memory.
    matrices: the names of an expert's gate_proj, up_proj and down_proj where each has a tensor of its own.
    stacks: the names of gate_up_proj and down_proj of all experts where they are stacked.
    bias: the buffer in the block that is added to the scores when a token chooses; "" where the class has none.
    shared_expert: the module of the shared expert below the layer; "" where the class has none.
    shared_is_fused: whether its gate_proj and up_proj are one tensor, input_linear.
    own_fields: fields of its config that say something of experts, which this family has fields of its own for.
    """

    family: str
    blocks: tuple[str, ...] = ("mlp",)
    routers: tuple[str, ...] = ("gate.weight",)
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacks: tuple[tuple[str, str], ...] = (("experts.gate_up_proj", "experts.down_proj"),)
    bias: str = ""
    shared_expert: str = ""
    shared_is_fused: bool = False
    own_fields: tuple[str, ...] = ()


_GRANITE = Mixture(
    "granite",
    blocks=("block_sparse_moe",),
    routers=("router.layer.weight", "router.weight"),
    stacks=(
        ("input_linear.weight", "output_linear.weight"),
        ("experts.gate_up_proj", "experts.down_proj"),
    ),
    own_fields=("num_local_experts", "router_aux_loss_coef", "shared_intermediate_size"),
)

_BY_SIGMOID = Mixture(
    "glm4_moe",
    bias="gate.e_score_correction_bias",
    shared_expert="mlp.shared_experts",
    own_fields=(
        "first_k_dense_replace",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "norm_topk_prob",
        "num_local_experts",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "topk_group",
    ),
)

MIXTURES: dict[str, Mixture] = {
    "mixtral": Mixture(
        "mistral",
        blocks=("block_sparse_moe", "mlp"),
        matrices=("w1", "w3", "w2"),
        own_fields=("num_local_experts", "router_aux_loss_coef"),
    ),
    "qwen2_moe": Mixture(
        "qwen2",
        shared_expert="mlp.shared_expert",
        own_fields=("decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "qkv_bias", "router_aux_loss_coef"),
    ),
    "qwen3_moe": Mixture(
        "qwen3",
        own_fields=(
            "decoder_sparse_step",
            "mlp_only_layers",
            "norm_topk_prob",
            "num_local_experts",
            "router_aux_loss_coef",
        ),
    ),
    "olmoe": Mixture("olmoe", own_fields=("norm_topk_prob", "num_local_experts", "router_aux_loss_coef")),
    "glm4_moe": _BY_SIGMOID,
    "deepseek_v3": replace(_BY_SIGMOID, family="deepseek_v3"),
    "granitemoe": _GRANITE,
    "granitemoeshared": replace(_GRANITE, shared_expert="shared_mlp", shared_is_fused=True),
}


def complete(settings: Settings, source: Any) -> Settings:
    """The settings of a conversion of this source's config, with every default filled in.

    Raises:
        ConversionError: for an option that makes experts of a dense FFN, and for bounds that do not go with the source.
    """
    settings.check_types()
    made = {"init": None, "ratio": None, "granularity": None, "layers": "all", "router": "normal"}
    for option, left_out in made.items():
        if getattr(settings, option) != left_out:
            raise ConversionError(
                f"{option}={getattr(settings, option)} makes experts of a dense FFN, and the source, a "
                f"{source.model_type}, has experts and routers of its own; leave it out"
            )
    num_experts, top_k = _num_experts(source), source.num_experts_per_tok
    for option, value in (("num_experts", num_experts), ("capacity_factor", top_k)):
        asked = getattr(settings, option)
        if option == "num_experts" and asked not in (None, value):
            raise ConversionError(f"num_experts={asked}: the source has {value} experts; leave it out")
    routing = settings.routing or "expert_choice"
    if routing not in ("expert_choice", "threshold", "token_choice"):
        raise ConversionError(f"routing={routing} is unknown; choose expert_choice, threshold or token_choice")
    capacity_factor = top_k if settings.capacity_factor is None else settings.capacity_factor
    least, most = settings.min_experts_per_token, settings.max_experts_per_token
    if routing != "expert_choice":
        if least or most is not None:
            raise ConversionError(
                f"routing={routing} has no bounds on the experts of a token; leave out min_experts_per_token and "
                "max_experts_per_token, or take routing=expert_choice"
            )
        least = 0
    elif least is None:  # a token without an expert would lose its FFN
        least = 0 if _shared_width(source) else 1
        if capacity_factor < least:
            raise ConversionError(
                f"capacity_factor={capacity_factor}: by default no token is left without an expert, which takes at "
                "least 1; give 1 or more, or min_experts_per_token=0"
            )
    if routing == "token_choice" and capacity_factor != top_k:
        raise ConversionError(
            f"capacity_factor={capacity_factor}: routing=token_choice is the source's own, {top_k} experts per token; "
            "leave it out"
        )
    return replace(
        settings,
        init=KEPT,
        num_experts=num_experts,
        capacity_factor=capacity_factor,
        granularity=1,
        routing=routing,
        min_experts_per_token=least,
        max_experts_per_token=most,
    )


def config_fields(source: Any, settings: Settings) -> dict[str, Any]:
    """The fields of the expert-choice config that stand for the source's own ones.

    Raises:
        ConversionError: where the family cannot say what the source says.
    """
    token_choice = settings.routing == "token_choice"
    kind, mixture = source.model_type, MIXTURES[source.model_type]
    width = getattr(source, "moe_intermediate_size", None) or source.intermediate_size
    fields: dict[str, Any] = {
        "num_experts": settings.num_experts,
        "moe_intermediate_size": width,
        "capacity_factor": settings.capacity_factor,
        "routing": settings.routing,
        "inference_routing": "token_choice" if token_choice else "threshold",
        "min_experts_per_token": settings.min_experts_per_token,
        "max_experts_per_token": settings.max_experts_per_token,
        "router_score_function": "sigmoid" if mixture.bias else "softmax",
        "routed_scaling_factor": getattr(source, "routed_scaling_factor", 1.0),
        "token_choice_bias_update_rate": 0.0 if token_choice and mixture.bias else None,
        # Mixtral divides the k weights by their sum; Granite's softmax over the k logits is the same.
        "normalize_combine_weights": getattr(source, "norm_topk_prob", True),
        "shared_expert_intermediate_size": _shared_width(source),
        "shared_expert_weighting": "gate" if kind == "qwen2_moe" else "one",
        "mlp_layer_types": _layer_types(source),
        "router_jitter_noise": getattr(source, "router_jitter_noise", 0.0),
        "router_aux_loss_coef": getattr(source, "router_aux_loss_coef", 0.0) if token_choice else 0.0,
    }
    if (getattr(source, "n_group", None) or 1) > 1:
        raise ConversionError(
            f"n_group={source.n_group}, topk_group={source.topk_group}: a token of this source chooses among its best "
            "groups of experts alone, which this family cannot say; only n_group=1 can be converted"
        )
    if "sparse" not in fields["mlp_layer_types"]:
        named = (f"{name}={value}" for name in _DENSE_LAYERS if (value := getattr(source, name, None)))
        raise ConversionError(
            f"{', '.join(named)}: no layer of this source has experts; give one whose config leaves it some"
        )
    if kind == "qwen2_moe" and not source.qkv_bias:
        raise ConversionError("qkv_bias=False: the attention of Qwen2, which this source's becomes, has biases")
    if kind == "qwen3_moe" and source.sliding_window is not None:  # of all layers
        fields |= {"layer_types": ["sliding_attention"] * source.num_hidden_layers, "max_window_layers": 0}
    return fields


def _num_experts(source: Any) -> int:
    return int(getattr(source, "num_local_experts", None) or source.num_experts)


def _shared_width(source: Any) -> int:
    """Of the shared expert; 0 where there is none."""
    if getattr(source, "n_shared_experts", None):  # side by side they are one FFN
        return int(source.n_shared_experts * source.moe_intermediate_size)
    width = getattr(source, "shared_expert_intermediate_size", 0) or getattr(source, "shared_intermediate_size", 0)
    return int(width or 0)


_DENSE_LAYERS = ("mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace")  # the fields that say which


def _layer_types(source: Any) -> list[str]:
    step, dense = getattr(source, "decoder_sparse_step", 1), getattr(source, "mlp_only_layers", None) or []
    dense = [*dense, *range(getattr(source, "first_k_dense_replace", None) or 0)]
    return [
        "sparse" if layer not in dense and (layer + 1) % step == 0 else "dense"
        for layer in range(source.num_hidden_layers)
    ]


class MixtureMaker:
    """Plans the tensors of the expert-choice model one by one, each from what the source, of a model_type in MIXTURES,
    calls it."""

    def __init__(self, model_type: str, source: Source) -> None:
        self.mixture, self.source = MIXTURES[model_type], source

    def plan(self, name: str, like: Tensor) -> PlannedTensor:
        """Where the tensor of that name comes from."""
        layer, _, part = name.partition(".mlp.")
        if part == "gate.threshold" and self.mixture.bias:
            read = f"{layer}.{self.mixture.blocks[0]}.{self.mixture.bias}"
            source = {read: tuple(like.shape)}
            return PlannedTensor(
                name, tuple(like.shape), like.dtype, lambda: iter([-self.source.read(read).float()]), source
            )
        if part.startswith("gate.threshold"):
            return PlannedTensor(
                name, tuple(like.shape), like.dtype, lambda: iter([torch.zeros(like.shape, dtype=like.dtype)])
            )
        if part == "gate.weight":
            read = self._first(f"{layer}.{block}.{router}" for block, router in self._places(self.mixture.routers))
            return self._verbatim(name, like, read)
        if part.startswith("experts."):
            return self._experts(name, like, layer, is_down=part == "experts.down_proj")
        if part.startswith("shared_expert.") and self.mixture.shared_is_fused:
            return self._shared(name, like, f"{layer}.{self.mixture.shared_expert}", part.split(".")[1])
        if part.startswith("shared_expert."):
            read = f"{layer}.{self.mixture.shared_expert}.{part.removeprefix('shared_expert.')}"
            return self._verbatim(name, like, read)
        return self._verbatim(name, like, name)

    def _places(self, names: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
        return ((block, name) for block in self.mixture.blocks for name in names)

    def _first(self, names: Iterator[str]) -> str:
        """The first name that the source has; where it has none the first, whose absence the check then names."""
        candidates = list(names)
        return next((name for name in candidates if name in self.source.headers), candidates[0])

    def _verbatim(self, name: str, like: Tensor, read: str) -> PlannedTensor:
        return self._planned(name, like, {read: tuple(like.shape)}, lambda: self.source.pieces(read), same_as=read)

    def _experts(self, name: str, like: Tensor, layer: str, is_down: bool) -> PlannedTensor:
        """Stacked as it is, or expert after expert: gate before up."""
        stacks = tuple(pair[is_down] for pair in self.mixture.stacks)
        stacked = [f"{layer}.{block}.{stack}" for block, stack in self._places(stacks)]
        held = next((found for found in stacked if found in self.source.headers), None)
        if held is not None:
            return self._verbatim(name, like, held)
        matrices = self.mixture.matrices[2:] if is_down else self.mixture.matrices[:2]
        num_experts, rows, columns = like.shape
        shape = (rows // len(matrices), columns)
        block = next(
            (b for b in self.mixture.blocks if f"{layer}.{b}.experts.0.{matrices[0]}.weight" in self.source.headers),
            self.mixture.blocks[0],
        )
        read = [
            f"{layer}.{block}.experts.{expert}.{matrix}.weight" for expert in range(num_experts) for matrix in matrices
        ]
        return self._planned(name, like, dict.fromkeys(read, shape), lambda: map(self.source.read, read))

    def _shared(self, name: str, like: Tensor, module: str, matrix: str) -> PlannedTensor:
        """One matrix of a shared expert whose gate_proj and up_proj are the halves of one tensor."""
        rows, columns = like.shape
        if matrix == "down_proj":
            return self._verbatim(name, like, f"{module}.output_linear.weight")
        read, first = f"{module}.input_linear.weight", rows * (matrix == "up_proj")
        return self._planned(
            name, like, {read: (2 * rows, columns)}, lambda: iter([self.source.read(read, first, first + rows)])
        )

    def _planned(
        self,
        name: str,
        like: Tensor,
        read: dict[str, tuple[int, ...]],
        pieces: Callable[[], Iterator[Tensor]],
        same_as: str | None = None,
    ) -> PlannedTensor:
        header = self.source.headers.get(next(iter(read)))
        dtype = DTYPES[header.dtype] if header and header.dtype in DTYPES else like.dtype
        return PlannedTensor(name, tuple(like.shape), dtype, pieces, read, same_as)
