"""The fields that expert choice adds to a dense configuration, and what a family says of its dense FFN."""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict


@dataclass(frozen=True)
class DenseFFN:
    """What a dense family calls the matrices of its FFN, which there are, and what its input is normalised by.

    into: the matrices from the hidden size to the FFN's width: gate and up, or both fused in that order, or one alone.
    out: the matrix back.
    has_gate: y = out(act(gate x) * (up x)); without it y = out(act(up x)).
    has_bias: whether they have biases, or the config field that says so.
    dropout: the config field that says with which probability the FFN's output is dropped; None where nothing is.
    norm: what its input is normalised by; None where attention's and FFN's outputs are normalised instead.
    norm_adds_one: whether that norm multiplies by 1 + weight.
    place: the module of a layer that holds these matrices; "" for the layer itself.
    layers: where in the base model the layers are.
    is_transposed: whether the matrices are stored as [in, out] (GPT-2's Conv1D).
    has_class: whether a class of the family makes the FFN, as linear layers, from a config alone. A shared expert is of
        that class; otherwise of our own, with the experts' names.
    """

    into: tuple[str, ...] = ("gate_proj", "up_proj")
    out: str = "down_proj"
    has_gate: bool = True
    has_bias: bool | str = False
    dropout: str | None = None
    norm: str | None = "post_attention_layernorm"
    norm_adds_one: bool = False
    place: str = "mlp"
    layers: str = "layers"
    is_transposed: bool = False
    has_class: bool = True

    def layers_of(self, model: Any) -> Any:
        """The decoder layers of a model of the family, dense or converted, of its base model, or of a composite."""
        names = self.layers.split(".")
        found = model.base_model if hasattr(model.base_model, names[0]) else model.get_decoder()
        for name in names:
            found = getattr(found, name)
        return found

    def ends_of(self, layer: Any) -> tuple[Any, Any]:
        """The modules of a dense layer that take the FFN's input and give its output; None where there are none."""
        names = (self.place, self.place) if self.place else (self.into[0], self.out)
        return getattr(layer, names[0], None), getattr(layer, names[1], None)


CONVERT_FIRST = "convert it first: `ecmoe-convert SOURCE DESTINATION`, or ecmoe.upcycle(model) in Python"

# How the classes that an Auto class makes end.
AUTO_CLASSES = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
    "AutoModelForQuestionAnswering": "ForQuestionAnswering",
}
# Of a composite, which reads text alone too.
COMPOSITE_AUTO_CLASSES = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForConditionalGeneration",
    "AutoModelForMultimodalLM": "ForConditionalGeneration",
    "AutoModelForImageTextToText": "ForConditionalGeneration",
}


class EcMoeFolderMixin:
    """How a config of ours is read from a checkpoint's folder and written into one.

    auto_classes: the Auto classes that load it, and how the class that each makes ends.
    """

    auto_classes: ClassVar[dict[str, str]] = AUTO_CLASSES

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As Transformers', which would take the config of any model.

        Raises:
            ValueError: for another family's. That of the dense model is taken for its sizes.
        """
        found = config_dict.get("model_type")
        dense = cls.model_type.removeprefix("ecmoe_")
        if found and found not in (cls.model_type, dense):
            raise ValueError(
                f"model_type={found} is not what {cls.__name__} reads, which is {cls.model_type}, or {dense} for its "
                f"sizes alone. To make experts of a dense model, {CONVERT_FIRST}"
            )
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Saves with a complete `auto_map`, so that the folder loads as remote code with every Auto class.

        Transformers writes the entry of the saved class alone, and for a checkpoint that came from the Hub it
        would keep the others pointing at the repository it came from.
        """
        file = type(self).__module__.rpartition(".")[2]
        family = type(self).__name__.removesuffix("Config")
        self.auto_map = {
            auto_class: f"{file}.{family}{ending}"
            for auto_class, ending in {"AutoConfig": "Config", **self.auto_classes}.items()
        }
        _remove_code_of_before(Path(save_directory))
        super().save_pretrained(save_directory, **kwargs)


