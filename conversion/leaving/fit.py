"""Numbers that stand for thresholds and weights where a plain block has neither; found by running the source on text.

Letters: T tokens, E experts, K experts of one token, D hidden size.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ecmoe.progress import progress_bar
from modeling_ecmoe import use_inference_routing
from modeling_ecmoe.block_ecmoe import EcMoeBlock

from .plain import Form

# Of the mean diagonal; keeps the solutions finite where inputs or experts hardly differ.
_RIDGE = 1e-4
_TOKENS_AT_ONCE = 4096  # whose experts' outputs [T, K, D] are held


@torch.no_grad()
def fit(model: Any, form: Form, windows: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
    """The router rows [E, D] and the scales [E] of those sparse layers, as the form needs them: "0.rows", "0.scales".

    Of the rows as they are and those moved by the thresholds a layer gets what leaves less error on the text: moving
    improves the ranking, and with several experts per token changes how they are weighted against each other.

    All windows go through the model together and once: by a layer's inputs its rows are moved, and by the same inputs
    the rows are held against each other.

    windows: token ids [W, L] without padding. layers: their numbers, as in the names of tensors.
    """
    found: dict[str, _Candidate] = {}
    shared: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, block: EcMoeBlock) -> None:
        def keep(_module: Any, _inputs: Any, output: Tensor) -> None:
            shared[name] = output

        def measure(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = _best(block, form, inputs[0].flatten(0, -2), output.flatten(0, -2), shared.pop(name, None))
            bar.update()

        handles.append(block.register_forward_hook(measure))
        if block.shared_expert is not None:
            handles.append(block.shared_expert.register_forward_hook(keep))

    routing = "token_choice" if model.config.routing == "token_choice" else "threshold"
    with progress_bar(total=len(layers), desc="Measuring", unit="layer") as bar:
        try:
            for number, layer in enumerate(model.config.dense_ffn.layers_of(model)):
                if str(number) in layers:
                    watch(str(number), layer.mlp)
            with use_inference_routing(model, routing):
                model.get_decoder()(input_ids=windows.to(model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    measured = {f"{name}.rows": best.rows_ED.cpu() for name, best in found.items() if form.is_shifted}
    if form.is_scaled:
        measured |= {f"{name}.scales": best.scales().cpu() for name, best in found.items()}
    return measured


def _best(
    block: EcMoeBlock, form: Form, inputs_TD: Tensor, outputs_TD: Tensor, shared_TD: Tensor | None
) -> "_Candidate":
    """What stands for a block that made these outputs of these inputs, and for what its shared expert made of them."""
    rows = [block.gate.weight.float()]
    if form.is_shifted:
        rows.append(_shifted_rows(block, inputs_TD))
    candidates = [_Candidate(block, rows_ED, form) for rows_ED in rows]
    for begin in range(0, len(inputs_TD), _TOKENS_AT_ONCE):
        part = slice(begin, begin + _TOKENS_AT_ONCE)
        _add_to_all(candidates, inputs_TD[part], outputs_TD[part], None if shared_TD is None else shared_TD[part])
    return min(candidates, key=_Candidate.error)


def _add_to_all(
    candidates: "list[_Candidate]", inputs_TD: Tensor, outputs_TD: Tensor, shared_TD: Tensor | None
) -> None:
    """The inputs and outputs of one layer's block to each of its candidates.

    Mostly the candidates send a token to the same experts: each pair of token and expert is computed once.
    """
    block = candidates[0].block
    choices = [candidate.choose(inputs_TD) for candidate in candidates]
    is_met_TE = torch.zeros(len(inputs_TD), len(candidates[0].rows_ED), dtype=torch.bool, device=inputs_TD.device)
    for expert_TK, _ in choices:
        is_met_TE.scatter_(1, expert_TK, True)
    token_R, expert_R = is_met_TE.nonzero(as_tuple=True)
    rows_RD = inputs_TD[token_R]
    experts_RD = block.experts(rows_RD, expert_R[:, None], torch.ones_like(rows_RD[:, :1])).float()
    experts_RD = experts_RD * block.config.routed_scaling_factor
    place_TE = torch.zeros_like(is_met_TE, dtype=torch.int64)
    place_TE[token_R, expert_R] = torch.arange(len(token_R), device=token_R.device)
    wanted_TD = outputs_TD.float()
    if shared_TD is not None:
        wanted_TD = wanted_TD - shared_TD.float()
        if block.config.shared_expert_weighting == "complement":
            experts_RD = experts_RD - shared_TD.float()[token_R]
    _, scores_TE, _ = block.gate(inputs_TD)
    weight = (scores_TE * block.routes(scores_TE)).sum()
    for candidate, (expert_TK, weight_TK) in zip(candidates, choices, strict=True):
        candidate.add(experts_RD[place_TE.gather(1, expert_TK)], expert_TK, weight_TK, wanted_TD, weight)


def _shifted_rows(block: EcMoeBlock, inputs_TD: Tensor) -> Tensor:
    """The router rows [E, D], moved so that they rank by the distance to the thresholds.

    c is the direction whose product with every FFN input is nearest to one, by least squares. A plain router has no
    bias. Taking (b_e - mean b) c from row e moves the experts' logits by nearly constant numbers against each other,
    b_e being the logit (or for softmax scores the logarithm) of the threshold: the order of the moved logits is the
    order of the distances to the thresholds.
    """
    gate, inputs_TD = block.gate, inputs_TD.float()
    direction_D = _ridge(inputs_TD.T @ inputs_TD, inputs_TD.sum(0)).to(gate.weight.device)
    # Thresholds that were never calibrated are zero, which has no logarithm.
    threshold_E = gate.threshold.float().clamp(1e-6, 1 - 1e-6)
    border_E = threshold_E.log() if gate.score_function == "softmax" else threshold_E.logit()
    return gate.weight.float() - (border_E - border_E.mean())[:, None] * direction_D


class _Candidate:
    """Router rows, and the scales a [E] for which the sum of p a_e E_e(x) is nearest to what the source adds to its
    shared expert; all ones where the form has no scales.

    With complement weighting E_e is taken less the shared expert. p: the plain block's weights of a token's K experts.
    """

    def __init__(self, block: EcMoeBlock, rows_ED: Tensor, form: Form) -> None:
        self.block, self.rows_ED, self.form = block, rows_ED, form
        num_experts = len(rows_ED)
        self.gram_EE = rows_ED.new_zeros(num_experts, num_experts)
        self.moment_E, self.square = rows_ED.new_zeros(num_experts), rows_ED.new_zeros(())
        self.weight, self.num_tokens = rows_ED.new_zeros(()), 0

    def choose(self, inputs_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token [T, K] by these rows, and their weights [T, K] in a plain block."""
        weight_TK, expert_TK = (inputs_TD.float() @ self.rows_ED.T).softmax(-1).topk(self.form.top_k)
        if self.form.normalised:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return expert_TK, weight_TK

    def add(self, experts_TKD: Tensor, expert_TK: Tensor, weight_TK: Tensor, wanted_TD: Tensor, weight: Tensor) -> None:
        """The outputs of the chosen experts, and the sum that is wanted of them; weight: the source's weights of all
        these tokens together."""
        added_TKD = experts_TKD * weight_TK[..., None]
        products_TKK = added_TKD @ added_TKD.transpose(1, 2)
        pairs = (expert_TK[:, :, None].expand_as(products_TKK), expert_TK[:, None].expand_as(products_TKK))
        self.gram_EE.index_put_(pairs, products_TKK, accumulate=True)
        self.moment_E.index_add_(0, expert_TK.flatten(), (added_TKD @ wanted_TD[..., None]).flatten())
        self.square += wanted_TD.square().sum()
        self.weight += weight
        self.num_tokens += len(wanted_TD)

    def scales(self) -> Tensor:
        """Never negative; where experts do not differ from the shared one, the mean sum of a token's weights."""
        if not self.form.is_scaled:
            return torch.ones_like(self.moment_E)
        mean_weight = self.weight / self.num_tokens
        if self.block.config.normalize_combine_weights:
            mean_weight = torch.ones_like(mean_weight)
        usual_E = mean_weight.expand(len(self.gram_EE))
        if not self.gram_EE.any():
            return usual_E.clone()
        return (usual_E + _ridge(self.gram_EE, self.moment_E - self.gram_EE @ usual_E)).clamp(min=0)

    def error(self) -> float:
        """The squared distance to what is wanted, summed over the tokens."""
        scales_E = self.scales()
        return (self.square - 2 * scales_E @ self.moment_E + scales_E @ self.gram_EE @ scales_E).item()


def _ridge(gram_NN: Tensor, moment_N: Tensor) -> Tensor:
    """The least-squares solution, in float64 on the CPU."""
    gram_NN = gram_NN.double().cpu()
    gram_NN = gram_NN + _RIDGE * gram_NN.diagonal().mean() * torch.eye(len(gram_NN), dtype=torch.float64)
    return torch.linalg.solve(gram_NN, moment_N.double().cpu()).float().to(moment_N.device)
