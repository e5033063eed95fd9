"""Thresholds from data, and what the routes then look like: load, coverage, experts per token."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .block_ecmoe import EcMoeBlock, use_inference_routing
from .bounded_ecmoe import balanced_thresholds
from .routing_ecmoe import expert_capacity

# A float32 score in [0, 1] has a bit pattern below 2^30, and patterns are ordered as the scores are. Two halves of
# 15 bits make two passes with small integer histograms find any quantile exactly, and histograms simply add up.
_HALF_BITS = 15
_BINS = 1 << _HALF_BITS


def sparse_blocks(model: nn.Module) -> dict[str, EcMoeBlock]:
    """The expert-choice blocks of a model by name, in the order of its layers.

    Raises:
        ValueError: when the model has none.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, EcMoeBlock)}
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no expert-choice layer")
    return blocks


@torch.no_grad()
def calibrate_thresholds(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Sets every threshold so that its expert takes its share of the batches' real tokens.

    That is C = ceil(c * T / E) of T tokens: an exact quantile of the expert's scores, or with bounds on the experts
    of a token the thresholds at which the bounded rule gives every expert its share. The layers below route by
    expert choice among each batch meanwhile, as in training, so that the scores do not depend on the thresholds that
    are being replaced.
    The model is left in the mode it was in.

    Args:
        model: any model of the family, also wrapped by PEFT.
        batches: keyword arguments of the model's forward, `input_ids` [B, S] and, with padding, `attention_mask`.
            Large batches of the text the model is meant for; without bounds they are gone through twice.

    Raises:
        ValueError: when there is no batch, or the model has no expert-choice layer.
    """
    batches = list(batches)
    blocks = sparse_blocks(model)
    if not batches:
        raise ValueError("calibrate_thresholds needs at least one batch of tokens")
    bounded = next(iter(blocks.values())).config.bounds_experts_per_token
    thresholds = (_bounded_thresholds if bounded else _quantile_thresholds)(model, blocks, batches)
    for name, block in blocks.items():
        block.gate.threshold.copy_(thresholds[name])
        # Worth as many optimiser steps as the running average remembers.
        block.gate.threshold_updates.fill_(round(1 / (1 - block.config.threshold_decay)))


def _quantile_thresholds(
    model: nn.Module, blocks: dict[str, EcMoeBlock], batches: list[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """[E] for each layer: midway between the last score that is chosen and the best that is refused."""
    high = {name: _empty_histogram(block) for name, block in blocks.items()}
    _collect_scores(model, blocks, batches, lambda name, scores_TE: _count(high[name], _bits(scores_TE) >> _HALF_BITS))
    # The last chosen and the best refused score, so that `score > threshold` takes exactly C tokens and neither of
    # the two sits on the border, where a rounding error would decide.
    sides = [_Side(blocks, high, is_refused) for is_refused in (0, 1)]

    def count_low(name: str, scores_TE: Tensor) -> None:
        bits_TE = _bits(scores_TE)
        for side in sides:
            inside_TE = (bits_TE >> _HALF_BITS) == side.bin[name]
            _count(side.low[name], torch.where(inside_TE, bits_TE & (_BINS - 1), -1))

    _collect_scores(model, blocks, batches, count_low)
    chosen, refused = (side.scores() for side in sides)
    return {name: (chosen[name] + refused[name]) / 2 for name in blocks}


class _Side:
    """One side of the threshold: the coarse bin of its score, and the fine histogram inside that bin."""

    def __init__(self, blocks: dict[str, EcMoeBlock], high: dict[str, Tensor], is_refused: int) -> None:
        self.low = {name: torch.zeros_like(histogram) for name, histogram in high.items()}
        self.bin: dict[str, Tensor] = {}
        self.rank: dict[str, Tensor] = {}
        for name, block in blocks.items():
            config, histogram = block.config, high[name]
            capacity = expert_capacity(int(histogram[0].sum()), config.num_experts, config.capacity_factor)
            rank_E = torch.full_like(histogram[:, 0], capacity - 1 + is_refused)
            self.bin[name], self.rank[name] = _bin_of_rank(histogram, rank_E)

    def scores(self) -> dict[str, Tensor]:
        """[E] float32 for each layer, put together from the two halves of its bits."""
        fine = {name: _bin_of_rank(low, self.rank[name])[0] for name, low in self.low.items()}
        return {name: ((self.bin[name] << _HALF_BITS) | fine[name]).int().view(torch.float32) for name in fine}


def _bounded_thresholds(
    model: nn.Module, blocks: dict[str, EcMoeBlock], batches: list[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """[E] for each layer: where the bounded rule gives every expert its share. Keeps all scores, 4 * T * E bytes."""
    kept: dict[str, list[Tensor]] = {name: [] for name in blocks}
    _collect_scores(model, blocks, batches, lambda name, scores_TE: kept[name].append(scores_TE))
    thresholds = {}
    for name, block in blocks.items():
        config, scores_TE = block.config, torch.cat(kept.pop(name))
        share = expert_capacity(len(scores_TE), config.num_experts, config.capacity_factor)
        most = config.max_experts_per_token or config.num_experts
        thresholds[name] = balanced_thresholds(scores_TE, share, config.min_experts_per_token, most)
    return thresholds


def _bits(scores_TE: Tensor) -> Tensor:
    return scores_TE.contiguous().view(torch.int32)


def _empty_histogram(block: EcMoeBlock) -> Tensor:
    return torch.zeros(block.config.num_experts, _BINS, dtype=torch.int64, device=block.gate.threshold.device)


def _count(histogram: Tensor, bins_TE: Tensor) -> None:
    """Adds the tokens' bins [T, E] to the histogram [E, bins]; a negative bin is not counted."""
    bins_ET = bins_TE.T.long()
    histogram.scatter_add_(1, bins_ET.clamp(min=0), (bins_ET >= 0).long())


def _bin_of_rank(histogram: Tensor, rank_E: Tensor) -> tuple[Tensor, Tensor]:
    """The bin [E] that holds the score with `rank_E` larger ones, and how many of those lie in that bin itself.

    When an expert takes every token there is no such score; the lowest bin stands for score 0.
    """
    above_or_in = histogram.flip(1).cumsum(1).flip(1)  # scores in this bin or a higher one
    bin_E = (above_or_in > rank_E[:, None]).sum(1) - 1
    found = bin_E >= 0
    bin_E = bin_E.clamp(min=0)
    inside = above_or_in.gather(1, bin_E[:, None])[:, 0] - histogram.gather(1, bin_E[:, None])[:, 0]
    return bin_E, torch.where(found, rank_E - inside, rank_E)


def _collect_scores(
    model: nn.Module,
    blocks: dict[str, EcMoeBlock],
    batches: list[Mapping[str, Tensor]],
    count: Callable[[str, Tensor], None],
) -> None:
    """Runs the batches and hands `count` each layer's scores of real tokens, [T, E] float32."""

    def hook_of(name: str, block: EcMoeBlock) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            scores_TE = output[1].float()
            count(name, scores_TE if block.token_mask is None else scores_TE[block.token_mask.flatten()])

        return hook

    handles = [block.gate.register_forward_hook(hook_of(name, block)) for name, block in blocks.items()]
    try:
        with use_inference_routing(model, "expert_choice"):
            _run(model, batches)
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, batches: list[Mapping[str, Tensor]]) -> None:
    """Forward passes in eval mode; the model is left in the mode it was in."""
    was_training = model.training
    model.eval()
    # Offloaded parameters are on the meta device between passes; their hooks move the inputs.
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    try:
        for batch in logging.tqdm(batches, desc="Calibrating thresholds", unit="batch"):
            model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
    finally:
        model.train(was_training)


