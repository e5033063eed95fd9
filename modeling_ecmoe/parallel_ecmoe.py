"""Expert parallelism with equal splits: what expert choice makes possible and token choice does not.

Each rank chooses C tokens for every one of the E experts among its own, whatever the text. So each rank sends each
other rank the same number of rows, known before anything was routed: no sizes are exchanged, nothing is read back to
the host, and E * C * D values go out and as many come back, the least that any dispatch of these rows can carry.
Select it by `DistributedConfig(..., ep_implementation="equal_splits")`.
"""

from typing import Any

import torch
from torch import Tensor

from .versions_ecmoe import AutoEP


class EqualSplitsEP(AutoEP):
    """Rows to the ranks that own their experts and back, by two all-to-alls of equal splits.

    The ranks must hold as many tokens each, as packed sequences give them; padding counts, and the first call checks.
    What is not expert choice among a rank's own tokens (threshold routing, the global pool, tensor parallelism) goes
    Transformers' way.
    """

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.is_checked = False

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Rows [R, D] with their experts [R, K] and weights [R, K] -> [R, D]."""
        rows_per_expert = self.experts.rows_per_expert
        if rows_per_expert is None or self.tp_mesh.size() > 1:
            output: Tensor = super().__call__(hidden_states, top_k_index, top_k_weights)
            return output
        self._check_once(hidden_states, rows_per_expert)
        # R = E * C rows, C of each expert in turn, unweighted; E / ranks experts and R of their rows are ours.
        ranks, group = self.ep_mesh.size(), self.ep_mesh.get_group()
        by_rank = (ranks, self.num_local_experts, rows_per_expert, -1)
        received_RD = _AllToAll.apply(hidden_states, group)
        mine_RD = received_RD.view(by_rank).transpose(0, 1).flatten(0, 2)  # all rows of one expert together
        mine_RD = self.experts_forward(mine_RD, top_k_index, top_k_weights, rows_per_expert=ranks * rows_per_expert)
        by_expert = (self.num_local_experts, ranks, rows_per_expert, -1)
        return _AllToAll.apply(mine_RD.view(by_expert).transpose(0, 1).flatten(0, 2), group)

    def _check_once(self, rows_RD: Tensor, rows_per_expert: int) -> None:
        """In the first call alone, which is every rank's first: later ones would read from the device each time.

        Raises:
            ValueError: when the ranks hold different numbers of tokens, of which a collective would hang or abort.
        """
        if self.is_checked:
            return
        self.is_checked = True
        extremes = torch.tensor([rows_per_expert, -rows_per_expert], device=rows_RD.device)
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group=self.ep_mesh.get_group())
        most, least = int(extremes[0]), -int(extremes[1])
        if most != least:
            raise ValueError(
                f"ep_implementation=equal_splits needs as many tokens on every rank, and experts take from {least} to "
                f"{most} rows of one; pack the sequences, or set ep_implementation=all_to_all"
            )


class _AllToAll(torch.autograd.Function):
    """An equal part of the rows [R, D] to each rank of the group, in the order of the ranks; its own gradient."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received_RD = torch.empty_like(rows_RD, memory_format=torch.contiguous_format)
        torch.distributed.all_to_all_single(received_RD, rows_RD.contiguous(), group=group)
        return received_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad_RD, ctx.group), None
