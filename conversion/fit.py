"""Numbers that stand for thresholds and weights where a plain block has neither; found by running the source on text.

Letters: T tokens, E experts, K experts of one token, D hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from modeling_ecmoe.block_ecmoe import EcMoeBlock, use_inference_routing

from .plain import Form

# Of the mean diagonal; keeps the solutions finite where inputs or experts hardly differ.
_RIDGE = 1e-4


@torch.no_grad()
def fit(model: Any, form: Form, batches: list[Tensor]) -> dict[str, Tensor]:
    """The router rows [E, D] and the scales [E] of every sparse layer, as the form needs them: "0.rows", "0.scales".

    batches: token ids [B, S] without padding.
    """
    layers = {str(i): layer.mlp for i, layer in enumerate(model.get_decoder().layers)}
    blocks = {name: block for name, block in layers.items() if isinstance(block, EcMoeBlock)}
    rows = {name: block.gate.weight.float() for name, block in blocks.items()}
    found: dict[str, Tensor] = {}
    if form.is_shifted:
        constants = {name: _Constant(block) for name, block in blocks.items()}
        _run(model, batches, blocks, {name: constant.add for name, constant in constants.items()}, "Router rows")
        rows = {name: constant.shifted_rows() for name, constant in constants.items()}
        found |= {f"{name}.rows": value.cpu() for name, value in rows.items()}
    if form.is_scaled:
        scales = {name: _Scales(block, rows[name], form.top_k) for name, block in blocks.items()}
        _run(model, batches, blocks, {name: scale.add for name, scale in scales.items()}, "Scales")
        found |= {f"{name}.scales": scale.solve().cpu() for name, scale in scales.items()}
    return found


def _run(
    model: Any,
    batches: list[Tensor],
    blocks: dict[str, EcMoeBlock],
    add: dict[str, Callable[[Tensor, Tensor], None]],
    title: str,
) -> None:
    """Runs the model and hands the block's inputs and outputs [T, D] of every layer to `add`."""

    def hook_of(name: str) -> Any:
        return lambda _module, inputs, output: add[name](inputs[0].flatten(0, -2), output.flatten(0, -2))

    handles = [block.register_forward_hook(hook_of(name)) for name, block in blocks.items()]
    routing = "token_choice" if model.config.routing == "token_choice" else "threshold"
    try:
        with use_inference_routing(model, routing):
            for batch in tqdm(batches, desc=title, unit="batch", disable=None):
                model.get_decoder()(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


class _Constant:
    """The direction c whose product with every FFN input is nearest to one, by least squares.

    A plain router has no bias. Taking (b_e - mean b) c from row e moves the experts' logits by nearly constant numbers
    against each other, b_e being the logit (or for softmax scores the logarithm) of the threshold: the order of the
    moved logits is the order of the distances to the thresholds.
    """

    def __init__(self, block: EcMoeBlock) -> None:
        self.block = block
        hidden = block.gate.hidden_size
        self.gram_DD = torch.zeros(hidden, hidden, device=block.gate.weight.device)
        self.sum_D = torch.zeros(hidden, device=block.gate.weight.device)

    def add(self, inputs_TD: Tensor, _outputs_TD: Tensor) -> None:
        inputs_TD = inputs_TD.float()
        self.gram_DD += inputs_TD.T @ inputs_TD
        self.sum_D += inputs_TD.sum(0)

    def shifted_rows(self) -> Tensor:
        direction_D = _ridge(self.gram_DD, self.sum_D)
        gate = self.block.gate
        # Thresholds that were never calibrated are zero, which has no logarithm.
        threshold_E = gate.threshold.float().clamp(1e-6, 1 - 1e-6)
        border_E = threshold_E.log() if gate.score_function == "softmax" else threshold_E.logit()
        return gate.weight.float() - (border_E - border_E.mean())[:, None] * direction_D


class _Scales:
    """The scales a [E] for which the sum of p a_e E_e(x) is nearest to what the source adds to its shared expert.

    With complement weighting E_e is taken less the shared expert. p: softmax weights of the K experts of a token.
    """

    def __init__(self, block: EcMoeBlock, rows_ED: Tensor, top_k: int) -> None:
        self.block, self.rows_ED, self.top_k = block, rows_ED, top_k
        num_experts = len(rows_ED)
        self.gram_EE = torch.zeros(num_experts, num_experts, device=rows_ED.device)
        self.moment_E = torch.zeros(num_experts, device=rows_ED.device)
        self.weight, self.num_tokens = torch.zeros((), device=rows_ED.device), 0

    def add(self, inputs_TD: Tensor, outputs_TD: Tensor) -> None:
        block, num_tokens = self.block, len(inputs_TD)
        logits_TK, expert_TK = (inputs_TD.float() @ self.rows_ED.T).topk(self.top_k)
        weight_TK = logits_TK.softmax(-1)
        rows_RD = inputs_TD.repeat_interleave(self.top_k, dim=0)
        experts_RD = block.experts(rows_RD, expert_TK.reshape(-1, 1), torch.ones_like(rows_RD[:, :1]))
        added_TKD = experts_RD.float().view(num_tokens, self.top_k, -1)
        wanted_TD = outputs_TD.float()
        if block.shared_expert is not None:
            shared_TD = block.shared_expert(inputs_TD).float()
            wanted_TD = wanted_TD - shared_TD
            if block.config.shared_expert_weighting == "complement":
                added_TKD = added_TKD - shared_TD[:, None]
        added_TKD = added_TKD * weight_TK[..., None]
        products_TKK = added_TKD @ added_TKD.transpose(1, 2)
        pairs = (expert_TK[:, :, None].expand_as(products_TKK), expert_TK[:, None].expand_as(products_TKK))
        self.gram_EE.index_put_(pairs, products_TKK, accumulate=True)
        self.moment_E.index_add_(0, expert_TK.flatten(), (added_TKD @ wanted_TD[..., None]).flatten())
        _, scores_TE, _ = block.gate(inputs_TD)
        self.weight += (scores_TE * block.routes(scores_TE)).sum()
        self.num_tokens += num_tokens

    def solve(self) -> Tensor:
        """Never negative; where experts do not differ from the shared one, the mean sum of a token's weights."""
        mean_weight = self.weight / self.num_tokens
        if self.block.config.normalize_combine_weights:
            mean_weight = torch.ones_like(mean_weight)
        usual_E = mean_weight.expand(len(self.gram_EE))
        if not self.gram_EE.any():
            return usual_E.clone()
        return (usual_E + _ridge(self.gram_EE, self.moment_E - self.gram_EE @ usual_E)).clamp(min=0)


def _ridge(gram_NN: Tensor, moment_N: Tensor) -> Tensor:
    """The least-squares solution, in float64 on the CPU."""
    gram_NN = gram_NN.double().cpu()
    gram_NN = gram_NN + _RIDGE * gram_NN.diagonal().mean() * torch.eye(len(gram_NN), dtype=torch.float64)
    return torch.linalg.solve(gram_NN, moment_N.double().cpu()).float().to(moment_N.device)
