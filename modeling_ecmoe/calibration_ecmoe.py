"""Thresholds from data: exact quantiles of each expert's scores, or with bounds what balances the bounded rule."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches_ecmoe import Progress, as_batches, run_batches
from .block_ecmoe import EcMoeBlock
from .bounded_ecmoe import balanced_thresholds
from .context_ecmoe import use_inference_routing
from .global_pool_ecmoe import num_ranks
from .report_ecmoe import sparse_blocks
from .routing_ecmoe import between, choose_tokens, expert_capacity, off_the_scores

# A float32 score in [0, 1] has a bit pattern below 2^30, and patterns are ordered as the scores are. Two halves of
# 15 bits make two passes with small integer histograms find any quantile exactly, and histograms simply add up.
_HALF_BITS = 15
_BINS = 1 << _HALF_BITS
# Scores of this size are kept from the first pass, which saves the second.
_KEPT_BYTES = 1 << 28


@torch.no_grad()
def calibrate_thresholds(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]] | Iterable[str],
    tokenizer: Any = None,
    text_name: str = "text given to calibrate_thresholds",
    progress: Progress | None = None,
) -> None:
    """Sets every threshold so that its expert takes its share of the batches' real tokens.

    That is C = ceil(c * T / E) of T tokens: an exact quantile of the expert's scores, or with bounds on the experts
    of a token the thresholds at which the bounded rule gives every expert its share. The layers below route by
    expert choice among each batch meanwhile, as in training, so that the scores do not depend on the thresholds that
    are being replaced. The model is left in the mode it was in. In a distributed run every rank calls this, each with
    batches of its own: the histograms are added up, and all ranks get the thresholds of all batches.

    Args:
        model: any model of the family, also wrapped by PEFT.
        batches: keyword arguments of the model's forward, `input_ids` [B, S] and, with padding, `attention_mask`.
            Large batches of the text the model is meant for; where there are very many they are gone through twice.
            Or texts, or conversations as lists of messages.
        tokenizer: of the texts.
        text_name: what `config.thresholds_from` says afterwards, for whoever loads the model.
        progress: hands out the batches and shows how far they are, such as tqdm; None is Transformers' bar.

    Raises:
        ValueError: when there is no batch or padding alone, texts have no tokenizer, a score is no number, the model
            has no expert-choice layer, or its buffers are offloaded.
    """
    batches = as_batches(model, batches, tokenizer)
    blocks = sparse_blocks(model)
    if any(block.gate.threshold.is_meta for block in blocks.values()):
        raise ValueError("the thresholds are offloaded and cannot be set; load the model with offload_buffers=False")
    bounded = next(iter(blocks.values())).config.bounds_experts_per_token
    run = functools.partial(_collect_scores, model, blocks, batches, progress)
    if bounded:
        thresholds = _bounded_thresholds(blocks, run)
    else:
        thresholds = _quantile_thresholds(blocks, run, _scores_fit(blocks, batches))
    for name, block in blocks.items():
        block.gate.threshold.copy_(thresholds[name])
        # Worth as many optimiser steps as the running average remembers.
        block.gate.threshold_updates.fill_(round(1 / (1 - block.config.threshold_decay)))
        block.config.thresholds_from = text_name


_Count = Callable[[str, Tensor], None]


def _quantile_thresholds(
    blocks: dict[str, EcMoeBlock], run: Callable[[_Count], None], keeps_scores: bool
) -> dict[str, Tensor]:
    """[E] for each layer: midway between the last score that is chosen and the best that is refused.

    run: one pass over the text, which hands each layer's scores to what it is given.
    keeps_scores: whether the scores of the first pass are kept, or the text is gone through again.
    """
    high = {name: _empty_histogram(block) for name, block in blocks.items()}
    kept: list[tuple[str, Tensor]] | None = [] if keeps_scores else None

    def count_high(name: str, scores_TE: Tensor) -> None:
        _count(high[name], _bits(scores_TE) >> _HALF_BITS)
        if kept is not None:
            kept.append((name, scores_TE))

    run(count_high)
    _add_up_ranks(high.values())
    _check_any_token(int(histogram[0].sum()) for histogram in high.values())
    # The last chosen and the best refused score, so that `score > threshold` takes exactly C tokens and neither of
    # the two sits on the border, where a rounding error would decide.
    sides = [_Side(blocks, high, is_refused) for is_refused in (0, 1)]
    for name in blocks:  # in the memory of the coarse ones, which of 128 experts and 48 layers is 0.8 GB
        low = high.pop(name).zero_()
        # Mostly both scores lie in the same coarse bins, and are counted once.
        is_shared = torch.equal(sides[0].bin[name], sides[1].bin[name])
        sides[0].low[name], sides[1].low[name] = low, low if is_shared else torch.zeros_like(low)

    def count_low(name: str, scores_TE: Tensor) -> None:
        bits_TE = _bits(scores_TE)
        for side in sides if sides[1].low[name] is not sides[0].low[name] else sides[:1]:
            inside_TE = (bits_TE >> _HALF_BITS) == side.bin[name]
            _count(side.low[name], torch.where(inside_TE, bits_TE & (_BINS - 1), -1))

    if kept is None:
        run(count_low)
    else:
        for name, scores_TE in kept:
            count_low(name, scores_TE)
    # Each once: in the same order on every rank, for all have the same bins.
    _add_up_ranks({id(low): low for side in sides for low in side.low.values()}.values())
    chosen, refused = (side.scores() for side in sides)
    return {name: between(chosen[name], refused[name]) for name in blocks}


def _scores_fit(blocks: dict[str, EcMoeBlock], batches: list[Mapping[str, Tensor]]) -> bool:
    """Whether the scores of all layers are few enough to be kept; all ranks say the same, for they run together."""
    first = next(iter(blocks.values()))
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    if num_ranks() > 1:
        most = torch.tensor(tokens, device=first.gate.threshold.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        tokens = int(most)
    return 4 * tokens * first.config.num_experts * len(blocks) <= _KEPT_BYTES


class _Side:
    """One side of the threshold: the coarse bin of its score, and the fine histogram inside that bin."""

    def __init__(self, blocks: dict[str, EcMoeBlock], high: dict[str, Tensor], is_refused: int) -> None:
        self.low: dict[str, Tensor] = {}
        self.bin: dict[str, Tensor] = {}
        self.rank: dict[str, Tensor] = {}
        for name, block in blocks.items():
            config, histogram = block.config, high[name]
            capacity = expert_capacity(int(histogram[0].sum()), config.num_experts, config.capacity_factor)
            rank_E = torch.full_like(histogram[:, 0], capacity - 1 + is_refused, dtype=torch.int64)
            self.bin[name], self.rank[name] = _bin_of_rank(histogram, rank_E)

    def scores(self) -> dict[str, Tensor]:
        """[E] float32 for each layer, put together from the two halves of its bits."""
        fine = {name: _bin_of_rank(low, self.rank[name])[0] for name, low in self.low.items()}
        return {name: ((self.bin[name] << _HALF_BITS) | fine[name]).int().view(torch.float32) for name in fine}


def _bounded_thresholds(blocks: dict[str, EcMoeBlock], run: Callable[[_Count], None]) -> dict[str, Tensor]:
    """[E] for each layer: where the bounded rule gives every expert its share. Keeps all scores, 4 * T * E bytes."""
    kept: dict[str, list[Tensor]] = {name: [] for name in blocks}
    run(lambda name, scores_TE: kept[name].append(scores_TE))
    thresholds = {}
    for name, block in blocks.items():
        scores_TE = _gather_ranks(torch.cat(kept.pop(name)))
        _check_any_token([len(scores_TE)])
        thresholds[name] = thresholds_of_scores(scores_TE, block.config)
    return thresholds


def thresholds_of_scores(scores_TE: Tensor, config: Any) -> Tensor:
    """[E] thresholds at which each expert takes its share C of these scores [T, E], with the config's bounds."""
    if not config.bounds_experts_per_token:
        return choose_tokens(scores_TE[None], config.capacity_factor).threshold
    most = config.max_experts_per_token or config.num_experts
    bounds = config.min_experts_per_token, most
    found_E = balanced_thresholds(scores_TE, config.capacity_factor, *bounds, config.num_expert_groups)
    return off_the_scores(found_E, scores_TE)


