"""How the experts of a layer come from its dense FFN. Each initialisation: config fields, and what it promises."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Initialisation:
    """One way to make experts.

    summary: one line for --help and the model card.
    config: the expert-choice fields it needs, beside those the user sets.
    keeps_dense_ffn: the dense FFN stays as the shared expert.
    exact: the converted model computes what the dense model computes, in eval mode at least.
    source: where the idea comes from.
    """

    summary: str
    source: str
    exact: bool
    keeps_dense_ffn: bool = False
    config: dict[str, Any] = field(default_factory=dict)


INITIALISATIONS = {
    # y = sum w E(x) + (1 - sum w) shared(x): with E and shared equal it is shared(x), whatever w and the routes are.
    "blend": Initialisation(
        summary="experts copy the dense FFN, which stays as shared expert weighted by 1 - the combine weights",
        source="sparse upcycling (arXiv 2212.05055) with a complementary shared expert",
        exact=True,
        keeps_dense_ffn=True,
        config={"router_score_function": "sigmoid", "shared_expert_weighting": "complement"},
    ),
    # Normalised weights of equal experts add up to the dense FFN, for every token that has an expert at all.
    "copy": Initialisation(
        summary="experts copy the dense FFN, combine weights normalised; a token nobody chose takes its nearest expert",
        source="sparse upcycling (arXiv 2212.05055), gates normalised (section 4.2)",
        exact=True,
        config={"router_score_function": "softmax", "normalize_combine_weights": True, "min_experts_per_token": 1},
    ),
}
