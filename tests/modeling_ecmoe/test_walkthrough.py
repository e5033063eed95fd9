"""Expert choice by hand: six tokens, three or five experts that take their top two or top three, every table written
out.

The numbers come out as fractions because the router's rows are whole numbers times log 2: a token's score for an
expert is 2^affinity over the sum of its 2^affinity. The experts are gated FFNs, as the package has them, with ReLU.
A token's third coordinate is 1, and up_proj reads it alone, so that relu(gate x) * (up x) is the plain relu(gate x).
"""

import math

import pytest
import torch
from blocks import build_block
from torch import Tensor

from modeling_ecmoe.block_ecmoe import EcMoeBlock
from modeling_ecmoe.routing_ecmoe import choose_tokens, combine_weights

TOKENS = [[2, 0, 1], [0, 1, 1], [1, 2, 1], [1, 0, 1], [0, 3, 1], [3, 1, 1]]
ROUTER = [[1, 0, 0], [0, 0, 0], [1, -1, 1], [0, 0, 1], [0, -1, 1]]  # times log 2, a row for each expert
# relu of (a, b), (a - b, b - a), (1 - a, 2 - b), (a + b - 1, 0) and (1, a - 1) for a token (a, b, 1); the third
# coordinate of an output is 0.
GATE = [
    [[1, 0, 0], [0, 1, 0]],
    [[1, -1, 0], [-1, 1, 0]],
    [[-1, 0, 1], [0, -1, 2]],
    [[1, 1, -1], [0, 0, 0]],
    [[0, 0, 1], [1, 0, -1]],
]
UP = [[0, 0, 1], [0, 0, 1]]
DOWN = [[1, 0], [0, 1], [0, 0]]

AFFINITY = [  # [token][expert]: tokens times router
    [2, 0, 3, 1, 1],
    [0, 0, 0, 1, 0],
    [1, 0, 0, 1, -1],
    [1, 0, 2, 1, 1],
    [0, 0, -2, 1, -2],
    [3, 0, 3, 1, 0],
]
SCORES = {
    3: [
        [4 / 13, 1 / 13, 8 / 13],  # 2^2, 2^0, 2^3 of 13
        [1 / 3, 1 / 3, 1 / 3],
        [1 / 2, 1 / 4, 1 / 4],
        [2 / 7, 1 / 7, 4 / 7],
        [4 / 9, 4 / 9, 1 / 9],  # 1, 1, 1/4 of 9/4
        [8 / 17, 1 / 17, 8 / 17],
    ],
    5: [
        [4 / 17, 1 / 17, 8 / 17, 2 / 17, 2 / 17],
        [1 / 6, 1 / 6, 1 / 6, 1 / 3, 1 / 6],
        [4 / 13, 2 / 13, 2 / 13, 4 / 13, 1 / 13],
        [2 / 11, 1 / 11, 4 / 11, 2 / 11, 2 / 11],
        [2 / 9, 2 / 9, 1 / 18, 4 / 9, 1 / 18],
        [2 / 5, 1 / 20, 2 / 5, 1 / 10, 1 / 20],
    ],
}
# [expert][rank]: the two tables that sorting each column of the scores gives, their first three rows.
SORTED_GATES = {
    3: [[1 / 2, 8 / 17, 4 / 9], [4 / 9, 1 / 3, 1 / 4], [8 / 13, 4 / 7, 8 / 17]],
    5: [
        [2 / 5, 4 / 13, 4 / 17],
        [2 / 9, 1 / 6, 2 / 13],
        [8 / 17, 2 / 5, 4 / 11],
        [4 / 9, 1 / 3, 4 / 13],
        [2 / 11, 1 / 6, 2 / 17],
    ],
}
SORTED_TOKENS = {
    3: [[2, 5, 4], [4, 1, 2], [0, 3, 5]],
    5: [[5, 2, 0], [4, 1, 2], [0, 5, 3], [4, 1, 2], [3, 1, 0]],
}
OUTPUTS = {  # [expert][rank]: what the expert makes of the token of that rank
    3: [
        [[1, 2, 0], [3, 1, 0], [0, 3, 0]],
        [[0, 3, 0], [0, 1, 0], [0, 1, 0]],
        [[0, 2, 0], [0, 2, 0], [0, 1, 0]],
    ],
    5: [
        [[3, 1, 0], [1, 2, 0], [2, 0, 0]],
        [[0, 3, 0], [0, 1, 0], [0, 1, 0]],
        [[0, 2, 0], [0, 1, 0], [0, 2, 0]],
        [[2, 0, 0], [0, 0, 0], [2, 0, 0]],
        [[1, 0, 0], [1, 0, 0], [1, 1, 0]],
    ],
}
AGGREGATES = {  # (experts, top): [token], the sum of gate times output over the experts that took the token
    (3, 2): [
        [0, 16 / 13, 0],  # expert 2: 8/13 * (0, 2)
        [0, 1 / 3, 0],  # expert 1: 1/3 * (0, 1)
        [1 / 2, 1, 0],  # expert 0: 1/2 * (1, 2)
        [0, 8 / 7, 0],  # expert 2: 4/7 * (0, 2)
        [0, 4 / 3, 0],  # expert 1: 4/9 * (0, 3)
        [24 / 17, 8 / 17, 0],  # expert 0: 8/17 * (3, 1)
    ],
    (3, 3): [
        [0, 16 / 13, 0],
        [0, 1 / 3, 0],
        [1 / 2, 5 / 4, 0],  # and expert 1: 1/4 * (0, 1)
        [0, 8 / 7, 0],
        [0, 8 / 3, 0],  # and expert 0: 4/9 * (0, 3)
        [24 / 17, 16 / 17, 0],  # and expert 2: 8/17 * (0, 1)
    ],
    (5, 2): [
        [0, 16 / 17, 0],  # expert 2: 8/17 * (0, 2)
        [1 / 6, 1 / 6, 0],  # experts 1, 3 and 4: 1/6 * (0, 1) + 1/3 * (0, 0) + 1/6 * (1, 0)
        [4 / 13, 8 / 13, 0],  # expert 0: 4/13 * (1, 2)
        [2 / 11, 0, 0],  # expert 4: 2/11 * (1, 0)
        [8 / 9, 2 / 3, 0],  # experts 1 and 3: 2/9 * (0, 3) + 4/9 * (2, 0)
        [6 / 5, 4 / 5, 0],  # experts 0 and 2: 2/5 * (3, 1) + 2/5 * (0, 1)
    ],
    (5, 3): [
        [10 / 17, 2 / 17 + 16 / 17, 0],  # and experts 0 and 4: 4/17 * (2, 0) + 2/17 * (1, 1)
        [1 / 6, 1 / 6, 0],
        [12 / 13, 10 / 13, 0],  # and experts 1 and 3: 2/13 * (0, 1) + 4/13 * (2, 0)
        [2 / 11, 8 / 11, 0],  # and expert 2: 4/11 * (0, 2)
        [8 / 9, 2 / 3, 0],
        [6 / 5, 4 / 5, 0],
    ],
}
# C = ceil(c * 6 / E): 1 * 6 / 3, 1.5 * 6 / 3, 1.6 * 6 / 5 = 1.92, 2.5 * 6 / 5
CAPACITY_FACTOR = {(3, 2): 1.0, (3, 3): 1.5, (5, 2): 1.6, (5, 3): 2.5}


