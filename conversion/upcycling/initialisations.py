"""How the experts of a layer come from its dense FFN, after the papers that proposed it.

Each initialisation says which config fields it needs, what one expert's matrices are, and whether the converted model
computes at step 0, in eval mode, what the dense one computes. The neurons of an FFN are the rows of gate_proj and
up_proj and the columns of down_proj; y = down_proj (act(gate_proj x) * (up_proj x)), or y = down_proj act(up_proj x) in
families without a gate; each matrix may have a bias.
"""

from __future__ import annotations  # torch is imported when a matrix is made: the command's options need not wait

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .dense import Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of one expert, or its bias, that is to be made.

    part: which of the dense FFN.
    generator: a fresh torch.Generator for a label, of this layer and expert alone; the same for all parts
        unless the label says otherwise. So the order of writing does not matter, and nor does an interruption.
    ratio, granularity: the options of the same names.
    width_multiple: how many times as wide as the config says this layer's FFN is.
    """

    part: Part
    expert: int
    generator: Callable[[str], torch.Generator]
    ratio: float
    granularity: int
    width_multiple: int = 1

    @property
    def axis(self) -> int | None:
        """The axis along which the neurons lie; None where there are none."""
        return self.part.neuron_axis

    @property
    def label(self) -> str:
        """Of this matrix alone, for its generator."""
        return f"{self.part.matrix}_bias" if self.part.is_bias else self.part.matrix


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal numbers on the CPU in float32, whatever the default device and dtype: the same everywhere."""
    import torch

    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def _copy(_wanted: ExpertMatrix, dense: Tensor) -> Tensor:
    return dense


def _silent(wanted: ExpertMatrix, dense: Tensor) -> Tensor:
    """A copy that adds nothing until it learns: its down_proj is zero."""
    return dense.new_zeros(()).expand_as(dense) if wanted.part.matrix == "down_proj" else dense  # takes no memory


def _noisy(wanted: ExpertMatrix, dense: Tensor) -> Tensor:
    """A copy plus Gaussian noise, `ratio` times the matrix's standard deviation."""
    values = dense.float()
    noise = normal(values.shape, wanted.generator(wanted.label)).to(values.device)
    return (values + wanted.ratio * values.std() * noise).to(dense.dtype)


def _redrawn(wanted: ExpertMatrix, dense: Tensor) -> Tensor:
    """A copy with a share of its neurons drawn anew from the mean and deviation of the block they replace."""
    import torch

    if wanted.axis is None:
        return dense
    num_neurons = dense.shape[wanted.axis]
    neurons = torch.randperm(num_neurons, generator=wanted.generator("neurons"), device="cpu")
    neurons = neurons[: round(wanted.ratio * num_neurons)].to(dense.device)
    if not len(neurons):
        return dense
    values = dense.float()
    block = values.index_select(wanted.axis, neurons)
    drawn = normal(block.shape, wanted.generator(wanted.label)).to(values.device)
    drawn = drawn * block.std() + block.mean()
    return values.index_copy(wanted.axis, neurons, drawn).to(dense.dtype)


def num_shared_neurons(width: int, ratio: float) -> int:
    return round(ratio * width)


