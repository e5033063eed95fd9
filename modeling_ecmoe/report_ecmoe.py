"""What the routes of a model look like: load, coverage, experts per token, thresholds and their drift."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from .batches_ecmoe import as_batches, run_batches
from .block_ecmoe import EcMoeBlock
from .routing_ecmoe import choose_experts


def sparse_blocks(model: nn.Module) -> dict[str, EcMoeBlock]:
    """The expert-choice blocks of a model by name, in the order of its layers.

    Raises:
        ValueError: when the model has none.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, EcMoeBlock)}
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no expert-choice layer")
    return blocks


@dataclass
class LayerCounts:
    """Sums over the real tokens of one layer; records of several passes or ranks simply add up.

    chosen: [E] tokens of each expert. fan_out: [E + 1] tokens with 0, 1, ... experts. entropy: of the router's
    softmax, nats. threshold: [E] in use, times tokens. wanted: [E] the threshold that would have given every expert
    its share of each pass, times tokens. dropped: choices that token-choice training would have dropped.
    """

    tokens: int
    chosen: Tensor
    fan_out: Tensor
    entropy: float
    threshold: Tensor
    wanted: Tensor
    dropped: int

    def __add__(self, other: "LayerCounts") -> "LayerCounts":
        return LayerCounts(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


# An expert's tokens over its share: beyond these the thresholds are those of other text.
LEAST_LOAD, LARGEST_LOAD = 0.5, 2.0


def is_near_share(summary: Mapping[str, Any]) -> bool:
    """Whether the load of every expert, load_min to load_max, is near its share."""
    return bool(summary["load_min"] >= LEAST_LOAD and summary["load_max"] <= LARGEST_LOAD)


@dataclass
class RoutingRecord:
    """Counts of the routes of a model's real tokens, as inference takes them, one entry per sparse layer."""

    num_experts: int
    capacity_factor: float
    layers: dict[str, LayerCounts] = field(default_factory=dict)

    def add(self, name: str, counts: LayerCounts) -> None:
        """Adds one layer's counts of one forward pass."""
        self.layers[name] = self.layers[name] + counts if name in self.layers else counts

    def merge(self, other: "RoutingRecord") -> None:
        """Adds the counts of another record, of other batches or another rank."""
        for name, counts in other.layers.items():
            self.add(name, counts)

    @property
    def tokens(self) -> dict[str, int]:
        return {name: counts.tokens for name, counts in self._recorded().items()}

    @property
    def chosen(self) -> dict[str, Tensor]:
        return {name: counts.chosen for name, counts in self._recorded().items()}

    @property
    def uncovered(self) -> dict[str, int]:
        """Tokens that no expert chose."""
        return {name: int(counts.fan_out[0]) for name, counts in self._recorded().items()}

    def load(self) -> list[list[float]]:
        """[layers][E], each expert's tokens relative to its equal share c * T / E; 1 is balance.

        Raises:
            ValueError: when nothing was recorded.
        """
        share = self.capacity_factor / self.num_experts
        return [(counts.chosen / (counts.tokens * share)).tolist() for counts in self._recorded().values()]

    def experts_per_token(self) -> float:
        """Mean over tokens and layers."""
        return sum(int(chosen.sum()) for chosen in self.chosen.values()) / sum(self.tokens.values())

    def uncovered_share(self) -> float:
        """Share of the tokens that no expert chose, mean over layers."""
        return sum(self.uncovered.values()) / sum(self.tokens.values())

    def summary(self) -> dict[str, float]:
        """Flat numbers that any trainer can log: least and largest load, uncovered share, experts per token."""
        loads = [load for layer in self.load() for load in layer]
        return {
            "load_min": min(loads),
            "load_max": max(loads),
            "uncovered": self.uncovered_share(),
            "experts_per_token": self.experts_per_token(),
        }

    def report(self) -> dict[str, Any]:
        """Per layer: load and thresholds per expert, shares of tokens by their number of experts, entropy, drops.

        `threshold_drift` is the threshold that would have balanced the recorded tokens minus the one in use.
        """
        layers = {}
        for (name, counts), load in zip(self._recorded().items(), self.load(), strict=True):
            threshold = counts.threshold / counts.tokens
            layers[name] = {
                "load": load,
                "uncovered": int(counts.fan_out[0]) / counts.tokens,
                "experts_per_token": (counts.fan_out / counts.tokens).tolist(),
                "threshold": threshold.tolist(),
                "threshold_drift": (counts.wanted / counts.tokens - threshold).tolist(),
                "entropy": counts.entropy / counts.tokens,
                "dropped": counts.dropped / counts.tokens,
            }
        return {"summary": self.summary(), "layers": layers}

    def _recorded(self) -> dict[str, LayerCounts]:
        if not self.layers:
            raise ValueError("no forward pass was recorded; open record_routing before a model is compiled and run")
        return self.layers


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Counts the routes of every forward pass while the context is open, as inference takes them."""
    blocks = sparse_blocks(model)
    config = next(iter(blocks.values())).config
    record = RoutingRecord(config.num_experts, float(config.capacity_factor))

    def hook_of(name: str, block: EcMoeBlock) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if block.token_mask is not None:
                mask_T = block.token_mask.flatten()
                output = output[0][mask_T], output[1][mask_T], output[2]
            if len(output[0]):
                record.add(name, _count_routes(block, *output))

        return hook

    handles = [block.gate.register_forward_hook(hook_of(name, block)) for name, block in blocks.items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _count_routes(block: EcMoeBlock, logits_TE: Tensor, scores_TE: Tensor, threshold_E: Tensor) -> LayerCounts:
    """The counts of one layer's real tokens in one pass."""
    config, num_tokens = block.config, len(scores_TE)
    routes_TE = block.routes(scores_TE, threshold_E)
    wanted_E, dropped = threshold_E, 0
    if config.routing == "token_choice":
        dropped = training_routes(block, scores_TE)[1]
    else:
        wanted_E = block.choose_in_pools(scores_TE[None], None, learning=False).threshold
    return LayerCounts(
        tokens=num_tokens,
        chosen=routes_TE.sum(0).cpu(),
        fan_out=routes_TE.sum(1).bincount(minlength=config.num_experts + 1).cpu(),
        entropy=float(torch.distributions.Categorical(logits=logits_TE).entropy().sum()),
        threshold=threshold_E.cpu() * num_tokens,
        wanted=wanted_E.cpu() * num_tokens,
        dropped=dropped,
    )


@torch.no_grad()
def training_routes(block: EcMoeBlock, scores_TE: Tensor) -> tuple[Tensor, int]:
    """The routes [T, E] bool that training takes with these scores, and how many choices it drops for capacity.

    Under token choice a choice is dropped when the expert's capacity is full. Expert choice drops nothing: a token
    without a route was chosen by nobody. Threshold training drops what exceeds its capacity clamp.

    Args:
        block: one of `sparse_blocks`, in any mode.
        scores_TE: router scores [T, E] of the real tokens of one pool: the batch, or a single sequence where
            `routing_pool` is "sequence".
    """
    config, gate = block.config, block.gate
    if config.routing == "token_choice":
        factor = config.token_choice_capacity_factor
        bias_E = gate.threshold if config.token_choice_bias_update_rate is not None else None
        k, groups = int(config.capacity_factor), config.num_expert_groups
        expert_TK, is_kept_TK = choose_experts(scores_TE, k, factor, None, bias_E, groups)
        routes_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(-1, expert_TK, is_kept_TK)
        return routes_TE, int((~is_kept_TK).sum())
    choice = block.choose_in_pools(scores_TE[None], None, learning=True)
    count_TE = torch.zeros_like(scores_TE, dtype=torch.long)  # added up: an unused slot repeats the best token
    routes_TE = count_TE.scatter_add(0, choice.token_index.T, choice.is_chosen.T.long()) > 0
    if config.routing == "threshold" and gate.threshold_updates >= max(config.threshold_after_steps, 1):
        return routes_TE, int(((scores_TE > gate.threshold) & ~routes_TE).sum())
    return routes_TE, 0


def routing_report(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | Iterable[str], tokenizer: Any = None
) -> dict[str, Any]:
    """Runs the batches in eval mode and reports how the model routes them; see `RoutingRecord.report`.

    Args:
        model: any model of the family, also wrapped by PEFT; left in the mode it was in.
        batches: keyword arguments of the model's forward, `input_ids` [B, S] and, with padding, `attention_mask`; or
            texts.
        tokenizer: of the texts.
    """
    batches = as_batches(model, batches, tokenizer)
    with record_routing(model) as record, torch.no_grad():
        run_batches(model, batches, "Recording routes")
    return record.report()
