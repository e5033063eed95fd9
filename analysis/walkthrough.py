"""Expert choice on numbers small enough to follow by hand, every one of them computed by the library itself."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from modeling_ecmoe import EcMoeLlamaConfig
from modeling_ecmoe.block_ecmoe import EcMoeBlock
from modeling_ecmoe.routing_ecmoe import choose_experts, choose_tokens

from .errors import AnalysisError

NUM_TOKENS, NUM_FEATURES, WIDTH = 6, 2, 2


@dataclass(frozen=True)
class Walkthrough:
    """Every table of one layer's pass. T tokens, E experts, C rows per expert, D features, I neurons.

    tokens [T, D] and experts [E, D] embeddings; affinity [T, E] = tokens @ experts.T; scores [T, E], its softmax over
    experts; gates and index [E, C], each expert's best scores and whose they are; hidden [E, C, I] =
    relu(W1 x) with W1 [E, I, D]; outputs [E, C, D] = W2 hidden with W2 [E, D, I]; aggregate [T, D], the sum of gate
    times output over the experts that took the token. chosen_experts [T, K] and load [E]: the same scores under token
    choice, each token taking its K = E C / T best experts, the mean that it has here.
    """

    tokens: Tensor
    experts: Tensor
    affinity: Tensor
    scores: Tensor
    gates: Tensor
    index: Tensor
    w1: Tensor
    hidden: Tensor
    w2: Tensor
    outputs: Tensor
    aggregate: Tensor
    chosen_experts: Tensor
    load: Tensor


def walk_through(
    num_experts: int = 3, top: int = 2, seed: int = 0, matrices: dict[str, Any] | None = None
) -> Walkthrough:
    """Computes every table.

    Args:
        num_experts: E.
        top: tokens that each expert takes, C.
        seed: of the matrices where none are given: small whole numbers.
        matrices: tokens [T, D], experts [E, D], w1 [E, I, D] and w2 [E, D, I], all of them.

    Raises:
        AnalysisError: when the matrices do not fit together, or an expert is to take more tokens than there are.
    """
    tensors = _matrices(matrices) if matrices is not None else _drawn(num_experts, seed)
    tokens_TD, experts_ED, w1_EID, w2_EDI = tensors
    num_tokens, num_experts = len(tokens_TD), len(experts_ED)
    if not 1 <= top <= num_tokens:
        raise AnalysisError(f"top={top} must be between 1 and the number of tokens, {num_tokens}")
    # The capacity is rounded up; half a token less gives `top` whatever the division rounds to.
    capacity_factor = (top - 0.5) * num_experts / num_tokens
    block = _block(experts_ED, w1_EID, w2_EDI, capacity_factor)
    inputs_TF = _with_one(tokens_TD)
    logits_TE, scores_TE, _ = block.gate(inputs_TF)
    choice = choose_tokens(scores_TE[None], capacity_factor)
    gates_EC, index_EC = choice.scores, choice.token_index
    hidden_ECI = torch.einsum("ecd,eid->eci", tokens_TD[index_EC], w1_EID).relu()
    nothing = torch.empty(0)
    outputs_RF = block.experts(inputs_TF[index_EC.flatten()], nothing, nothing, rows_per_expert=top)
    # As many experts per token as here on the mean, so that both do the same work.
    per_token = max(1, min(num_experts, math.floor(top * num_experts / num_tokens + 0.5)))
    chosen_TK, _ = choose_experts(scores_TE, per_token, None, None)
    return Walkthrough(
        tokens=tokens_TD,
        experts=experts_ED,
        affinity=logits_TE,
        scores=scores_TE,
        gates=gates_EC,
        index=index_EC,
        w1=w1_EID,
        hidden=hidden_ECI,
        w2=w2_EDI,
        outputs=outputs_RF[:, :-1].view(num_experts, top, -1),
        aggregate=block(inputs_TF[None])[0, :, :-1],
        chosen_experts=chosen_TK,
        load=chosen_TK.flatten().bincount(minlength=num_experts),
    )


def read_matrices(path: Path) -> dict[str, Any]:
    """Matrices from a JSON file with tokens, experts, w1 and w2 as nested lists.

    Raises:
        AnalysisError: when it is not that.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AnalysisError(f"matrices={path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise AnalysisError(f"matrices={path} must hold a JSON object with tokens, experts, w1 and w2")
    return content


def _matrices(content: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    names = ("tokens", "experts", "w1", "w2")
    if content.keys() != set(names):
        raise AnalysisError(f"matrices must be {', '.join(names)}; there are {', '.join(sorted(content)) or 'none'}")
    try:
        tokens, experts, w1, w2 = (torch.tensor(content[name], dtype=torch.float64) for name in names)
    except (ValueError, TypeError) as error:
        raise AnalysisError(f"matrices: {error}") from error
    if tokens.dim() != 2 or experts.dim() != 2 or w1.dim() != 3 or not tokens.numel() or not w1.numel():
        raise AnalysisError("matrices: tokens [T, D] and experts [E, D] have two dimensions, w1 [E, I, D] and w2 three")
    (num_experts, num_features), width = experts.shape, w1.shape[1]
    wanted = {
        "tokens": (len(tokens), num_features),
        "w1": (num_experts, width, num_features),
        "w2": (num_experts, num_features, width),
    }
    for name, found in (("tokens", tokens), ("w1", w1), ("w2", w2)):
        if tuple(found.shape) != wanted[name]:
            raise AnalysisError(f"matrices: {name} is {list(found.shape)}, with these experts {list(wanted[name])}")
    return tokens, experts, w1, w2


def _drawn(num_experts: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if num_experts < 2:
        raise AnalysisError(f"num_experts={num_experts} must be at least 2")
    generator = torch.Generator().manual_seed(seed)

    def draw(lowest: int, highest: int, *shape: int) -> Tensor:
        return torch.randint(lowest, highest + 1, shape, generator=generator).double()

    return (
        draw(-2, 3, NUM_TOKENS, NUM_FEATURES),
        draw(-2, 2, num_experts, NUM_FEATURES) / 2,
        draw(-1, 2, num_experts, WIDTH, NUM_FEATURES),
        draw(-1, 2, num_experts, NUM_FEATURES, WIDTH),
    )


def _with_one(tokens_TD: Tensor) -> Tensor:
    """A last feature of 1, which up_proj reads alone: relu(gate x) * (up x) is then the plain relu(gate x)."""
    return torch.cat([tokens_TD, torch.ones_like(tokens_TD[:, :1])], dim=1)


def _block(experts_ED: Tensor, w1_EID: Tensor, w2_EDI: Tensor, capacity_factor: float) -> EcMoeBlock:
    """The library's block in float64 with these weights, its gated experts made plain ReLU ones."""
    num_experts, width, num_features = w1_EID.shape
    config = EcMoeLlamaConfig(
        hidden_size=num_features + 1,
        intermediate_size=width,
        hidden_act="relu",
        num_experts=num_experts,
        capacity_factor=capacity_factor,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    block = EcMoeBlock(config, LlamaMLP).double().train()
    up_EIF = torch.zeros(num_experts, width, num_features + 1, dtype=torch.float64)
    up_EIF[..., -1] = 1
    pad = torch.nn.functional.pad
    with torch.no_grad():
        block.gate.weight.copy_(pad(experts_ED, (0, 1)))
        block.experts.gate_up_proj.copy_(torch.cat([pad(w1_EID, (0, 1)), up_EIF], dim=1))
        block.experts.down_proj.copy_(pad(w2_EDI, (0, 0, 0, 1)))
    block.requires_grad_(False)
    return block
