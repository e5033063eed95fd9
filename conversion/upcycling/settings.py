"""The options that decide what a conversion writes, with their defaults and their checks."""

import math
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConversionError
from .dense import ffn_width
from .initialisations import INITIALISATIONS, KEPT, Initialisation

ROUTERS = {
    "normal": "N(0, initializer_range)",
    "centroid": "k-means centroids of the FFN's inputs on the text (arXiv 2604.13508)",
    "hidden": "the mean FFN input of each expert's prompts, from router_prompts",
}
# The sources that are mixtures already (mixtures.py), by model_type.
MIXTURE_TYPES = (
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
    "granitemoeshared",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
)
NAMED_LAYERS = ("all", "every-second", "last-half")
MIX_ATTENTION = ("average", "first")

_KINDS: dict[str, tuple[type, ...]] = {
    "init": (str, type(None)),
    "num_experts": (int, type(None)),
    "capacity_factor": (int, float, type(None)),
    "ratio": (int, float, type(None)),
    "granularity": (int, type(None)),
    "layers": (str, list, tuple),
    "router": (str,),
    "mix_attention": (str,),
    "seed": (int,),
    "routing": (str, type(None)),
    "min_experts_per_token": (int, type(None)),
    "max_experts_per_token": (int, type(None)),
}