@strict
@dataclass(kw_only=True, repr=False)
class EcMoeConfigMixin(EcMoeFolderMixin):
    """The fields that expert choice adds to a dense configuration; all others are the dense family's own.

    num_experts: experts in each sparse layer, E.
    moe_intermediate_size: width of one expert; the dense `intermediate_size` when None.
    capacity_factor: mean experts per token, c. An expert takes C = ceil(c * T / E) of T real tokens.
    mlp_layer_types: "sparse" or "dense" for each layer; all sparse when None.
    routing: how tokens and experts meet in training: the experts choose, exactly C tokens each ("expert_choice"); a
        token goes where its score exceeds the threshold ("threshold"); the tokens choose, `capacity_factor` experts
        each ("token_choice", the baseline, with `inference_routing="token_choice"`).
    inference_routing: how they meet in eval mode and in `generate`. "threshold" is causal. "expert_choice" lets
        later tokens and batch mates decide earlier routes: for analysis only, it leaks the future.
    routing_pool: the tokens an expert chooses among: the micro-"batch", each "sequence" by itself, or "global", the
        batches of all data-parallel ranks (their scores are gathered, not the tokens).
    router_score_function: "softmax" over the experts, or "sigmoid".
    normalize_combine_weights: divide a token's combine weights by their sum.
    min_experts_per_token, max_experts_per_token: bounds on the experts of a token, a and b; 0 and None are none.
        Training solves the assignment with both bounds; inference ranks by score - threshold and takes those above
        0, at least a, at most b.
    num_expert_groups: G; experts whose numbers are the same modulo G are a group. Both bounds, and the k experts of
        token choice, are divided by G and hold in each group: where the groups are the shards of an FFN, a token has
        as many of each. Where nothing is bounded they change nothing.
    shared_expert_intermediate_size: width of a dense FFN that every token passes through; 0 is none.
    shared_expert_weighting: "one", "complement" for 1 - the sum of the token's combine weights, or "gate" for the
        sigmoid of a learned score of the token (Qwen2-MoE).
    threshold_decay: how much of the threshold average one optimiser step keeps. Pre-training keeps 0.99 to 0.999
        (arXiv 2603.11535); fine-tuning moves a router in fewer steps than such an average follows.
    threshold_after_steps: threshold training begins when `gate.threshold_updates` has come this far (a calibration
        counts as 1 / (1 - threshold_decay) steps); before that the experts choose.
    threshold_capacity_clamp: in threshold training an expert takes at least (1 - g) C and at most (1 + g) C tokens.
    token_choice_capacity_factor: in token-choice training an expert drops what exceeds this factor times its equal
        share; None drops nothing.
    token_choice_bias_update_rate: token choice ranks the experts of a token by score - threshold, and each optimiser
        step nudges the thresholds by this much towards equal loads: the correction bias with its sign turned round
        (arXiv 2408.15664). 0 keeps them; None has none.
    routed_scaling_factor: multiplies the combine weights (DeepSeek-V3, GLM-4-MoE).
    router_jitter_noise: noise on the router's input in training, uniform in [1 - x, 1 + x].
    router_z_loss_coef, router_aux_loss_coef: weights of the z-loss and of token choice's balance loss, which a causal
        language model adds to its loss in training; the balance loss is that of each layer (Switch Transformer, arXiv
        2101.03961, section 2.2), the layers' mean, so that its scale is that of Transformers' models. Expert choice
        needs no balance loss and refuses one.
    output_router_logits: return the router logits of each sparse layer, [B * S, E].
    thresholds_from: the text on which the thresholds were measured, in words; None where they never were, or where
        training alone has made them. Written by calibration, read by people.
    experts_kernels: on a GPU with Triton, dispatch, activation and combine are one pass over memory each, summed in
        float32 and repeatable to the bit (kernels_ecmoe.py), and the bounded choice is launched as one CUDA graph;
        plain torch elsewhere, and where False.
    """

    dense_ffn = DenseFFN()
    supports_packing = True  # whether the dense class tells documents of one row apart by their positions

    num_experts: int = 8
    moe_intermediate_size: int | None = None
    capacity_factor: float | int = 1.0
    mlp_layer_types: list[str] | None = None
    routing: Literal["expert_choice", "threshold", "token_choice"] = "expert_choice"
    inference_routing: Literal["threshold", "expert_choice", "token_choice"] = "threshold"
    routing_pool: Literal["batch", "sequence", "global"] = "batch"
    router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize_combine_weights: bool = False
    min_experts_per_token: int = 0
    max_experts_per_token: int | None = None
    num_expert_groups: int = 1
    shared_expert_intermediate_size: int = 0
    shared_expert_weighting: Literal["one", "complement", "gate"] = "one"
    threshold_decay: float | int = 0.9
    threshold_after_steps: int = 0
    threshold_capacity_clamp: float | int = 0.5
    token_choice_capacity_factor: float | int | None = None
    token_choice_bias_update_rate: float | int | None = None
    routed_scaling_factor: float | int = 1.0
    router_jitter_noise: float | int = 0.0
    router_z_loss_coef: float | int = 0.0
    router_aux_loss_coef: float | int = 0.0
    output_router_logits: bool = False
    thresholds_from: str | None = None
    experts_kernels: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        """The dense config's, which knows fields by two names; `@strict` would set what is asked for on a mixin."""
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.attribute_map.keys() & kwargs.keys():  # the family's own words for fields that are read below
            setattr(self, name, kwargs.pop(name))
        _refuse_misspelled(kwargs)
        if self.intermediate_size is None:  # GPT-2's way to say
            self.intermediate_size = 4 * self.hidden_size
        if hasattr(self, "hidden_activation"):  # Gemma's word for what experts, back-ends and quantisers look for
            kwargs["hidden_act"] = self.hidden_activation
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        # On the instance: biases are a matter of its fields. Transformers leaves it out of config.json.
        self.base_model_tp_plan = (self.base_model_tp_plan or {}) | self._tp_plan_of_experts()

    def validate_expert_choice(self) -> None:
        """Part of the validation that `@strict` runs; each message names the field, the value and the remedy."""
        experts = self.num_experts
        if experts < 1:
            raise ValueError(f"num_experts={experts} must be at least 1")
        if not 0 < self.capacity_factor <= experts:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} must be above 0 and at most num_experts={experts}: "
                "it is the mean number of experts per token"
            )
        least, most = self.min_experts_per_token, self.max_experts_per_token
        if not 0 <= least <= experts:
            raise ValueError(f"min_experts_per_token={least} must be between 0 and num_experts={experts}")
        if most is not None and not max(least, 1) <= most <= experts:
            raise ValueError(
                f"max_experts_per_token={most} must be at least 1, at least min_experts_per_token={least} "
                f"and at most num_experts={experts}"
            )
        if self.bounds_experts_per_token and not least <= self.capacity_factor <= (most or experts):
            raise ValueError(
                f"capacity_factor={self.capacity_factor}, the mean number of experts per token, must lie between "
                f"min_experts_per_token={least} and max_experts_per_token={most or experts}"
            )
        self._validate_groups()
        self._validate_regime()
        if not 0 <= self.threshold_decay < 1:
            raise ValueError(f"threshold_decay={self.threshold_decay} must be at least 0 and below 1")
        for field, lowest in (("moe_intermediate_size", 1), ("shared_expert_intermediate_size", 0)):
            if getattr(self, field) < lowest:
                raise ValueError(f"{field}={getattr(self, field)} must be at least {lowest}")
        if self.shared_expert_weighting != "one" and not self.shared_expert_intermediate_size:
            raise ValueError(
                f"shared_expert_weighting={self.shared_expert_weighting!r} weights a shared expert, and "
                "shared_expert_intermediate_size=0 says there is none: set its width"
            )
        if len(self.mlp_layer_types) != self.num_hidden_layers or not set(self.mlp_layer_types) <= {"sparse", "dense"}:
            raise ValueError(
                f"mlp_layer_types={self.mlp_layer_types} must hold 'sparse' or 'dense' for each of the "
                f"num_hidden_layers={self.num_hidden_layers} layers"
            )

    def _validate_groups(self) -> None:
        groups = self.num_expert_groups
        if groups < 1 or self.num_experts % groups:
            raise ValueError(f"num_expert_groups={groups} must be at least 1 and divide num_experts={self.num_experts}")
        if groups == 1:
            return
        divided = {"capacity_factor": self.capacity_factor} if self.routing == "token_choice" else {}
        divided |= {"min_experts_per_token": self.min_experts_per_token}
        divided |= {"max_experts_per_token": self.max_experts_per_token or 0}
        for field, value in divided.items():
            if value % groups:
                raise ValueError(
                    f"{field}={value} must be a multiple of num_expert_groups={groups}: a token has as many experts of "
                    "each group"
                )

    def _validate_regime(self) -> None:
        """What belongs to one way of routing and to no other."""
        token_choice = self.routing == "token_choice"
        if token_choice != (self.inference_routing == "token_choice"):
            raise ValueError(
                f"routing={self.routing} does not go with inference_routing={self.inference_routing}: both must be "
                "token_choice, or neither"
            )
        if token_choice and self.capacity_factor != int(self.capacity_factor):
            raise ValueError(
                f"capacity_factor={self.capacity_factor} must be whole: each token chooses so many experts"
            )
        if self.routing != "expert_choice" and self.bounds_experts_per_token:
            raise ValueError(
                f"routing={self.routing} has no bounds, and min_experts_per_token={self.min_experts_per_token}, "
                f"max_experts_per_token={self.max_experts_per_token} ask for some; set them to 0 and None, or use "
                "routing=expert_choice"
            )
        if self.routing == "threshold" and self.routing_pool != "batch":
            raise ValueError(f"routing_pool={self.routing_pool} has no meaning for routing=threshold; use batch")
        for field, highest in (("threshold_capacity_clamp", 1), ("router_jitter_noise", 1)):
            if not 0 <= getattr(self, field) <= highest:
                raise ValueError(f"{field}={getattr(self, field)} must be between 0 and {highest}")
        for field in ("router_z_loss_coef", "router_aux_loss_coef", "threshold_after_steps"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative")
        if self.token_choice_capacity_factor is not None and self.token_choice_capacity_factor <= 0:
            raise ValueError(
                f"token_choice_capacity_factor={self.token_choice_capacity_factor} must be above 0 or None"
            )
        rate = self.token_choice_bias_update_rate
        if rate is not None and (not token_choice or rate < 0):
            raise ValueError(
                f"token_choice_bias_update_rate={rate} is of routing=token_choice and not negative; routing="
                f"{self.routing}: set it to None"
            )
        if self.routed_scaling_factor <= 0 or (
            self.routed_scaling_factor != 1 and self.shared_expert_weighting == "complement"
        ):
            raise ValueError(
                f"routed_scaling_factor={self.routed_scaling_factor} must be above 0, and 1 beside "
                "shared_expert_weighting='complement', whose weights add up to one"
            )
        if self.router_aux_loss_coef and not token_choice:
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef} balances token choice; routing={self.routing} is "
                "balanced by construction, set it to 0"
            )

    @property
    def ffn_has_bias(self) -> bool:
        """Whether the matrices of the FFN, and so of the experts, have biases."""
        said = self.dense_ffn.has_bias
        return bool(getattr(self, said)) if isinstance(said, str) else said

    @classmethod
    def dense_width(cls, dense: Any) -> int:
        """The width of the FFNs of a dense config; where it says nothing, four times the hidden size, as GPT-2's."""
        width: int | None = getattr(dense, cls.attribute_map.get("intermediate_size", "intermediate_size"), None)
        return width or 4 * int(dense.hidden_size)

    def ffn_norm(self, layer: int) -> str | None:
        """What the input of that layer's FFN is normalised by; None for no norm before it."""
        return self.dense_ffn.norm

    def ffn_width_multiple(self, layer: int) -> int:
        """By how much the FFN of that layer, and so its experts, are wider than the config's widths say."""
        return 1

    @property
    def expert_parameters(self) -> dict[str, tuple[int, ...]]:
        """The stacked parameters of the experts, by name, and their shapes in a layer of plain width."""
        width: Any = self.moe_intermediate_size
        return self.expert_shapes(width)

    def expert_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """The stacked parameters of experts of that width, named as Transformers' experts back-ends read them, and
        their shapes: [E, 2I or I, D], [E, D, I] and, where there are biases, [E, 2I or I] and [E, D]."""
        first = "gate_up_proj" if self.dense_ffn.has_gate else "up_proj"
        shapes: dict[str, tuple[int, ...]] = {
            first: (self.num_experts, width * (2 if self.dense_ffn.has_gate else 1), self.hidden_size),
            "down_proj": (self.num_experts, self.hidden_size, width),
        }
        biases = {f"{name}_bias": shape[:2] for name, shape in shapes.items()} if self.ffn_has_bias else {}
        return shapes | biases

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """Whole experts per rank; `DistributedConfig(ep_size=...)` picks how rows reach them."""
        experts = f"{self.dense_ffn.layers}.*.mlp.experts"
        plan = {f"{experts}.{name}": "grouped_gemm" for name in self.expert_parameters}
        if self.hidden_act == "xielu":  # which learns, from the experts that a rank has
            plan[f"{experts}.act_fn"] = "replicated_with_grad_allreduce"
        return plan | {experts: "ep_dispatch_experts"}

    def _tp_plan_of_experts(self) -> dict[str, str]:
        """The shared expert is cut as the dense FFN is, the experts by their width.

        Experts with biases stay whole on every rank: Transformers' styles would add their last bias once per rank.
        """
        dense = type(self).base_model_tp_plan or {}
        plan = {name.replace(".mlp.", ".mlp.shared_expert."): style for name, style in dense.items() if ".mlp." in name}
        if self.hidden_act == "xielu":  # which learns, from the part of the neurons that a rank has
            places = ("mlp.experts", "mlp.shared_expert", "mlp")
            plan |= {f"layers.*.{place}.act_fn": "replicated_with_grad_allreduce" for place in places}
        if self.ffn_has_bias:
            return plan
        first = "gate_up_proj" if self.dense_ffn.has_gate else "up_proj"
        return plan | {
            f"layers.*.mlp.experts.{first}": "packed_colwise" if self.dense_ffn.has_gate else "colwise",
            "layers.*.mlp.experts.down_proj": "rowwise",
            "layers.*.mlp.experts": "moe_tp_experts",
        }

    @property
    def bounds_experts_per_token(self) -> bool:
        """Whether the experts of a token are bounded at all."""
        most = self.max_experts_per_token
        return self.min_experts_per_token > 0 or (most is not None and most < self.num_experts)

    @property
    def mean_experts_per_token(self) -> float:
        """The experts of a token on average; what it costs follows from it."""
        return float(self.capacity_factor)

    @property
    def most_experts_per_token(self) -> int:
        """The most experts that a token can have at inference."""
        if self.inference_routing == "token_choice":
            return int(self.capacity_factor)
        return self.max_experts_per_token or self.num_experts

    @property
    def num_experts_per_tok(self) -> int:
        """`most_experts_per_token` by the name that inference servers size the slots of a token by; on average a token
        has `mean_experts_per_token`."""
        return self.most_experts_per_token

    @num_experts_per_tok.setter
    def num_experts_per_tok(self, value: int) -> None:
        if value != self.num_experts_per_tok:
            raise ValueError(
                f"num_experts_per_tok={value} follows from other fields and is {self.num_experts_per_tok} here; set "
                "max_experts_per_token to bound the experts of a token, or capacity_factor for token choice"
            )


def _remove_code_of_before(folder: Path) -> None:
    """Of a checkpoint that is saved over itself: the file that held all families once, where its config names it."""
    code, config = folder / "modeling_ecmoe.py", folder / "config.json"
    if code.is_file() and config.is_file() and '"modeling_ecmoe.EcMoe' in config.read_text(encoding="utf-8"):
        code.unlink()


def _refuse_misspelled(unknown: dict[str, Any]) -> None:
    """Refuses a keyword that is nearly one of our fields.

    Transformers turns any unknown keyword into an attribute, which dense checkpoints rely on; a misspelled field
    of ours would pass as well and do nothing.
    """
    known = [field.name for field in fields(EcMoeConfigMixin)]
    for name in unknown:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if nearest and name not in _LOOK_ALIKES:
            raise ValueError(
                f"{name}={unknown[name]!r} is no field of an expert-choice config; did you mean {nearest[0]}?"
            )


# Words of Transformers and its consumers that look like ours and mean something else.
_LOOK_ALIKES = {"num_experts_per_tok", "layer_types", "output_hidden_states", "num_local_experts"}
