"""What an expert-choice checkpoint becomes as a plain one: the form of its blocks, and every tensor of the output.

A plan is made from config and shard headers alone. Letters: E experts, D hidden size, K experts of one token.

A plain block computes the sum of p F(x) over K experts. The source computes the sum of w E(x) over the experts above
their threshold, and with a shared expert S either + S(x) or + (1 - sum w) S(x). Where softmax weights can stay as they
are, F is E. Elsewhere p adds up to one, and F is a E, S + a E, or S + a (E - S): a gated FFN as wide as S and E
together, of which S is whole whatever the routes are. The number a of each expert is measured; it stands for w.

By biased sigmoid scores (GLM-4-MoE) nothing has to stand for anything: the bias is minus the threshold, the weights are
the scores, and idle experts, which add nothing, take the places of a token that has less than K above the threshold.
Not where weights are divided by their sum, among which idle experts would count: there every token has K.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

import modeling_ecmoe
from modeling_ecmoe.names_ecmoe import layer_number

from ..checkpoints.folder import Checkpoint
from ..checkpoints.source import DTYPES
from ..checkpoints.writer import PlannedTensor
from ..errors import ConversionError
from ..models import tied_tensors
from ..targets import EMPTY_WIDTH, OWN_CLASS, Target, plain_config, target_of

_MATRICES = ("gate_proj", "up_proj", "down_proj")
_BUFFERS = (".mlp.gate.threshold", ".mlp.gate.threshold_updates")
_NEARLY_ZERO = 2**-24  # the smallest number of float16
# By score a token takes up to so many times its mean number of experts, unless the user says otherwise.
_ROOM_BY_SCORE = 4
_LEAST_BY_SCORE = 2  # experts, of which its groups are ranked by the two best


@dataclass(frozen=True)
class Form:
    """How the blocks of a source are written.

    top_k: experts of a token. num_idle: experts that add nothing, after the others.
    is_joined: whether every written expert has the shared one beside it.
    is_scaled: whether the experts' outputs are scaled by measured numbers that stand for the weights.
    is_shifted: whether the router rows are moved so that they rank by the distance to the thresholds.
    is_exact: whether the plain model computes what the source computes.
    normalised: whether the weights of a token's experts are divided by their sum.
    """

    top_k: int
    num_idle: int
    is_joined: bool
    is_scaled: bool
    is_shifted: bool
    is_exact: bool
    normalised: bool


@dataclass(frozen=True)
class PlainPlan:
    """tied: tensors of the source that are another one, and which. measured: by layer, e.g. "0.rows" [E, D] and
    "0.scales" [E]; filled before anything is written. biases: [E] by layer where they are not minus the thresholds.
    fitted: the layers that are measured; found before anything is run."""

    source: Checkpoint
    target: Target
    form: Form
    source_config: Any
    config: PreTrainedConfig
    tied: dict[str, str]
    tensors: list[PlannedTensor]
    measured: dict[str, Tensor]
    biases: dict[str, Tensor] = field(default_factory=dict)
    fitted: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def same_routes(self) -> bool:
        """Whether every token has the experts that it has in the source."""
        config = self.source_config
        plainly = config.token_choice_bias_update_rate is None and config.num_expert_groups == 1
        return self.form.is_exact or (config.routing == "token_choice" and plainly)

    @property
    def parameters(self) -> dict[str, int]:
        """Of the source, of what is written, and of the latter what a token meets."""
        total = sum(tensor.numel for tensor in self.tensors)
        routed = sum(tensor.numel for tensor in self.tensors if ".experts." in tensor.name)
        num_experts = self.source_config.num_experts + self.form.num_idle
        held = {name: torch.Size(header.shape).numel() for name, header in self.source.headers.items()}
        source = sum(size for name, size in held.items() if not name.endswith(_BUFFERS))
        return {"source": source, "total": total, "active": total - routed + routed * self.form.top_k // num_experts}


def form_of(config: Any, target: Target, top_k: int | None, keeps_router: bool = False) -> Form:
    """The form that keeps most of a source of this config in that class.

    keeps_router: whether the router's rows stay as they are, whatever the thresholds.

    Raises:
        ConversionError: when `top_k` is not possible.
    """
    num_experts, token_choice = config.num_experts, config.routing == "token_choice"
    in_one_group = config.num_expert_groups == 1  # as in every plain class
    if top_k is not None and (token_choice or not 1 <= top_k <= num_experts):
        raise ConversionError(
            f"num_experts_per_tok={top_k} must be between 1 and num_experts={num_experts}, and left out where the "
            "source has routing=token_choice"
        )
    complement = config.shared_expert_weighting == "complement"
    if target.by_score and (token_choice or keeps_router):
        top_k, normalised = int(config.capacity_factor), config.normalize_combine_weights
        return Form(top_k, 0, complement, False, False, is_exact=token_choice and in_one_group, normalised=normalised)
    most = config.max_experts_per_token or num_experts
    if target.by_score and config.normalize_combine_weights:  # idle experts would count among the weights
        top_k = min(num_experts, top_k or max(1, int(config.capacity_factor + 0.5)))
        is_exact = in_one_group and config.min_experts_per_token == top_k == most
        return Form(top_k, 0, complement, False, False, is_exact, normalised=True)
    if target.by_score:
        top_k = min(most, top_k or int(_ROOM_BY_SCORE * config.capacity_factor + 0.5) or 1)
        idle, is_exact = top_k - min(config.min_experts_per_token, top_k), in_one_group and top_k == most
        return Form(top_k, idle, complement, False, False, is_exact, normalised=False)
    has_bias = token_choice and config.token_choice_bias_update_rate is not None
    is_joined = config.shared_expert_intermediate_size > 0 and (complement or not target.shared_expert)
    softmax, normalised = config.router_score_function == "softmax", config.normalize_combine_weights
    keeps_raw = softmax and target.any_weights and not normalised and not is_joined
    keeps_weights = softmax and not complement and (normalised or keeps_raw)
    return Form(
        top_k=min(num_experts, top_k or max(1, int(config.capacity_factor + 0.5))),
        num_idle=0,
        is_joined=is_joined,
        is_scaled=not keeps_weights,
        is_shifted=not token_choice and not keeps_router,
        # The class ranks no expert by a bias.
        is_exact=token_choice and in_one_group and keeps_weights and not has_bias,
        normalised=not keeps_raw,
    )


def plan_plain(source: Checkpoint, to: str, top_k: int | None, kept: dict[str, list[float]] | None = None) -> PlainPlan:
    """Plans the checkpoint that `to` names.

    kept: where the router is still that of the mixture which the source was converted from, the biases [E] that this
        mixture adds to its scores, by layer; empty where it has none.

    Raises:
        ConversionError: for a source that is no whole expert-choice checkpoint, or one that no plain class can hold.
    """
    source_config = read_expert_choice_config(source)
    target = target_of(source_config, to)
    form = form_of(source_config, target, top_k, kept is not None)
    if target.by_score and source_config.num_experts + form.num_idle < _LEAST_BY_SCORE:
        raise ConversionError(
            f"num_experts={source_config.num_experts}: {target.title} ranks its experts by the best two of them, and "
            "one alone does not run; keep this checkpoint as it is"
        )
    names, tied = _expected(source, source_config)
    width, shared_width = _widths(source_config, target, form)
    num_experts = source_config.num_experts + form.num_idle
    config = plain_config(
        source_config, target, source.dtype, num_experts, form.top_k, width, shared_width, form.normalised
    )
    if source_config.routing == "token_choice":  # its thresholds are minus the biases, also where training moved them
        kept = None
    biases = {layer: torch.tensor(values) for layer, values in (kept or {}).items()}
    plan = PlainPlan(source, target, form, source_config, config, tied, [], {}, biases)
    maker = _Maker(plan, width, shared_width)
    for name in names:
        plan.tensors.extend(maker.tensors(name))
    return plan


def _widths(config: Any, target: Target, form: Form) -> tuple[int, int]:
    """Of an expert that is written and of the shared one; zeros fill them up. That of an expert is a number of eights:
    torch's grouped product, Transformers' way through experts, fails on rows that are no number of 16 bytes.

    Raises:
        ConversionError: for a shared expert that is no number of experts wide, where the class wants it so.
    """
    width, shared_width = config.moe_intermediate_size, config.shared_expert_intermediate_size
    if form.is_joined:
        width += shared_width
    num_shared, rest = divmod(shared_width, width)
    if not target.by_score:
        return -(-width // 8) * 8, EMPTY_WIDTH if form.is_joined or not shared_width else shared_width
    if config.model_type not in OWN_CLASS:  # its shared expert is as wide as the others
        width = max(width, shared_width)
        num_shared = 1
    elif rest or not num_shared:
        raise ConversionError(
            f"shared_expert_intermediate_size={shared_width}: shared experts of {target.title} are as wide as the "
            f"others, {width}"
        )
    width = -(-width // 8) * 8
    return width, num_shared * width


def read_expert_choice_config(source: Checkpoint) -> Any:
    """The config of a source of this family.

    Raises:
        ConversionError: for any other checkpoint.
    """
    model_type = source.config_fields().get("model_type")
    if str(model_type).removeprefix("ecmoe_") in modeling_ecmoe.composites():
        raise ConversionError(
            f"source={source.place} has model_type={model_type}, which reads more than text, and the plain classes "
            "that --to writes read text alone; keep it as it is, or convert its source with --text-only"
        )
    if model_type not in [f"ecmoe_{name}" for name in modeling_ecmoe.families()]:
        raise ConversionError(
            f"source={source.place} has model_type={model_type}, and --to takes an expert-choice checkpoint, such as "
            "ecmoe_llama; without --to a dense one or a mixture becomes that"
        )
    return source.config()


def _expected(source: Checkpoint, config: Any) -> tuple[list[str], dict[str, str]]:
    """The names of the source's tensors, in the order of its model, after a check that they are there and no others;
    and those that are another one, which need not be there.

    Raises:
        ConversionError: naming the tensor that is missing, of another shape or dtype, or too many.
    """
    with torch.device("meta"):
        model = modeling_ecmoe.model_class(config.model_type)(config)
    tied = tied_tensors(model)
    expected = {name: tuple(like.shape) for name, like in model.state_dict().items() if name not in tied}
    source.check(expected)
    for name in expected:
        header = source.headers[name]
        if header.dtype not in DTYPES and not name.endswith(_BUFFERS):
            raise ConversionError(f"{name} has dtype {header.dtype}; only float32, bfloat16 and float16 can be written")
    surplus = sorted(source.headers.keys() - expected.keys() - tied.keys())
    if surplus:
        raise ConversionError(
            f"source={source.place} holds {surplus[0]} ({len(surplus)} such tensors), which its config.json does not "
            "ask for; merge adapters before"
        )
    return list(expected), tied


class _Maker:
    """Plans the tensors of the plain model, those of one tensor of the source at a time.

    A written expert is a list of parts (the name of one FFN's prefix, the number of the expert in it or None, the
    factor of its output), which lie side by side; zeros fill it up to the width.
    """

    def __init__(self, plan: PlainPlan, width: int, shared_width: int) -> None:
        self.plan, self.source, self.target, self.form = plan, plan.source, plan.target, plan.form
        self.config = plan.source_config
        self.width, self.shared_width = width, shared_width

    def tensors(self, name: str) -> Iterator[PlannedTensor]:
        """What is written when the source's tensor of that name has its turn."""
        prefix, _, part = name.partition(".mlp.")
        block = f"{prefix}.{self.target.block}"
        if name.endswith(_BUFFERS) or part.startswith("shared_expert"):
            return  # thresholds stay behind; the shared expert is written with its layer's experts
        if part == "gate.weight":
            yield from self._router(name, f"{block}.{self.target.router}")
        elif part == "experts.gate_up_proj":
            yield from self._experts(prefix, block)
        elif part != "experts.down_proj":
            yield self._verbatim(name)

    def _verbatim(self, name: str) -> PlannedTensor:
        header = self.source.headers[name]
        return PlannedTensor(name, header.shape, DTYPES[header.dtype], lambda: self.source.pieces(name))

    def _router(self, name: str, written: str) -> Iterator[PlannedTensor]:
        """The rows, with zeros for idle experts, and the bias where scores have one.

        A row of zeros has score 1/2; with a bias of -1/2 an idle expert comes before those below their threshold.
        """
        header = self.source.headers[name]
        num_experts, hidden = header.shape
        dtype, idle = DTYPES[header.dtype], self.form.num_idle
        layer = layer_of(name)

        def rows() -> Iterator[Tensor]:
            measured = self.plan.measured.get(f"{layer}.rows")
            yield (self.source.read(name) if measured is None else measured).to(dtype)
            yield torch.zeros(idle, hidden, dtype=dtype)

        def bias() -> Iterator[Tensor]:
            kept = self.plan.biases.get(layer)
            yield -self.source.read(name.replace("gate.weight", "gate.threshold")) if kept is None else kept
            yield torch.full((idle,), -0.5)

        yield PlannedTensor(f"{written}.weight", (num_experts + idle, hidden), dtype, rows)
        if self.target.by_score:
            yield PlannedTensor(f"{written}.e_score_correction_bias", (num_experts + idle,), torch.float32, bias)

    def _experts(self, prefix: str, block: str) -> Iterator[PlannedTensor]:
        """Every expert of a layer, and the shared one where the class has one."""
        ffns = [partial(self._parts, prefix, e) for e in range(self.config.num_experts + self.form.num_idle)]
        if self.target.is_stacked:
            yield from self._ffn(block, prefix, self.width, ffns)
        else:
            for expert, parts in enumerate(ffns):
                yield from self._ffn(f"{block}.experts.{expert}", prefix, self.width, [parts])
        if self.target.shared_expert:
            shared = f"{prefix}.{self.target.shared_expert}"
            yield from self._ffn(shared, prefix, self.shared_width, [partial(self._shared_parts, prefix)])
            if self.target.has_gated_shared:
                yield self._shared_gate(prefix, f"{shared}_gate.weight")

    def _shared_gate(self, prefix: str, written: str) -> PlannedTensor:
        """The source's own, or a row whose sigmoid is one half up to rounding: of zeros llama.cpp makes NaN, since its
        sigmoid is silu(x) / x."""
        shape, dtype = (1, self.config.hidden_size), self._dtype(prefix)
        own = f"{prefix}.mlp.shared_expert_gate.weight"
        if own in self.source.headers:
            return PlannedTensor(written, shape, dtype, lambda: self.source.pieces(own))
        return PlannedTensor(written, shape, dtype, lambda: iter([torch.full(shape, _NEARLY_ZERO, dtype=dtype)]))

    def _parts(self, prefix: str, expert: int) -> list[tuple[str, int | None, float]]:
        if expert >= self.config.num_experts:
            return []  # idle
        scales = self.plan.measured.get(f"{layer_of(prefix)}.scales")
        scale = 1.0 if scales is None else scales[expert].item()
        if not self.target.by_score:  # the other classes know no factor of the combine weights
            scale *= self.config.routed_scaling_factor
        parts: list[tuple[str, int | None, float]] = [(f"{prefix}.mlp.experts", expert, scale)]
        if self.form.is_joined:
            complement = self.config.shared_expert_weighting == "complement"
            # By score the shared expert is there by itself, and each expert takes its share of it away.
            factor = (0.0 if self.target.by_score else 1.0) - scale * complement
            parts.append((f"{prefix}.mlp.shared_expert", None, factor))
        return parts

    def _shared_parts(self, prefix: str) -> list[tuple[str, int | None, float]]:
        has_shared = self.config.shared_expert_intermediate_size > 0
        if not has_shared or (self.form.is_joined and not self.target.by_score):
            return []
        # A gate that is nearly zero halves it.
        is_halved = self.target.has_gated_shared and self.config.shared_expert_weighting != "gate"
        return [(f"{prefix}.mlp.shared_expert", None, 2.0 if is_halved else 1.0)]

    def _ffn(self, written: str, prefix: str, width: int, ffns: list[Any]) -> Iterator[PlannedTensor]:
        """The matrices of one FFN, or of all experts where they are stacked. The parts of an FFN are asked for when it
        is written, since their factors are measured."""
        hidden, dtype = self.config.hidden_size, self._dtype(prefix)
        names = self.target.matrices if self.target.is_stacked or ".experts." in written else _MATRICES
        for name, matrices in zip(names, _tensors_of(len(names)), strict=True):
            is_down = matrices == ("down_proj",)
            shape = (hidden, width) if is_down else (len(matrices) * width, hidden)

            def pieces(matrices: tuple[str, ...] = matrices, is_down: bool = is_down) -> Iterator[Tensor]:
                for parts in ffns:
                    for matrix in matrices:
                        blocks = [self._block(matrix, *part) for part in parts()]
                        missing = width - sum(block.shape[int(is_down)] for block in blocks)
                        zeros = torch.zeros((hidden, missing) if is_down else (missing, hidden), dtype=dtype)
                        yield torch.cat([*blocks, zeros], dim=int(is_down))

            is_stack = self.target.is_stacked and written.endswith(self.target.block)
            yield PlannedTensor(f"{written}.{name}.weight", (len(ffns), *shape) if is_stack else shape, dtype, pieces)

    def _block(self, matrix: str, ffn: str, expert: int | None, factor: float) -> Tensor:
        """One matrix of one FFN of the source; the factor of its output is that of its down_proj."""
        if expert is None:
            block = self.source.read(f"{ffn}.{matrix}.weight")
        else:
            stacked = "down_proj" if matrix == "down_proj" else "gate_up_proj"
            block = self.source.read(f"{ffn}.{stacked}", expert, expert + 1)[0]
            if matrix != "down_proj":
                block = block.chunk(2)[matrix == "up_proj"]
        return block if matrix != "down_proj" or factor == 1 else (block.float() * factor).to(block.dtype)

    def _dtype(self, prefix: str) -> torch.dtype:
        return DTYPES[self.source.headers[f"{prefix}.mlp.experts.gate_up_proj"].dtype]


def _tensors_of(count: int) -> list[tuple[str, ...]]:
    """The matrices that each tensor of an FFN holds: one each, or gate_proj and up_proj in one."""
    return [(matrix,) for matrix in _MATRICES] if count == len(_MATRICES) else [_MATRICES[:2], _MATRICES[2:]]


def layer_of(name: str) -> str:
    """The number in a name such as model.layers.3.mlp.gate.weight, as text, which a record's keys are."""
    return str(layer_number(name))
