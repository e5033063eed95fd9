"""Router rows and thresholds that are measured: from what a layer's FFN sees, or without text from its norm alone."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecmoe.progress import progress_bar
from modeling_ecmoe.calibration_ecmoe import thresholds_of_scores
from modeling_ecmoe.configuration_ecmoe import DenseFFN
from modeling_ecmoe.routing_ecmoe import router_scores

from ..errors import ConversionError
from .initialisations import normal

INPUT_TOKENS = 4_096  # of each layer that k-means sees; D values each are kept
_ROUNDS = 50


def read_prompts(path: Path, num_lists: int) -> list[list[str]]:
    """The prompts of each expert: a JSON file with one list of texts per expert.

    Raises:
        ConversionError: when it is not that, or has another number of lists.
    """
    try:
        prompts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"router_prompts={path} cannot be read as JSON ({error})") from error
    is_lists = isinstance(prompts, list) and all(isinstance(texts, list) and texts for texts in prompts)
    if not is_lists or not all(isinstance(text, str) and text for texts in prompts for text in texts):
        raise ConversionError(f"router_prompts={path} must hold a JSON list with a list of texts for each expert")
    if any(not _is_unicode(text) for texts in prompts for text in texts):
        raise ConversionError(f"router_prompts={path} holds half a surrogate pair (\\ud800 to \\udfff), no text")
    if len(prompts) != num_lists:
        raise ConversionError(f"router_prompts={path} holds {len(prompts)} lists of texts; {num_lists} are needed")
    return prompts


def _is_unicode(text: str) -> bool:
    """False with half of a surrogate pair, which JSON can write and no tokenizer reads."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


@torch.no_grad()
def ffn_inputs(model: Any, batches: list[Tensor], layers: list[int], ffn: DenseFFN) -> dict[int, Tensor]:
    """What the FFNs of these layers of a dense model see: [tokens, D] in the model's dtype, for each layer.

    batches: token ids [B, S], without padding. ffn: where the family has its FFN.
    """
    vocab_size = model.get_input_embeddings().num_embeddings
    for batch in batches:
        if not batch.numel() or int(batch.max()) >= vocab_size:
            raise ConversionError(
                f"a text of router_prompts makes no token, or one beyond vocab_size={vocab_size}; leave it out"
            )
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def hook_of(layer: int) -> Any:
        return lambda _module, inputs, _output: kept[layer].append(inputs[0].flatten(0, -2).cpu())

    decoder = model.get_decoder()
    found = ffn.layers_of(model)
    handles = [ffn.ends_of(found[layer])[0].register_forward_hook(hook_of(layer)) for layer in layers]
    try:
        for batch in progress_bar(batches, desc="FFN inputs", unit="batch"):
            decoder(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


def centroid_rows(inputs_TD: Tensor, num_rows: int, std: float, generator: torch.Generator) -> Tensor:
    """Router rows [R, D]: k-means centroids of the FFN's inputs (arXiv 2604.13508, section 3), rescaled.

    Raises:
        ConversionError: when there are fewer tokens than rows.
    """
    if len(inputs_TD) < num_rows:
        raise ConversionError(f"router=centroid needs at least {num_rows} tokens of text, one per expert")
    return rescaled_rows(k_means(nn.functional.normalize(inputs_TD.float()), num_rows, generator), inputs_TD, std)


def k_means(points_TD: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Centroids [K, D] of points [T, D]: Lloyd's algorithm from k-means++ seeds, until no point moves."""
    centroids = points_TD[torch.randint(len(points_TD), (1,), generator=generator)]
    while len(centroids) < num_clusters:
        distance_T = torch.cdist(points_TD, centroids).min(dim=1).values.square()
        weights_T = distance_T if distance_T.sum() > 0 else torch.ones_like(distance_T)
        centroids = torch.cat([centroids, points_TD[torch.multinomial(weights_T, 1, generator=generator)]])
    nearest_T = torch.full((len(points_TD),), -1)
    for _ in range(_ROUNDS):
        before_T, nearest_T = nearest_T, torch.cdist(points_TD, centroids).argmin(dim=1)
        if torch.equal(before_T, nearest_T):
            break
        sums = torch.zeros_like(centroids).index_add_(0, nearest_T, points_TD)
        counts_K1 = nearest_T.bincount(minlength=num_clusters)[:, None]
        centroids = torch.where(counts_K1 > 0, sums / counts_K1.clamp(min=1), centroids)
    return centroids


def rescaled_rows(directions_RD: Tensor, inputs_TD: Tensor, std: float) -> Tensor:
    """Rows whose logits vary over the tokens as much as those of rows drawn from N(0, std) would.

    What all directions share adds the same logit to every expert and is taken away: a softmax does not see it, and
    sigmoid scores would only saturate.
    """
    rows_RD = directions_RD.float() - directions_RD.float().mean(0)
    inputs_TD = inputs_TD.float()
    wanted = std * inputs_TD.square().sum(1).mean().sqrt()
    found = (inputs_TD @ rows_RD.T).std(0).mean()
    if not (found.isfinite() and wanted.isfinite()):
        raise ConversionError("the FFN inputs of the dense model are not finite: its weights are damaged")
    if not found > 0:
        raise ConversionError("the measured router rows are all the same; give texts that differ, or router=normal")
    return rows_RD * (wanted / found)


def norm_inputs(scale_D: Tensor, shift_D: Tensor, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Stand-ins [T, D] for the FFN's inputs where none can be measured: Gaussian tokens after the layer's norm."""
    tokens_TD = normal((num_tokens, len(scale_D)), generator)
    return nn.functional.normalize(tokens_TD) * len(scale_D) ** 0.5 * scale_D.float() + shift_D.float()


def thresholds_of(rows_ED: Tensor, inputs_TD: Tensor, config: Any) -> Tensor:
    """[E] thresholds at which every expert takes its share of these inputs [T, D], with the config's bounds."""
    logits_TE = inputs_TD.float() @ rows_ED.float().T
    return thresholds_of_scores(router_scores(logits_TE, config.router_score_function), config)