def _add_up_ranks(histograms: Iterable[Tensor]) -> None:
    if num_ranks() > 1:
        for histogram in histograms:
            torch.distributed.all_reduce(histogram)


def _gather_ranks(scores_TE: Tensor) -> Tensor:
    """The scores of all ranks, which may have different numbers of tokens, in the order of the ranks."""
    if num_ranks() == 1:
        return scores_TE
    sizes = [torch.zeros((), dtype=torch.long, device=scores_TE.device) for _ in range(num_ranks())]
    torch.distributed.all_gather(sizes, torch.tensor(len(scores_TE), device=scores_TE.device))
    longest = max(map(int, sizes))
    padded = torch.nn.functional.pad(scores_TE, (0, 0, 0, longest - len(scores_TE)))
    gathered = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def _check_any_token(numbers: Iterable[int]) -> None:
    """Of the layers' tokens, which are the same ones in every layer; after those of all ranks are there."""
    if not all(numbers):
        raise ValueError(
            "the attention_mask of every batch is 0 throughout: calibrate_thresholds needs tokens that are no padding"
        )


def _bits(scores_TE: Tensor) -> Tensor:
    return scores_TE.contiguous().view(torch.int32)


def _empty_histogram(block: EcMoeBlock) -> Tensor:
    return torch.zeros(block.config.num_experts, _BINS, dtype=torch.int32, device=block.gate.threshold.device)


def _count(histogram: Tensor, bins_TE: Tensor) -> None:
    """Adds the tokens' bins [T, E] to the histogram [E, bins]; a negative bin is not counted."""
    bins_ET = bins_TE.T.long()
    histogram.scatter_add_(1, bins_ET.clamp(min=0), (bins_ET >= 0).to(histogram.dtype))


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
    progress: Progress | None,
    count: _Count,
) -> None:
    """Runs the batches and hands `count` each layer's scores of real tokens, [T, E] float32."""

    def hook_of(name: str, block: EcMoeBlock) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            scores_TE = output[1].float()
            if block.token_mask is not None:
                scores_TE = scores_TE[block.token_mask.flatten()]
            if not scores_TE.isfinite().all():  # before experts choose by them
                raise ValueError(
                    f"the router scores of {name} are no numbers: its weights or those of a layer before it are "
                    "damaged, or float16 overflows; load the checkpoint anew, in bfloat16 or float32"
                )
            count(name, scores_TE)

        return hook

    handles = [block.gate.register_forward_hook(hook_of(name, block)) for name, block in blocks.items()]
    try:
        with use_inference_routing(model, "expert_choice"):
            run_batches(model, batches, "Calibrating thresholds", progress)
    finally:
        for handle in handles:
            handle.remove()