def table(numbers: list) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(("experts", "top"), CAPACITY_FACTOR)
def test_walk_through(experts: int, top: int) -> None:
    factor = CAPACITY_FACTOR[experts, top]
    block = walked_block(experts, factor)
    tokens_TD = table(TOKENS)

    logits_TE, scores_TE, _ = block.gate(tokens_TD)
    torch.testing.assert_close(logits_TE / math.log(2), table(AFFINITY)[:, :experts])
    torch.testing.assert_close(scores_TE, table(SCORES[experts]))
    torch.testing.assert_close(scores_TE.sum(1), torch.ones(6, dtype=torch.float64))

    choice = choose_tokens(scores_TE[None], factor)
    assert choice.is_chosen.all()
    torch.testing.assert_close(choice.scores, table(SORTED_GATES[experts])[:, :top])
    assert choice.token_index.tolist() == [row[:top] for row in SORTED_TOKENS[experts]]

    index_R = choice.token_index.flatten()
    nothing = torch.empty(0)
    outputs_RD = block.experts(tokens_TD[index_R], nothing, nothing, rows_per_expert=top)
    torch.testing.assert_close(outputs_RD.view(experts, top, 3), table(OUTPUTS[experts])[:, :top])

    weight_R, _ = combine_weights(choice.scores.flatten(), index_R, 6, normalize=False)
    aggregate_TD = torch.zeros_like(tokens_TD).index_add(0, index_R, outputs_RD * weight_R[:, None])
    torch.testing.assert_close(aggregate_TD, table(AGGREGATES[experts, top]))
    torch.testing.assert_close(block(tokens_TD[None])[0], table(AGGREGATES[experts, top]))
    torch.testing.assert_close(block(tokens_TD.view(2, 3, 3)).view(6, 3), table(AGGREGATES[experts, top]))


@pytest.mark.parametrize(("experts", "top"), CAPACITY_FACTOR)
def test_the_thresholds_take_the_same_tokens(experts: int, top: int) -> None:
    """Each threshold lies midway between the last gate taken and the next; in eval mode the sum is the same."""
    block = walked_block(experts, CAPACITY_FACTOR[experts, top])
    block(table(TOKENS)[None])
    block.gate.update_threshold()
    ranked_TE = table(SCORES[experts]).sort(dim=0, descending=True).values
    expected = (ranked_TE[top - 1] + ranked_TE[top]) / 2
    torch.testing.assert_close(block.gate.threshold, expected.float())
    torch.testing.assert_close(block.eval()(table(TOKENS)[None])[0], table(AGGREGATES[experts, top]))


def walked_block(experts: int, factor: float) -> EcMoeBlock:
    block = build_block(
        hidden_size=3, intermediate_size=2, hidden_act="relu", num_experts=experts, capacity_factor=factor
    ).train()
    with torch.no_grad():
        block.gate.weight.copy_(table(ROUTER)[:experts] * math.log(2))
        block.experts.gate_up_proj.copy_(torch.cat([table(GATE), table(UP).expand(5, 2, 3)], dim=1)[:experts])
        block.experts.down_proj.copy_(table(DOWN).expand(experts, 3, 2))
    return block
