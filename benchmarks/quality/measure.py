"""What is measured of a model on held-out windows. Losses are nats per token.

Letters: N windows, L tokens of a window, E experts, M domains.
"""

import contextlib
import io
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecmoe.analysis.evaluation import log_likelihoods
from ecmoe.analysis.text import pad
from modeling_ecmoe import calibrate_thresholds, record_routing, sparse_blocks, use_inference_routing

from .data import interleave
from .train import part_of

ROWS = 32  # windows of a forward pass


@torch.no_grad()
def row_losses(model: Any, rows_NL: Tensor, batch: int = ROWS) -> Tensor:
    """[N] float64, the mean next-token loss of each window, in eval mode."""
    model.eval()
    found = []
    for rows in rows_NL.split(batch):
        logits = model(input_ids=rows.to(model.device), use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:].to(model.device), reduction="none")
        found.append(losses.double().mean(1).cpu())
    return torch.cat(found)


def domain_losses(model: Any, held_out: Mapping[str, Tensor], most: int | None = None) -> dict[str, float]:
    """The loss as inference routes, of each domain."""
    return {domain: row_losses(model, rows[:most]).mean().item() for domain, rows in held_out.items()}


def top_k_loss(model: Any, held_out: Mapping[str, Tensor], pool_rows: int) -> float:
    """The loss where experts choose among pools of the training's size and mixture: it looks at the future."""
    with use_inference_routing(model, "expert_choice"):
        return row_losses(model, interleave(list(held_out.values())), pool_rows).mean().item()


def calibrate(model: Any, calibration: Mapping[str, Tensor], pool_rows: int, most: int | None = None) -> None:
    """Thresholds from windows of the training documents, mixed as training mixes them."""
    rows_NL = interleave(list(calibration.values()))[:most]
    calibrate_thresholds(model, [{"input_ids": rows} for rows in rows_NL.split(pool_rows)])


@contextlib.contextmanager
def kept_thresholds(model: Any) -> Iterator[None]:
    """Puts the thresholds back as training left them: threshold training goes on from its own average."""
    blocks = list(sparse_blocks(model).values())
    before = [(block.gate.threshold.clone(), block.gate.threshold_updates.clone()) for block in blocks]
    try:
        yield
    finally:
        for block, (threshold, updates) in zip(blocks, before, strict=True):
            block.gate.threshold.copy_(threshold)
            block.gate.threshold_updates.copy_(updates)


def losses_and_routes(model: Any, held_out: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, Any]]:
    """The loss of each domain; load, coverage and specialisation, with the same routes, which inference takes.

    Returns:
        Losses as `domain_losses`. The summary of `RoutingRecord` over all domains; uncovered of each domain; for each
        layer the share of each expert's tokens by domain, [E][M]; router_entropy, of a token's softmax, and
        mutual_information of expert and domain, means over layers in nats; domain_entropy, the most the latter can be.
    """
    records, losses = {}, {}
    for domain, rows_NL in held_out.items():
        with record_routing(model) as records[domain]:
            losses[domain] = row_losses(model, rows_NL).mean().item()
    chosen = [
        torch.stack([record.chosen[layer] for record in records.values()], dim=1)  # [E, M]
        for layer in sparse_blocks(model)
    ]
    uncovered = {domain: record.uncovered_share() for domain, record in records.items()}
    first, *others = records.values()
    for other in others:
        first.merge(other)
    return losses, {
        **first.summary(),
        "uncovered_by_domain": uncovered,
        "domain_shares": [(table / table.sum(1, keepdim=True).clamp(min=1)).tolist() for table in chosen],
        "router_entropy": sum(layer["entropy"] for layer in first.report()["layers"].values()) / len(chosen),
        "mutual_information": sum(mutual_information(table) for table in chosen) / len(chosen),
        "domain_entropy": torch.tensor(len(held_out)).log().item(),
    }


def copied_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as they are now, for `movement`."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def movement(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, float]:
    """How far training took router, experts and the rest: ||W - W_0|| / ||W_0|| of each part.

    experts_apart: root mean square distance of an expert from the mean of its layer's experts, over the norm of that
    mean; 0 for copies.
    """
    squares: dict[str, list[float]] = {}
    apart, norm = 0.0, 0.0
    for name, parameter in model.named_parameters():
        change, size = squares.setdefault(part_of(name), [0.0, 0.0])
        change += (parameter - before[name]).square().sum().item()
        squares[part_of(name)] = [change, size + before[name].square().sum().item()]
        if part_of(name) == "experts":
            mean = parameter.mean(0)
            apart += (parameter - mean).square().sum().item() / len(parameter)
            norm += mean.square().sum().item()
    found = {part: math.sqrt(change / size) for part, (change, size) in squares.items() if size}
    return found | ({"experts_apart": math.sqrt(apart / norm)} if norm else {})


def mutual_information(counts: Tensor) -> float:
    """Of the two variables that index a table of counts, in nats: 0 where they are independent."""
    joint = counts.double() / counts.sum()
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return torch.where(joint > 0, joint * (joint / expected.clamp(min=1e-300)).log(), 0.0).sum().item()


@torch.no_grad()
def minimal_pairs(model: Any, tokenizer: Any, archive: Path, per_file: int) -> dict[str, Any]:
    """Share of BLiMP's pairs (arXiv 1912.00582) whose good sentence is more likely, of the first `per_file` of each
    paradigm."""
    model.eval()
    sentences, files = [], []
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(n for n in opened.namelist() if n.startswith("data/") and n.endswith(".jsonl")):
            with io.TextIOWrapper(opened.open(name), encoding="utf-8") as lines:
                for line, _ in zip(lines, range(per_file), strict=False):
                    pair = json.loads(line)
                    sentences += [pair["sentence_good"], pair["sentence_bad"]]
                    files.append(Path(name).stem)
    ids = tokenizer(sentences, verbose=False)["input_ids"]
    by_length = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    scores = torch.zeros(len(ids), dtype=torch.float64)
    for start in range(0, len(ids), 128):
        numbers = by_length[start : start + 128]
        scores[numbers] = log_likelihoods(model, pad([ids[number] for number in numbers], 0))
    right = scores.view(-1, 2)[:, 0] > scores.view(-1, 2)[:, 1]
    return {"accuracy": right.double().mean().item(), "pairs": len(files), "per_file": per_file}