@dataclass(frozen=True)
class Settings:
    """What decides the weights. `complete` fills what is None with the initialisation's defaults.

    routing, min_experts_per_token, max_experts_per_token: of a source that is a mixture already (mixtures.py).
    text_only: of a source that reads more than text, its decoder alone.
    """

    init: str | None = None
    num_experts: int | None = None
    capacity_factor: float | None = None
    ratio: float | None = None
    granularity: int | None = None
    layers: str | list[int] = "all"
    router: str = "normal"
    mix_attention: str = "average"
    seed: int = 0
    routing: str | None = None
    min_experts_per_token: int | None = None
    max_experts_per_token: int | None = None
    text_only: bool = False

    @property
    def initialisation(self) -> Initialisation:
        return KEPT if self.init == "kept" else INITIALISATIONS[self.init or "shared"]

    @property
    def words(self) -> dict[str, object]:
        """What stands for {shards}, {copies} and {rest} in the texts of the initialisation, of complete settings."""
        rest = "averaged" if self.mix_attention == "average" else "the first's"
        return {"shards": self.num_shards, "copies": (self.num_experts or 0) // self.num_shards, "rest": rest}

    @property
    def num_shards(self) -> int:
        """G, the shards that a replica of the dense FFN is cut into; 1 where it is not cut."""
        return self.granularity or 1

    def check(self, num_sources: int) -> "Settings":
        """All that is wrong whatever the checkpoint is; with the defaults that need no checkpoint filled in.

        num_sources: checkpoints that are given, more than one for init="mix".

        Raises:
            ConversionError: naming the option, its value and the remedy.
        """
        self.check_types()
        if self.init is None:
            return replace(self, init="shared").check(num_sources)
        for field, known in (("init", INITIALISATIONS), ("router", ROUTERS), ("mix_attention", MIX_ATTENTION)):
            if getattr(self, field) not in known:
                raise ConversionError(f"{field}={getattr(self, field)} is unknown; choose one of {', '.join(known)}")
        num_experts = self.num_experts
        if num_experts is None:
            num_experts = num_sources if self.init == "mix" else 8
        if num_experts < 1:
            raise ConversionError(f"num_experts={num_experts} must be at least 1")
        self._check_sources(num_sources, num_experts)
        granularity = self._granularity(num_experts)
        self._check_ratio()
        self._layer_numbers()
        capacity_factor = granularity if self.capacity_factor is None else self.capacity_factor
        self._check_capacity(capacity_factor, num_experts, granularity)
        return replace(self, num_experts=num_experts, capacity_factor=capacity_factor, granularity=granularity)

    def complete(self, dense_config: Any, num_sources: int) -> "Settings":
        """With every default filled in, checked against the dense config.

        Raises:
            ConversionError: naming the option, its value and the remedy.
        """
        for field in ("routing", "min_experts_per_token", "max_experts_per_token"):
            if getattr(self, field) is not None:
                raise ConversionError(
                    f"{field}={getattr(self, field)} is of a source that is a mixture of experts already; of a "
                    "dense one the initialisation decides, leave it out"
                )
        made = replace(self, init=self.init or "shared")
        width, checked = ffn_width(dense_config), made.check(num_sources)
        if width % checked.num_shards:
            raise ConversionError(
                f"granularity={checked.num_shards} does not divide the dense intermediate_size={width}; choose one "
                "that does"
            )
        ratio = made.initialisation.default_ratio if made.ratio is None else made.ratio
        if made.init == "split" and not 1 <= round((ratio or 0) * width) < width:
            raise ConversionError(f"ratio={ratio} leaves one part of the {width} neurons empty; choose another")
        self.mlp_layer_types(dense_config.num_hidden_layers)
        return replace(checked, ratio=ratio)

    def check_types(self) -> None:
        """What a command line cannot get wrong and a notebook can."""
        for field, kinds in _KINDS.items():
            value = getattr(self, field)
            if not isinstance(value, kinds) or isinstance(value, bool):
                wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
                raise ConversionError(f"{field}={str(value)[:40]!r} must be {wanted}, and is {type(value).__name__}")

    def _check_sources(self, num_sources: int, num_experts: int) -> None:
        if self.init != "mix":
            if num_sources > 1:
                raise ConversionError(f"mix_with is given and init={self.init} takes one checkpoint; say init=mix")
            return
        if num_sources < 2:
            raise ConversionError("init=mix makes experts of several checkpoints; name the others with mix_with")
        if num_experts % num_sources:
            raise ConversionError(
                f"num_experts={num_experts} is no multiple of the {num_sources} checkpoints that init=mix is given"
            )

    def _granularity(self, num_experts: int) -> int:
        """G, the shards of a dense FFN; 1 where it is not cut."""
        if self.init != "granular":
            if self.granularity is not None:
                raise ConversionError(f"granularity={self.granularity} belongs to init=granular, not {self.init}")
            return 1
        granularity = 2 if self.granularity is None else self.granularity
        if granularity < 1:
            raise ConversionError(f"granularity={granularity} must be at least 1: shards of the dense FFN")
        if num_experts % granularity:
            raise ConversionError(
                f"granularity={granularity} does not divide num_experts={num_experts}; choose one that does"
            )
        return granularity

    def _check_capacity(self, capacity_factor: float, num_experts: int, granularity: int) -> None:
        """What the bounds that an initialisation sets itself ask of it is said in the user's words."""
        if not 0 < capacity_factor <= num_experts:
            raise ConversionError(
                f"capacity_factor={capacity_factor} must be above 0 and at most num_experts={num_experts}: it is the "
                "mean number of experts per token"
            )
        if self.init == "granular" and capacity_factor < granularity:
            raise ConversionError(
                f"capacity_factor={capacity_factor}: init=granular needs at least its granularity, {granularity}, for "
                f"a token takes all shards of a dense FFN or none; give {granularity} or more, or leave it out"
            )
        if capacity_factor < self.initialisation.config.get("min_experts_per_token", 0):
            raise ConversionError(
                f"capacity_factor={capacity_factor}: init={self.init} needs at least 1, since it leaves no token "
                "without an expert; give 1 or more, or init=shared"
            )

    def _check_ratio(self) -> None:
        if self.ratio is None:
            return
        if self.initialisation.default_ratio is None:
            raise ConversionError(f"ratio={self.ratio} means nothing to init={self.init}; leave it out")
        highest = 1 if self.init != "noise" else float("inf")
        if not 0 <= self.ratio <= highest or math.isinf(self.ratio):
            raise ConversionError(f"ratio={self.ratio} must be between 0 and {highest}: {self.initialisation.ratio}")

    def _layer_numbers(self) -> set[int] | None:
        """Those of a list; None where layers are named.

        Raises:
            ConversionError: when it is neither a name nor numbers.
        """
        if self.layers in NAMED_LAYERS:
            return None
        listed = self.layers.split(",") if isinstance(self.layers, str) else self.layers
        try:
            chosen = {int(number) for number in listed}
        except (ValueError, TypeError):
            chosen = {-1}
        if any(number < 0 for number in chosen):
            raise ConversionError(
                f"layers={self.layers} must be {', '.join(NAMED_LAYERS)} or a list such as 1,3,5, counted from 0"
            )
        return chosen

    def mlp_layer_types(self, num_layers: int) -> list[str]:
        """ "sparse" or "dense" for each layer.

        Raises:
            ConversionError: when `layers` names none, or one that does not exist.
        """
        chosen = self._layer_numbers()
        if chosen is None:
            named = {
                "all": range(num_layers),
                "every-second": range(1, num_layers, 2),  # not the first, as in sparse upcycling (arXiv 2212.05055)
                "last-half": range(num_layers // 2, num_layers),
            }
            chosen = set(named[str(self.layers)])
        if not chosen <= set(range(num_layers)):
            raise ConversionError(
                f"layers={self.layers} must be {', '.join(NAMED_LAYERS)} or a list such as 1,3,5 of layers "
                f"0 to {num_layers - 1}"
            )
        if not chosen:
            raise ConversionError(f"layers={self.layers} names no layer of the {num_layers}; choose all")
        return ["sparse" if layer in chosen else "dense" for layer in range(num_layers)]
