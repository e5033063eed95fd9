"""A small float64 block with random weights, and its comparison with the oracle: output and every gradient."""

import oracle
import torch
from conftest import build_config
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2MLP

from modeling_ecmoe.block_ecmoe import EcMoeBlock
from modeling_ecmoe.bounded_ecmoe import choose_tokens_within_bounds

BATCH, LENGTH = 2, 7
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


DENSE_FFN = {"Llama": LlamaMLP, "Starcoder2": Starcoder2MLP}


def build_block(hidden_size: int = 12, family: str = "Llama", **fields: object) -> EcMoeBlock:
    """A float64 block with random weights and thresholds near the middle of its scores."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}  # which a block does not have
    heads |= {"hidden_act": "silu"}  # the oracle's, whatever the family's own
    config = build_config(family, hidden_size=hidden_size, **heads | {"intermediate_size": 10} | fields)
    block = EcMoeBlock(config, DENSE_FFN[family]).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    share = 0.5 if config.router_score_function == "sigmoid" else 1 / config.num_experts
    block.gate.threshold.copy_(torch.linspace(0.7, 1.1, config.num_experts) * share)
    return block


def random_hidden(batch: int = BATCH, length: int = LENGTH, hidden_size: int = 12, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, hidden_size, generator=generator, dtype=torch.float64, requires_grad=True)


def parameters_of(block: EcMoeBlock) -> dict[str, Tensor]:
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in block.named_parameters()}


def oracle_pairs(block: EcMoeBlock, scores_TE: Tensor, batch: int, length: int) -> oracle.Pairs:
    """The (expert, token) pairs of the mode that the block is in.

    Of bounded expert choice the oracle has no assignment of its own, and takes the one the package makes.
    """
    config = block.config
    is_real = None if block.token_mask is None else block.token_mask.flatten().tolist()
    pools = [list(range(batch * length))]
    if config.routing_pool == "sequence":
        pools = [list(range(row * length, (row + 1) * length)) for row in range(batch)]
    if config.routing == "token_choice":
        factor = config.token_choice_capacity_factor if block.training else None
        return oracle.token_choice(scores_TE, int(config.capacity_factor), factor, is_real)
    if not block.training and config.inference_routing == "threshold":
        least, most = config.min_experts_per_token, config.max_experts_per_token
        return oracle.threshold_routes(scores_TE, block.gate.threshold.tolist(), least, most)
    if config.routing == "threshold" and block.training:
        return oracle.threshold_training(
            scores_TE,
            config.capacity_factor,
            block.gate.threshold.tolist(),
            config.threshold_capacity_clamp,
            is_warm=int(block.gate.threshold_updates) >= max(1, config.threshold_after_steps),
            is_real=is_real,
        )
    if config.bounds_experts_per_token:
        mask_PN = None if is_real is None else torch.tensor(is_real).view(len(pools), -1)
        choice = choose_tokens_within_bounds(
            scores_TE.detach().view(len(pools), -1, config.num_experts),
            config.capacity_factor,
            config.min_experts_per_token,
            config.max_experts_per_token,
            mask_PN,
        )
        found = zip(choice.token_index.tolist(), choice.is_chosen.tolist(), strict=True)
        return {
            (expert, token)
            for expert, (tokens, chosen) in enumerate(found)
            for token, is_chosen in zip(tokens, chosen, strict=True)
            if is_chosen
        }
    return oracle.expert_choice(scores_TE, config.capacity_factor, pools, is_real)


def oracle_forward(
    block: EcMoeBlock,
    hidden_BSD: Tensor,
    parameters: dict[str, Tensor],
    noise_TD: Tensor | None = None,
    pairs: oracle.Pairs | None = None,
) -> Tensor:
    """[B, S, D] what the block should give in the mode it is in, routes and all.

    noise_TD: what the router's input was multiplied by; pairs: the routes, where they are not the oracle's to find.
    """
    config = block.config
    tokens_TD = hidden_BSD.flatten(0, 1)
    router_TD = tokens_TD if noise_TD is None else tokens_TD * noise_TD
    scores_TE = oracle.scores(router_TD, parameters["gate.weight"], config.router_score_function)
    if pairs is None:
        pairs = oracle_pairs(block, scores_TE, *hidden_BSD.shape[:2])
    output_TD = oracle.block_output(
        tokens_TD,
        parameters,
        scores_TE,
        pairs,
        normalize=config.normalize_combine_weights,
        shared_weighting=config.shared_expert_weighting,
    )
    return output_TD.view_as(hidden_BSD)


def assert_matches_oracle(
    block: EcMoeBlock,
    hidden_BSD: Tensor,
    real_BS: Tensor | None = None,
    noise_TD: Tensor | None = None,
    pairs: oracle.Pairs | None = None,
) -> Tensor:
    """Output and gradients of a random projection of it (of its real tokens); returns the block's output."""
    parameters = parameters_of(block)
    expected_hidden = hidden_BSD.detach().clone().requires_grad_()
    expected = oracle_forward(block, expected_hidden, parameters, noise_TD, pairs)
    output = block(hidden_BSD)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    real_BS = torch.ones(output.shape[:2], dtype=torch.bool) if real_BS is None else real_BS
    direction = direction * real_BS[..., None]
    torch.testing.assert_close(output[real_BS], expected[real_BS], **TOLERANCE)
    (output * direction).sum().backward()
    if expected.requires_grad:  # unless no expert chose a token
        (expected * direction).sum().backward()
    found = {"hidden_states": hidden_BSD, **dict(block.named_parameters())}
    wanted = {"hidden_states": expected_hidden, **parameters}
    for name, tensor in found.items():
        gradient, expected_gradient = (
            torch.zeros_like(one) if one.grad is None else one.grad for one in (tensor, wanted[name])
        )
        torch.testing.assert_close(gradient, expected_gradient, msg=f"gradient of {name}", **TOLERANCE)
    return output
