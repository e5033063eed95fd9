"""The router: scores in full precision, and the thresholds that every optimiser step brings up to date.

Shapes: T tokens, D hidden size, E experts.
"""

import copy
import itertools
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast

from .precision_ecmoe import warn_lost_steps
from .routing_ecmoe import router_scores

logger = logging.get_logger(__name__)

_router_number = itertools.count()
_routers: "weakref.WeakSet[EcMoeRouter]" = weakref.WeakSet()


class FullProduct(torch.autograd.Function):
    """Scores of 16-bit inputs [T, D] and weights [E, D] in float32: [T, E].

    Two 16-bit numbers have a product that is exact in float32, so that a GPU's 16-bit units, which add up in float32,
    give what float32 inputs would give but for the order of the sum. For backward the 16-bit inputs are kept, half of
    what autograd would keep.
    """

    @staticmethod
    def forward(ctx: Any, inputs_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(inputs_TD, weight_ED)
        return full_product(inputs_TD, weight_ED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        inputs_TD, weight_ED = ctx.saved_tensors
        with maybe_autocast(grad_TE.device.type, enabled=False):
            grad_inputs = (grad_TE @ weight_ED.float()).to(inputs_TD.dtype) if ctx.needs_input_grad[0] else None
            grad_weight = (grad_TE.mT @ inputs_TD.float()).to(weight_ED.dtype) if ctx.needs_input_grad[1] else None
        return grad_inputs, grad_weight


def full_product(inputs_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """What `FullProduct` computes, for autograd to differentiate or for nobody."""
    if inputs_TD.is_cuda and _has_float32_products:
        return torch.mm(inputs_TD, weight_ED.mT, out_dtype=torch.float32)
    return nn.functional.linear(inputs_TD.float(), weight_ED.float())


# `torch.mm` of 16-bit matrices into float32 came with torch 2.8, on CUDA alone.
_has_float32_products = hasattr(torch.ops.aten.mm, "dtype") and torch.version.hip is None


class EcMoeRouter(nn.Module):
    """Scores every token for every expert, and keeps the score at which each expert stops choosing.

    weight: [E, D] float. No bias.
    threshold: [E] float32 buffer, saved with the model whatever its dtype.
    threshold_updates: [] int64 buffer, how many optimiser steps the threshold averages; 0 is never calibrated.
    """

    threshold: Tensor
    threshold_updates: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.score_function = config.router_score_function
        self.threshold_decay = config.threshold_decay
        self.jitter = config.router_jitter_noise
        self.num_experts, self.hidden_size = config.num_experts, config.hidden_size
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_size))
        self.register_buffer("threshold", torch.zeros(config.num_experts, dtype=torch.float32))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.int64))
        # Of this step's micro-batches: the token-weighted sum of their thresholds [E] and, last, their tokens. No
        # buffer, because DDP would overwrite every rank's with the first one's before each forward pass.
        self.pending: Tensor | None = None
        if not self.weight.is_meta:
            self._allocate_pending()
        self.has_pending = False
        self.is_checked = False
        self._enlist()

    def _enlist(self) -> None:
        self.number = next(_router_number)  # the same order on every rank
        _routers.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enlist()  # a deep copy is a router of its own

    def __deepcopy__(self, memo: dict[int, Any]) -> "EcMoeRouter":
        """A router that is copied by itself, as PEFT's `modules_to_save` does, keeps the model's config, which says
        where its thresholds come from."""
        if not memo:
            memo[id(self.config)] = self.config
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(self.__dict__, memo))
        return other

    def forward(self, hidden_states: Tensor, jitter: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [T, D] -> router logits [T, E], scores [T, E] in float32 (float64 for a float64 model), and
        the thresholds [E], which are handed out here because an offloaded router has them only while it runs.

        Full precision whatever the model's dtype and autocast: a near tie that flips between two passes would
        send a token to another expert.

        jitter: whether to multiply the input by uniform noise from [1 - jitter, 1 + jitter] (Switch Transformer,
            arXiv 2101.03961, section 2.4). Gradient checkpointing replays the random state, so both passes agree.
        """
        if jitter and self.jitter > 0:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(1 - self.jitter, 1 + self.jitter)
        dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            is_16_bit = hidden_states.dtype == self.weight.dtype != dtype
            if is_16_bit and type(self.weight) is nn.Parameter and not torch.compiler.is_compiling():
                product = FullProduct.apply if torch.is_grad_enabled() else full_product
                router_logits = product(hidden_states, self.weight)
            else:
                router_logits = nn.functional.linear(hidden_states.to(dtype), self.weight.to(dtype))
            return router_logits, router_scores(router_logits, self.score_function), self.threshold

    def warn_uncalibrated(self) -> None:
        """Says once that thresholds which were never set let every expert take every token."""
        if self.is_checked or torch.compiler.is_compiling() or self.threshold_updates.is_meta:
            return
        self.is_checked = True  # the counter is read back to the host once
        if self.threshold_updates == 0:
            logger.warning_once(
                "This model's thresholds were never calibrated, so every expert takes every token. Run "
                "ecmoe.calibrate_thresholds(model, texts, tokenizer) on text the model is meant for, or train first."
            )

    def _allocate_pending(self, device: torch.device | None = None) -> Tensor:
        """The pending sums, on the device that scores are computed on; a model loaded from disk is built without."""
        device = self.weight.device if device is None else device
        if self.pending is None:
            with torch.inference_mode(False):  # training adds to it in place, wherever it was made
                self.pending = torch.zeros(len(self.threshold) + 1, dtype=torch.float32, device=device)
        elif self.pending.device != device:
            self.pending = self.pending.to(device)
        return self.pending

    def train(self, mode: bool = True) -> "EcMoeRouter":
        if mode and not self.weight.is_meta:
            self._allocate_pending()
        return super().train(mode)

    def expect_thresholds(self) -> None:
        """Before a training pass, which cannot set the flag once it is compiled. A method, so that PEFT's wrapper of
        the router hands it on to the router that it uses."""
        self._allocate_pending()
        self.has_pending = True

    @torch.no_grad()
    def record_threshold(self, threshold: Tensor, num_tokens: Tensor | int) -> None:
        """Adds one micro-batch's threshold [E] to what the next optimiser step averages.

        A layer recomputed under gradient checkpointing adds the same value with the same weight again, which
        leaves the mean of the step as it is. A micro-batch whose scores overflowed is left out: its optimiser step
        may be skipped, and an average never recovers from NaN.
        """
        pending = self._allocate_pending(threshold.device)
        is_finite = threshold.isfinite().all()
        pending[:-1] += torch.where(is_finite, threshold * num_tokens, 0)
        pending[-1] += is_finite * num_tokens
        if not torch.compiler.is_compiling():  # there `expect_thresholds` has said so
            self.has_pending = True

    @torch.no_grad()
    def record_load(self, expert_TK: Tensor, mask_T: Tensor | None) -> None:
        """Adds how many of a micro-batch's real tokens chose each expert, for the thresholds that token choice nudges.

        expert_TK: [T, K] long, each token's experts. mask_T: [T] bool, True for real tokens; None when all are.
        """
        pending = self._allocate_pending(expert_TK.device)
        is_real_TK = torch.ones_like(expert_TK) if mask_T is None else mask_T[:, None].expand_as(expert_TK)
        pending[:-1].scatter_add_(0, expert_TK.flatten(), is_real_TK.flatten().to(pending.dtype))
        pending[-1] += is_real_TK[:, 0].sum()
        if not torch.compiler.is_compiling():
            self.has_pending = True

    @torch.no_grad()
    def update_threshold(self) -> None:
        """Brings the threshold up to date after an optimiser step: nudged where tokens choose, averaged elsewhere."""
        if self.config.routing == "token_choice":
            self._nudge_threshold()
        else:
            self._average_threshold()

    def _nudge_threshold(self) -> None:
        """A little up where an expert was chosen more often than the mean, a little down where less (arXiv 2408.15664,
        algorithm 1, with b = -threshold)."""
        rate, pending = self.config.token_choice_bias_update_rate, self._allocate_pending(self.threshold.device)
        if self.threshold.dtype != torch.float32:
            self.threshold.data = self.threshold.float()
        if rate:
            self.threshold.add_((pending[:-1] - pending[:-1].mean()).sign(), alpha=rate)
        self.threshold_updates.add_(pending[-1] > 0)
        pending.zero_()
        self.has_pending = False

    def _average_threshold(self) -> None:
        """Folds the pending mean into the threshold: a bias-corrected moving average, as in Adam.

        With m_n = decay * m_(n-1) + (1 - decay) * x_n and threshold_n = m_n / (1 - decay^n), m need not be kept.
        """
        pending = self._allocate_pending(self.threshold.device)
        if self.config.thresholds_from is not None:  # until they are measured again
            self.config.thresholds_from = None
        if self.threshold.dtype != torch.float32:  # FSDP1's mixed precision casts buffers; small steps round away
            self.threshold.data = self.threshold.float()
        keep: Tensor | float = 0.0
        if self.threshold_decay > 0:
            # 1 - decay^n as expm1, which keeps its digits when decay is near 1.
            log_decay = math.log(self.threshold_decay)
            steps = self.threshold_updates.float()
            keep = self.threshold_decay * torch.expm1(steps * log_decay) / torch.expm1((steps + 1) * log_decay)
        seen = pending[-1] > 0
        mean = pending[:-1] / pending[-1].clamp(min=1)
        self.threshold.copy_(torch.where(seen, keep * self.threshold + (1 - keep) * mean, self.threshold))
        self.threshold_updates.add_(seen)
        pending.zero_()
        self.has_pending = False

    def _apply(self, fn: Any, recurse: bool = True) -> "EcMoeRouter":
        """Moves with the model, but a change of dtype leaves the float32 thresholds as they are."""
        threshold = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype != torch.float32:
            moved = self.threshold
            self.threshold = moved.float() if threshold.is_meta else threshold.to(moved.device)
        if self.pending is not None and not self.weight.is_meta:
            self.pending = self.pending.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, score={self.score_function}"


def _after_step(optimizer: Any, *_: Any) -> None:
    """Runs after every optimiser step, so that a model keeps its thresholds under any trainer.

    An optimiser that steps parameter by parameter does so while layers are still recomputed for their gradients, and
    these must meet the thresholds of the forward pass: then the update waits for the end of the backward pass.
    """
    if any(router.has_pending for router in _routers):
        warn_lost_steps(optimizer)
    if torch._C._current_graph_task_id() == -1:
        _update_thresholds()
    else:
        torch.autograd.Variable._execution_engine.queue_callback(_update_thresholds)


def _update_thresholds() -> None:
    """Every rank averages over the same routers in the same order; one collective carries them all."""
    routers = sorted((router for router in _routers if router.has_pending), key=lambda router: router.number)
    if not routers:
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Where the passes left them: with parameters offloaded, only that device has a communicator.
        pending = [router.pending for router in routers if router.pending is not None]
        summed = torch.cat([p.to(pending[0].device) for p in pending])
        torch.distributed.all_reduce(summed)
        for own, total in zip(pending, summed.split([len(p) for p in pending]), strict=True):
            own.copy_(total)
    for router in routers:
        router.update_threshold()


register_optimizer_step_post_hook(_after_step)
