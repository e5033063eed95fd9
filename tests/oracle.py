"""The slow reference: expert-choice and threshold routing in float64, one token and one expert at a time.

It shares no code with the package. T tokens, E experts, D hidden size. Pairs are (expert, token).
"""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal

import torch
from torch import Tensor

Pairs = set[tuple[int, int]]


def capacity(num_tokens: int, num_experts: int, capacity_factor: float) -> int:
    """ceil(c * T / E) in decimal arithmetic, at most T."""
    exact = Decimal(str(capacity_factor)) * num_tokens
    slots = 0
    while slots * num_experts < exact:
        slots += 1
    return min(slots, num_tokens)


def shares(num_tokens: int, num_experts: int, capacity_factor: float, most: int) -> list[int]:
    """[E] tokens of each expert under an upper bound: C each; where T * b places are fewer, as equal as can be."""
    places = min(num_experts * capacity(num_tokens, num_experts, capacity_factor), num_tokens * most)
    counts = [0] * num_experts
    for place in range(places):
        counts[place % num_experts] += 1
    return counts


def scores(hidden_TD: Tensor, weight_ED: Tensor, score_function: str) -> Tensor:
    """[T, E] router scores, differentiable."""
    rows = []
    for token in hidden_TD.double():
        logits = [sum(token[d] * expert[d] for d in range(len(token))) for expert in weight_ED.double()]
        if score_function == "sigmoid":
            rows.append(torch.stack([1 / (1 + torch.exp(-logit)) for logit in logits]))
        else:
            powers = [torch.exp(logit) for logit in logits]
            rows.append(torch.stack([power / sum(powers) for power in powers]))
    return torch.stack(rows)


def expert_choice(
    scores_TE: Tensor, capacity_factor: float, pools: Sequence[Sequence[int]], is_real: Sequence[bool] | None = None
) -> Pairs:
    """Each expert takes the best C real tokens of each pool; pools list the token numbers they hold."""
    scores_TE = scores_TE.detach()
    num_experts = scores_TE.shape[1]
    pairs = set()
    for pool in pools:
        real = [token for token in pool if is_real is None or is_real[token]]
        taken = capacity(len(real), num_experts, capacity_factor)
        for expert in range(num_experts):
            ranking = sorted(real, key=lambda token: -float(scores_TE[token, expert]))
            pairs |= {(expert, token) for token in ranking[:taken]}
    return pairs


def choice_threshold(
    scores_TE: Tensor, capacity_factor: float, pools: Sequence[Sequence[int]], is_real: Sequence[bool] | None = None
) -> list[float]:
    """[E] midpoint of the last chosen and the best refused score, a little above them where they are tied; mean over
    the pools by their real tokens."""
    scores_TE = scores_TE.detach()
    num_experts = scores_TE.shape[1]
    thresholds = []
    for expert in range(num_experts):
        total, weight = 0.0, 0
        for pool in pools:
            column = sorted(
                (float(scores_TE[token, expert]) for token in pool if is_real is None or is_real[token]), reverse=True
            )
            if not column:
                continue
            taken = capacity(len(column), num_experts, capacity_factor)
            refused = column[taken] if taken < len(column) else 0.0
            is_tied = column[taken - 1] - refused <= 1e-6 * column[taken - 1]  # but for rounding
            border = 1.0001 * column[taken - 1] if is_tied else (column[taken - 1] + refused) / 2
            total += len(column) * border
            weight += len(column)
        thresholds.append(total / weight if weight else 0.0)
    return thresholds


def threshold_training(
    scores_TE: Tensor,
    capacity_factor: float,
    threshold_E: Sequence[float],
    clamp: float,
    *,
    is_warm: bool,
    is_real: Sequence[bool] | None = None,
) -> Pairs:
    """Each expert takes the tokens above its threshold, from (1 - g) C to (1 + g) C of them; just C before warm-up."""
    scores_TE = scores_TE.detach()
    real = [token for token in range(len(scores_TE)) if is_real is None or is_real[token]]
    wanted = capacity(len(real), scores_TE.shape[1], capacity_factor) if real else 0
    low, high = ((1 + sign * Decimal(str(clamp))) * wanted for sign in (-1, 1))
    least, most = next(n for n in range(wanted + 1) if n >= low), max(n for n in range(2 * wanted + 1) if n <= high)
    pairs = set()
    for expert, threshold in enumerate(threshold_E):
        ranking = sorted(real, key=lambda token: -float(scores_TE[token, expert]))
        above = sum(float(scores_TE[token, expert]) > threshold for token in real)
        taken = min(max(above, least), most) if is_warm else wanted
        pairs |= {(expert, token) for token in ranking[:taken]}
    return pairs


def token_choice(
    scores_TE: Tensor,
    num_choices: int,
    capacity_factor: float | None = None,
    is_real: Sequence[bool] | None = None,
) -> Pairs:
    """Every real token takes its k best experts; a full expert refuses. First choices, in the order of the batch, go
    before second ones, and an expert has room for ceil(factor * k * T / E)."""
    scores_TE = scores_TE.detach()
    num_tokens, num_experts = scores_TE.shape
    real = [token for token in range(num_tokens) if is_real is None or is_real[token]]
    room = [math.inf] * num_experts
    if capacity_factor is not None:
        exact = Decimal(str(capacity_factor)) * num_choices * len(real)
        room = [next(n for n in range(num_tokens * num_choices * 9) if n * num_experts >= exact)] * num_experts
    ranking = {token: sorted(range(num_experts), key=lambda expert: -float(scores_TE[token, expert])) for token in real}
    pairs = set()
    for place in range(num_choices):
        for token in real:
            expert = ranking[token][place]
            if room[expert] > 0:
                room[expert] -= 1
                pairs.add((expert, token))
    return pairs