@dataclass
class RoutingRecord:
    """Counts of the threshold routes of a model's real tokens, one entry per sparse layer."""

    num_experts: int
    capacity_factor: float
    tokens: dict[str, int] = field(default_factory=dict)
    chosen: dict[str, Tensor] = field(default_factory=dict)
    uncovered: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, routes_TE: Tensor) -> None:
        """Counts the routes [T, E] of one layer in one forward pass."""
        self._add(name, len(routes_TE), routes_TE.sum(0).cpu(), int((~routes_TE.any(-1)).sum()))

    def merge(self, other: "RoutingRecord") -> None:
        """Adds the counts of another record, of other batches or another rank."""
        for name in other.tokens:
            self._add(name, other.tokens[name], other.chosen[name], other.uncovered[name])

    def _add(self, name: str, tokens: int, chosen: Tensor, uncovered: int) -> None:
        self.tokens[name] = self.tokens.get(name, 0) + tokens
        self.chosen[name] = self.chosen.get(name, 0) + chosen
        self.uncovered[name] = self.uncovered.get(name, 0) + uncovered

    def load(self) -> list[list[float]]:
        """[layers][E], each expert's tokens relative to its equal share c * T / E; 1 is balance.

        Raises:
            ValueError: when nothing was recorded.
        """
        if not self.tokens:
            raise ValueError("no forward pass was recorded; open record_routing before a model is compiled and run")
        share = self.capacity_factor / self.num_experts
        return [(self.chosen[name] / (self.tokens[name] * share)).tolist() for name in self.tokens]

    def experts_per_token(self) -> float:
        """Mean over tokens and layers."""
        return sum(int(self.chosen[name].sum()) for name in self.tokens) / sum(self.tokens.values())

    def uncovered_share(self) -> float:
        """Share of the tokens that no expert chose, mean over layers."""
        return sum(self.uncovered.values()) / sum(self.tokens.values())

    def summary(self) -> dict[str, float]:
        """Least and largest load over all experts and layers, uncovered share, experts per token."""
        loads = [load for layer in self.load() for load in layer]
        return {
            "load_min": min(loads),
            "load_max": max(loads),
            "uncovered": self.uncovered_share(),
            "experts_per_token": self.experts_per_token(),
        }


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Counts the routes of every forward pass while the context is open, as threshold inference takes them."""
    blocks = sparse_blocks(model)
    config = next(iter(blocks.values())).config
    record = RoutingRecord(config.num_experts, float(config.capacity_factor))

    def hook_of(name: str, block: EcMoeBlock) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            routes_TE = block.routes(output[1], output[2])
            record.add(name, routes_TE if block.token_mask is None else routes_TE[block.token_mask.flatten()])

        return hook

    handles = [block.gate.register_forward_hook(hook_of(name, block)) for name, block in blocks.items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
