"""The routes of one text through a model: what every router scored, who took which token, and with what weight.

Shapes: T tokens, E experts, R chosen (expert, token) pairs.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecmoe.progress import announce, duration, number_of
from modeling_ecmoe import record_routing, use_inference_routing
from modeling_ecmoe.block_ecmoe import EcMoeBlock
from modeling_ecmoe.names_ecmoe import layer_number
from modeling_ecmoe.report_ecmoe import sparse_blocks
from modeling_ecmoe.routing_ecmoe import combine_weights

from .errors import AnalysisError
from .limits import SILENT_SECONDS
from .losses import token_losses
from .planning import MEASURED_TOKENS, seconds_per_token

_MOST_BYTES = 1 << 22  # of a text file; far beyond what fits on a page, and a guard against endless devices


@dataclass(frozen=True)
class LayerRoutes:
    """One sparse layer.

    layer: its number in the model. scores [T, E] and threshold [E]; routes [T, E] bool, True where the expert took the
    token; gates [T, E], the combine weights, 0 where it did not. load [E], tokens relative to the equal share c T / E;
    uncovered, the share of tokens without an expert; fan_out [E + 1], the shares of tokens with 0, 1, ... experts:
    these three as `modeling_ecmoe.routing_report` has them.
    """

    layer: int
    scores: Tensor
    threshold: Tensor
    routes: Tensor
    gates: Tensor
    load: list[float]
    uncovered: float
    fan_out: list[float]


@dataclass(frozen=True)
class TextRoutes:
    """A text and its routes, as inference takes them.

    token_ids, names (as the vocabulary has them) and texts have one entry per token; the texts add up to what was read,
    and are empty where a token stands for no character of its own. loss: causal, nats per token, None for a single
    token.
    """

    model_type: str
    num_experts: int
    capacity_factor: float
    min_experts: int
    max_experts: int | None
    num_groups: int
    has_thresholds: bool
    token_ids: list[int]
    names: list[str]
    texts: list[str]
    loss: float | None
    layers: list[LayerRoutes]


def read_text(text: str | None, text_file: str | None) -> str:
    """The text itself, or that of a UTF-8 file.

    Raises:
        AnalysisError: when none or both are given, for an empty text, and for what is no text.
    """
    if (text is None) == (text_file is None):
        given = "neither is" if text is None else "both are"
        raise AnalysisError(f"give the text itself or a text_file, one of them; {given} given")
    source = "text"
    if text_file is not None:
        source = f"text_file={text_file}"
        if Path(text_file).suffix in (".jsonl", ".parquet"):
            raise AnalysisError(f"{source} holds rows, and a page shows one text; give a row's as text, or a .txt file")
        try:
            with Path(text_file).expanduser().open("rb") as file:
                content = file.read(_MOST_BYTES + 1)
            if len(content) > _MOST_BYTES:
                raise AnalysisError(f"{source} has more than {_MOST_BYTES >> 20} MiB; give a part of it")
            text = content.decode("utf-8-sig")
        except OSError as error:
            raise AnalysisError(f"{source} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise AnalysisError(f"{source} is no UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    assert text is not None
    if not text.strip():
        raise AnalysisError(f"{source} is empty; give some text")
    # Python hands bytes of the command line that are no UTF-8 over as lone surrogates.
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise AnalysisError(f"{source} holds bytes that are no text; give plain text")
    return text


@torch.no_grad()
def routes_of_text(model: Any, tokenizer: Any, text: str, source: str = "text") -> TextRoutes:
    """One pass in eval mode over the text as the tokenizer encodes it.

    A model of thresholds is run with thresholds, whatever its `inference_routing`: the page shows causal routes.

    Raises:
        AnalysisError: when the text has no token or more than the model's context, or a score is not finite.
    """
    ids, texts = _tokens(tokenizer, text)
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if not ids:
        raise AnalysisError(f"{source} has no tokens; give some text")
    if context and len(ids) > context:
        part = _first_part(tokenizer, texts, context)
        remedy = f"its first {number_of(len(part), 'character')} fit" if part else "shorten it"
        if part and source.startswith("text_file="):
            remedy += f": head -c {len(part.encode())} {source.removeprefix('text_file=')} > part.txt"
        raise AnalysisError(
            f"{source} has {len(ids):,} tokens and the model's context is max_position_embeddings={context:,}; {remedy}"
        )
    try:
        blocks = sparse_blocks(model)
    except ValueError as error:
        raise AnalysisError(f"{error}: there are no routes to look at") from error
    has_thresholds = config.inference_routing != "token_choice"
    input_ids = torch.tensor([ids], device=model.device)
    _announce(model, input_ids)
    with (
        use_inference_routing(model, "threshold" if has_thresholds else None),
        _router_outputs(blocks) as outputs,  # before the record, which cannot count what is not finite
        record_routing(model) as record,
    ):
        losses = token_losses(model, {"input_ids": input_ids}, torch.ones_like(input_ids[:, 1:], dtype=torch.bool))
    loss = losses.mean().item() if len(ids) > 1 else None
    statistics = record.report()["layers"]
    return TextRoutes(
        model_type=model.config.model_type,
        num_experts=config.num_experts,
        capacity_factor=float(config.capacity_factor),
        min_experts=config.min_experts_per_token,
        max_experts=config.max_experts_per_token,
        num_groups=config.num_expert_groups,
        has_thresholds=has_thresholds,
        token_ids=ids,
        names=[str(name) for name in tokenizer.convert_ids_to_tokens(ids)],
        texts=texts,
        loss=loss,
        layers=[_layer(name, block, *outputs[name], statistics[name]) for name, block in blocks.items()],
    )


def _announce(model: Any, input_ids: Tensor) -> None:
    """How long a long text takes, by a first piece of it."""
    number = input_ids.shape[1]
    if number <= 2 * MEASURED_TOKENS:
        return
    piece = input_ids[:, :MEASURED_TOKENS]
    seconds = number * seconds_per_token(model, {"input_ids": piece}, torch.ones_like(piece[:, 1:], dtype=torch.bool))
    if seconds > SILENT_SECONDS:
        announce(f"Routing {number:,} tokens: about {duration(seconds)}.")


def _first_part(tokenizer: Any, texts: list[str], context: int) -> str:
    """The beginning of a text, in whole words where it has some, that is at most so many tokens by itself; empty of a
    tokenizer that does not say where in the text its tokens lie."""
    for number in range(
        context if tokenizer.is_fast else 0, 0, -1
    ):  # a part may have more tokens than it had in the whole, by one or two
        part = "".join(texts[:number])
        end = max(part.rfind(" "), part.rfind("\n"))
        part = part[:end] if end > 0 else part
        if len(_tokens(tokenizer, part)[0]) <= context:
            return part
    return ""


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[str]]:
    """Token ids, and the piece of the text that each stands for."""
    if not tokenizer.is_fast:
        ids = tokenizer(text, verbose=False)["input_ids"]
        return ids, [tokenizer.decode([i]) for i in ids]
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    # From where the last one ended: some tokenizers leave white space out of the offsets, and the bytes of one
    # character all name that character.
    texts, position = [], 0
    for _, end in encoded["offset_mapping"]:
        texts.append(text[position:end])
        position = max(position, end)
    if texts:
        texts[-1] += text[position:]
    return encoded["input_ids"], texts


@contextlib.contextmanager
def _router_outputs(blocks: dict[str, EcMoeBlock]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Scores [T, E] and thresholds [E] of every router while the context is open, those of the last pass.

    Raises:
        AnalysisError: in that pass, when a score is not finite.
    """
    outputs: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if not output[1].isfinite().all():
                raise AnalysisError(f"the router scores of {name} are not finite numbers; the checkpoint is damaged")
            outputs[name] = output[1], output[2]

        return hook

    handles = [block.gate.register_forward_hook(hook_of(name)) for name, block in blocks.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _layer(
    name: str, block: EcMoeBlock, scores_TE: Tensor, threshold_E: Tensor, statistics: dict[str, Any]
) -> LayerRoutes:
    """Routes and combine weights of one layer by the library's own functions; see `EcMoeBlock`."""
    routes_TE = block.routes(scores_TE, threshold_E)
    index_R, expert_R = routes_TE.nonzero(as_tuple=True)
    normalize = block.config.normalize_combine_weights
    weight_R, _ = combine_weights(scores_TE[index_R, expert_R], index_R, len(scores_TE), normalize)
    gates_TE = torch.zeros_like(scores_TE)
    gates_TE[index_R, expert_R] = weight_R
    layer = layer_number(name)
    assert layer is not None, name
    return LayerRoutes(
        layer=layer,
        scores=scores_TE.cpu(),
        threshold=threshold_E.cpu(),
        routes=routes_TE.cpu(),
        gates=gates_TE.cpu(),
        load=statistics["load"],
        uncovered=statistics["uncovered"],
        fan_out=statistics["experts_per_token"],
    )
