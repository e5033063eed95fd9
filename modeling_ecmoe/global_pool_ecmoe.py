"""Expert choice among the tokens of all data-parallel ranks: scores travel, tokens do not.

Shapes: T tokens of this rank, N of all, E experts, F = E + 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .routing_ecmoe import ExpertChoice


def num_ranks() -> int:
    """Processes of the distributed run, 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def choose_among_all_ranks(
    choose: Callable[[Tensor, Tensor, bool], ExpertChoice], scores_TE: Tensor, mask_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The local part [T, E] of the routes that experts choose among the tokens of all ranks, and the thresholds [E].

    How many rows an expert gets on one rank is no longer fixed.

    Args:
        choose: of the scores [1, N, E] and the mask [1, N] of all ranks, while learning.
        scores_TE: of this rank's tokens.
        mask_T: True for real tokens.
    """
    num_tokens = len(scores_TE)
    mask_T = torch.ones_like(scores_TE[:, 0], dtype=torch.bool) if mask_T is None else mask_T
    longest = torch.tensor(num_tokens, device=scores_TE.device)
    torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
    size = int(longest)  # ranks may differ in batch shape; what is filled in counts as padding
    padded_NF = torch.cat([scores_TE.detach(), mask_T[:, None].to(scores_TE.dtype)], dim=1)
    padded_NF = nn.functional.pad(padded_NF, (0, 0, 0, size - num_tokens))
    gathered = [torch.empty_like(padded_NF) for _ in range(num_ranks())]
    torch.distributed.all_gather(gathered, padded_NF.contiguous())
    everyone_NF = torch.cat(gathered)
    choice = choose(everyone_NF[None, :, :-1], everyone_NF[None, :, -1] > 0, True)
    routes_NE = torch.zeros_like(everyone_NF[:, :-1], dtype=torch.long)
    routes_NE.scatter_add_(0, choice.token_index.T, choice.is_chosen.T.long())
    first = torch.distributed.get_rank() * size
    return routes_NE[first : first + num_tokens] > 0, choice.threshold