def _routed_neurons(wanted: ExpertMatrix, dense: Tensor) -> Tensor:
    """The neurons that `split` does not share; the bias of down_proj stays with those that it shares."""
    if wanted.axis is None:
        return dense.new_zeros(dense.shape)
    width = dense.shape[wanted.axis]
    shared = wanted.width_multiple * num_shared_neurons(width // wanted.width_multiple, wanted.ratio)
    return dense.narrow(wanted.axis, shared, width - shared)


def _shard(wanted: ExpertMatrix, dense: Tensor) -> Tensor:
    """Shard e mod G of the neurons. The combine weights of the shards of n replicas are 1 / (G n). They are multiplied
    by G (`routed_scaling_factor`), and not down_proj: an optimiser whose steps are as large as its rate, such as
    AdamW, would change the FFN less.

    Of a bias of down_proj each shard has its part.
    """
    if wanted.axis is None:
        return dense / wanted.granularity
    width = dense.shape[wanted.axis] // wanted.granularity
    return dense.narrow(wanted.axis, wanted.expert % wanted.granularity * width, width)


@dataclass(frozen=True)
class Initialisation:
    """One way to make experts.

    summary: one line for --help and the model card, with {shards}, {copies} and {rest} for `Settings.words`.
    source: the paper.
    exact: the converted model computes what the dense model computes, in eval mode at least.
    step_0: what it computes before any training.
    expert: makes one matrix of one expert from the dense matrix.
    config: the expert-choice fields it needs, beside those the user sets.
    shares: which of the dense neurons stay as shared expert: "none", "all", or "ratio" of them, the first ones.
    ratio, default_ratio: what the option `ratio` means; None where it means nothing.
    """

    summary: str
    source: str
    exact: bool
    step_0: str
    expert: Callable[[ExpertMatrix, Tensor], Tensor] = _copy
    config: dict[str, Any] = field(default_factory=dict)
    shares: str = "none"
    ratio: str = ""
    default_ratio: float | None = None


# A token nobody chose would lose its FFN; one expert at least, its nearest, keeps equal copies exact.
_COVERED = {"router_score_function": "softmax", "normalize_combine_weights": True, "min_experts_per_token": 1}

INITIALISATIONS = {
    # y = sum w E(x) + (1 - sum w) shared(x): with E and shared equal it is shared(x), whatever w and the routes are.
    "blend": Initialisation(
        summary="experts copy the dense FFN, which stays as shared expert weighted by 1 - the combine weights",
        source="sparse upcycling (arXiv 2212.05055) with a complementary shared expert",
        exact=True,
        step_0="what the dense model computes, in every mode, whatever the routes",
        config={"router_score_function": "sigmoid", "shared_expert_weighting": "complement"},
        shares="all",
    ),
    "shared": Initialisation(
        summary="the dense FFN stays as shared expert; experts copy it with a down_proj of zero",
        source="sparse upcycling (arXiv 2212.05055) beside an untouched FFN, as DeepSeekMoE (arXiv 2401.06066) shares",
        exact=True,
        step_0="what the dense model computes, in every mode, whatever the routes",
        expert=_silent,
        config={"router_score_function": "sigmoid"},
        shares="all",
    ),
    # Normalised weights of equal experts add up to the dense FFN, for every token that has an expert at all.
    "copy": Initialisation(
        summary="experts copy the dense FFN, combine weights normalised; a token nobody chose takes its nearest expert",
        source="sparse upcycling (arXiv 2212.05055), gates normalised (section 4.2)",
        exact=True,
        step_0="what the dense model computes",
        config=_COVERED,
    ),
    "noise": Initialisation(
        summary="as copy, plus Gaussian noise on each expert",
        source="noised copies, a control of Drop-Upcycling (arXiv 2502.19261) and OLMoE (arXiv 2409.02060)",
        exact=False,
        step_0="what the dense model with slightly perturbed FFNs would",
        expert=_noisy,
        config=_COVERED,
        ratio="the noise's deviation over that of the matrix",
        default_ratio=0.01,
    ),
    "drop": Initialisation(
        summary="as copy, a share of each expert's neurons drawn anew",
        source="Drop-Upcycling (arXiv 2502.19261), one set of neurons for all three matrices (section 3)",
        exact=False,
        step_0="what the dense model with the redrawn neurons would, and that is much worse",
        expert=_redrawn,
        config=_COVERED,
        ratio="share of the neurons that is drawn anew",
        default_ratio=0.5,
    ),
    "split": Initialisation(
        summary="the first neurons stay as shared expert, experts copy the others; at capacity 1 the FLOPs of one FFN",
        source="a shared part as in DeepSeekMoE (arXiv 2401.06066) cut from the dense FFN",
        exact=True,
        step_0="what the dense model computes",
        expert=_routed_neurons,
        config=_COVERED,
        shares="ratio",
        ratio="share of the neurons that every token passes through",
        default_ratio=0.5,
    ),
    # The shards of one replica have one router row, so at step 0 a token takes all of them or none. When the rows have
    # moved apart a token takes a shard of each kind all the same: two of one kind are no FFN.
    "granular": Initialisation(
        summary="the dense FFN cut into {shards} shards, each copied {copies} times; router rows shared by the shards",
        source="virtual group initialisation (arXiv 2410.07524), whose groups hold after step 0 too; combine weights "
        "times the number of shards",
        exact=True,
        step_0="what the dense model computes",
        expert=_shard,
        config=_COVERED,
    ),
    "mix": Initialisation(
        summary="the FFNs of several dense checkpoints become the experts; all else is {rest}",
        source="Branch-Train-MiX (arXiv 2403.07816)",
        exact=False,
        step_0="what none of its sources does: the FFNs of one or the other, and all else {rest}",
        config=_COVERED,
    ),
}

# Of a source that is a mixture already; it makes nothing, so it is none of those that can be chosen.
KEPT = Initialisation(
    summary="experts and routers of the source as they are; who chooses whom is what changes",
    source="as arXiv 2604.01622 replaces the rule alone in diffusion models",
    exact=False,
    step_0="",
)


def config_fields(initialisation: Initialisation, width: int, ratio: float | None, granularity: int) -> dict[str, Any]:
    """The expert-choice config fields of an initialisation for a dense FFN of that width."""
    fields = dict(initialisation.config)
    if initialisation.shares == "all":
        fields["shared_expert_intermediate_size"] = width
    elif initialisation.shares == "ratio":
        shared = num_shared_neurons(width, ratio or 0)
        fields |= {"shared_expert_intermediate_size": shared, "moe_intermediate_size": width - shared}
    if granularity > 1:
        fields |= {"moe_intermediate_size": width // granularity, "min_experts_per_token": granularity}
        # Shards of one kind are a group: a token has as many first shards as second ones, of whatever replicas.
        fields |= {"num_expert_groups": granularity, "routed_scaling_factor": float(granularity)}
    return fields