def z_loss(logits: Sequence[Tensor], is_real: Sequence[bool] | None = None) -> Tensor:
    """Mean over layers and real tokens of log(sum of exp(logits))^2; one [T, E] for each layer."""
    squares = [
        torch.log(sum(torch.exp(logit) for logit in row)) ** 2
        for layer in logits
        for token, row in enumerate(layer.double())
        if is_real is None or is_real[token]
    ]
    return sum(squares) / len(squares)


def balance_loss(logits: Sequence[Tensor], num_choices: int, is_real: Sequence[bool] | None = None) -> Tensor:
    """E * sum over experts of (its choices per token) * (its mean softmax score) in each layer; the layers' mean."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in logits:
        rows = [row for t, row in enumerate(layer.double()) if is_real is None or is_real[t]]
        num_experts = len(rows[0])
        for expert in range(num_experts):
            chosen, mass = 0, rows[0].new_zeros(())
            for row in rows:
                ranking = sorted(range(num_experts), key=(-row.detach()).tolist().__getitem__)
                chosen += expert in ranking[:num_choices]
                mass = mass + torch.exp(row[expert]) / sum(torch.exp(logit) for logit in row)
            total = total + num_experts * chosen / len(rows) * mass / len(rows)
    return total / len(logits)


def threshold_routes(scores_TE: Tensor, threshold_E: Sequence[float], least: int = 0, most: int | None = None) -> Pairs:
    """Every token by itself: experts above their threshold, the `most` nearest at most, `least` at least."""
    pairs = set()
    for token, row in enumerate(scores_TE.detach()):
        margins = [float(score) - float(threshold) for score, threshold in zip(row, threshold_E, strict=True)]
        ranking = sorted(range(len(margins)), key=lambda expert: -margins[expert])
        wanted = sum(margin > 0 for margin in margins)
        wanted = max(min(wanted, len(margins) if most is None else most), least)
        pairs |= {(expert, token) for expert in ranking[:wanted]}
    return pairs


def combine(scores_TE: Tensor, pairs: Pairs, normalize: bool) -> dict[tuple[int, int], Tensor]:
    """The combine weight of each pair, differentiable."""
    weights = {}
    for expert, token in pairs:
        weight = scores_TE[token, expert]
        if normalize:
            weight = weight / sum(scores_TE[token, e] for e, t in pairs if t == token)
        weights[expert, token] = weight
    return weights


def ffn(
    token_D: Tensor, into_WD: Tensor, down_DI: Tensor, into_bias_W: Tensor | None, down_bias_D: Tensor | None
) -> Tensor:
    """[D] the dense FFN with SiLU; W = 2I, gate before up, is gated, and W = I is not."""
    first = into_WD @ token_D
    if into_bias_W is not None:
        first = first + into_bias_W
    width = down_DI.shape[1]
    hidden = first[:width] / (1 + torch.exp(-first[:width]))
    if len(first) > width:
        hidden = hidden * first[width:]
    second = down_DI @ hidden
    return second if down_bias_D is None else second + down_bias_D


def expert_of(parameters: Mapping[str, Tensor], expert: int) -> list[Tensor | None]:
    """One expert's matrices and biases, as `ffn` takes them."""
    into = "experts.gate_up_proj" if "experts.gate_up_proj" in parameters else "experts.up_proj"
    names = (into, "experts.down_proj", f"{into}_bias", "experts.down_proj_bias")
    return [parameters[name][expert] if name in parameters else None for name in names]


def shared_of(parameters: Mapping[str, Tensor]) -> list[Tensor | None] | None:
    """The same of the shared expert; None without one."""
    own = {
        name.removeprefix("shared_expert."): tensor
        for name, tensor in parameters.items()
        if name.startswith("shared_expert.")
    }
    if not own:
        return None
    stacks: list[Tensor | None] = []
    for kind in ("weight", "bias"):
        into = [own[name] for name in (f"{part}.{kind}" for part in ("gate_proj", "up_proj", "c_fc")) if name in own]
        down = [own[name] for name in (f"{part}.{kind}" for part in ("down_proj", "c_proj")) if name in own]
        stacks += [torch.cat(into) if into else None, down[0] if down else None]
    return stacks


def block_output(
    hidden_TD: Tensor,
    parameters: Mapping[str, Tensor],
    scores_TE: Tensor,
    pairs: Pairs,
    *,
    normalize: bool = False,
    shared_weighting: str = "one",
) -> Tensor:
    """[T, D] y_t = sum of w_te * expert_e(x_t) over its pairs [+ the shared expert], differentiable.

    parameters: a block's tensors by name; a shared expert takes part when it is among them.
    """
    weights = combine(scores_TE, pairs, normalize)
    shared = shared_of(parameters)
    rows = []
    for token, hidden_D in enumerate(hidden_TD):
        output_D = torch.zeros_like(hidden_D)
        total = hidden_D.new_zeros(())
        for (expert, chosen), weight in weights.items():
            if chosen != token:
                continue
            output_D = output_D + weight * ffn(hidden_D, *expert_of(parameters, expert))
            total = total + weight
        if shared is not None:
            shared_D = ffn(hidden_D, *shared)
            output_D = output_D + (shared_D if shared_weighting == "one" else (1 - total) * shared_D)
        rows.append(output_D)
    return torch.stack(rows)


def moving_average(values: Sequence[float], decay: float) -> float:
    """Bias-corrected exponential average, as Adam's first moment, written as its weighted sum."""
    weights = [decay ** (len(values) - 1 - step) for step in range(len(values))]
    return math.fsum(weight * value for weight, value in zip(weights, values, strict=True)) / math.fsum(weights)
