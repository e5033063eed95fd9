"""The conversion from end to end: plan, write, calibrate, verify, and only then give the folder its name."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from ecmoe.progress import gigabytes, progress_bar
from modeling_ecmoe import calibrate_thresholds, sparse_blocks
from modeling_ecmoe.names_ecmoe import layer_number

from ..arguments import check_arguments
from ..checkpoints.digests import ROUTER_ROWS, Digests, fingerprints, router_digest
from ..checkpoints.folder import Checkpoint
from ..checkpoints.hub import check_hub
from ..checkpoints.memory import ModelInMemory
from ..checkpoints.places import check_disk, free_place, parse_size
from ..checkpoints.provenance import RECORD_NAME, VERSIONS
from ..checkpoints.source import Source
from ..checkpoints.tokenizer import keep_processor, keep_tokenizer
from ..checkpoints.workspace import Workspace, produce
from ..checkpoints.writer import overwrite_tensors, write_shards, write_whole
from ..errors import ConversionError
from ..machine import announce_work, machine_at_hand
from ..models import TOLERANCE, check_memory, load_model
from ..targets import ways_out
from ..texts import BATCH, OWN_TEXT, VERIFICATION_BATCH, Texts, check_same_tokenizer, read_texts, text_name
from .card import render_card
from .composites import left_out
from .estimate import estimate, parameters, seconds_to_convert
from .measure import ESTIMATED, estimated_thresholds, measured_router, one_per_replica
from .notes import notes_on
from .plan import Plan, plan_conversion
from .regimes import measure_regimes
from .router import read_prompts
from .settings import Settings
from .verify import check, compare, load_warning

logger = logging.get_logger(__name__)


def convert(
    source: str | PreTrainedModel,
    destination: str,
    num_experts: int | None = None,
    capacity_factor: float | None = None,
    init: str | None = None,
    ratio: float | None = None,
    granularity: int | None = None,
    layers: str | list[int] = "all",
    router: str = "normal",
    router_prompts: str | None = None,
    mix_with: list[Any] | None = None,
    mix_attention: str = "average",
    seed: int = 0,
    routing: str | None = None,
    min_experts_per_token: int | None = None,
    max_experts_per_token: int | None = None,
    max_shard_size: str = "5GB",
    text: str | None = None,
    calibration_tokens: int | None = None,
    revision: str | None = None,
    device: str | None = None,
    verify: bool = True,
    push_to_hub: str | None = None,
    dry_run: bool = False,
    num_gpus: int | None = None,
    tokenizer: Any = None,
    text_only: bool = False,
) -> dict[str, Any]:
    """Converts a dense checkpoint, or a mixture whose tokens choose, into an expert-choice one and returns what was
    measured on the way.

    Killed at any moment, the same call goes on where it stopped, and the folder has the same bytes in the end.

    Args:
        source: checkpoint folder or Hub id (`name@revision` for a certain one) of a family in
            `modeling_ecmoe.families()`, or such a model in memory; of the latter an interrupted conversion begins anew.
        destination: folder to make; it must not exist or be empty. It appears when complete, or not at all.
        num_experts: experts in each layer; None is 8, and with init="mix" one for each checkpoint.
        capacity_factor: mean experts per token; None is 1, and with init="granular" the shards of one FFN.
        init: how experts come from the dense FFN, a key of `initialisations.INITIALISATIONS`; None is "shared".
        ratio: of the initialisations noise, drop and split; None is their default.
        granularity: shards per dense FFN of the initialisation granular; None is 2.
        layers: "all", "every-second", "last-half", or a list such as "1,3,5"; the others stay dense.
        router: "normal", "centroid", or "hidden" with router_prompts.
        router_prompts: JSON file with one list of texts per expert.
        mix_with: the other checkpoints, or models, of init="mix".
        mix_attention: what is not an FFN in init="mix": the "average" of all checkpoints or that of the "first".
        seed: of the router weights, of drawn expert weights and of the order of the sample text.
        routing: of a source that is a mixture of experts already: "expert_choice" when None, "threshold", or
            "token_choice", which computes exactly what the source computes.
        min_experts_per_token, max_experts_per_token: of such a source under expert choice, the bounds on the experts
            of a token; None is 1, or 0 where a shared expert covers every token, and no upper bound.
        max_shard_size: such as "5GB".
        text: UTF-8 text file to calibrate the thresholds on, documents separated by <|endoftext|>, or .jsonl with
            `text` or `messages` in each row, which the model's chat template makes text of; the package's sample of
            several kinds of text when None.
        calibration_tokens: of that text, to calibrate on; None is 16,384.
        revision: of a Hub id.
        device: for calibration and verification; None is the first accelerator, or the CPU. "auto" spreads the models
            over all devices, memory and disk.
        verify: run dense and converted model side by side. Without it no model is run at all, and the thresholds are
            estimated from the router weights.
        push_to_hub: repository to upload the finished folder to.
        dry_run: return the plan's figures and touch neither weights nor disk; what would be refused is refused, but for
            a lack of disk and memory, which the figures show.
        num_gpus: of the dry run's estimates; None is the machine at hand.
        tokenizer: of a model in memory; it is saved beside the weights, and needed unless verify=False.
        text_only: of a source that reads images or sound too, write its decoder alone as a causal language model.
            Without it the decoder gets experts and all else stays as it is.

    Raises:
        ConversionError: for anything the user can put right, and when an exact initialisation is not exact.
    """
    check_arguments(locals())
    settings = Settings(init, num_experts, capacity_factor, ratio, granularity, layers, router, mix_attention, seed)
    bounds: Any = {"min_experts_per_token": min_experts_per_token, "max_experts_per_token": max_experts_per_token}
    settings = replace(settings, routing=routing, text_only=text_only, **bounds)
    target, shard_size = free_place(destination), parse_size(max_shard_size)
    machine = machine_at_hand(device)
    sources = [open_source(source, revision, dry_run, tokenizer)]
    text = None if text is None else os.fspath(text)
    for other in mix_with or []:
        sources.append(open_source(other, revision if other == source else None, dry_run, None))
    plan = plan_conversion(sources, settings)
    if not dry_run:  # which reads no weights
        for held in sources:
            held.check_tied(plan.tied)
    texts = _texts(plan, text, verify, seed, calibration_tokens)
    prompts = _prompts(plan, router_prompts)
    if push_to_hub:
        check_hub(push_to_hub)
    notes = notes_on(plan)
    for note in notes:
        logger.warning(note)
    if dry_run:
        return estimate(plan, target, machine, num_gpus, verify, calibration_tokens)
    _check_room(plan, target, verify, device)
    calibrates = verify and not tokens_choose(plan.config)
    record = {
        "source": sources[0].source,
        "revision": sources[0].commit,
        "text": text or OWN_TEXT,
        "calibration_tokens": texts.calibration.numel() if texts and calibrates else 0,
        "calibration_tokens_of_kinds": texts.tokens if texts and calibrates and len(texts.tokens) > 1 else {},
        **asdict(plan.settings),
        "parameters": parameters(plan),
        "left_out": left_out(sources[0]),
        "ways_out": ways_out(plan.model.config),
        "notes": notes,
        "versions": VERSIONS,
    }
    announce_work(
        seconds_to_convert(plan, machine, verify, calibration_tokens),
        f"writes {gigabytes(plan.nbytes)}"
        + f", then calibrates and verifies on {machine.name}" * verify
        + f", from measurements on {machine.name}" * (not verify and router != "normal"),
    )
    options = {"max_shard_size": max_shard_size, "device": device, "verify": verify}
    purpose = record | options | {"files": fingerprints(sources, text, router_prompts)}
    produce(
        target,
        purpose,
        lambda work: _fill(plan, work, shard_size, texts, prompts, device, verify, record),
        push_to_hub,
    )
    if warning := load_warning(record, destination):
        logger.warning(warning)
    return record


def tokens_choose(config: Any) -> bool:
    """Whether there are no thresholds to measure."""
    return bool(config.routing == "token_choice")


def open_source(source: Any, revision: str | None, headers_only: bool, tokenizer: Any) -> Source:
    """The tensors of a checkpoint or of a model in memory.

    Raises:
        ConversionError: for what is neither, and for an option of the other kind.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str):
        if revision is not None:
            raise ConversionError(f"revision={revision} is of a Hub id, and the source is a model in memory")
        held = ModelInMemory(source, tokenizer)
        if held.is_on_meta and not headers_only:
            raise ConversionError(
                f"source={held.place} is on the meta device, without weights; load it, or say dry_run"
            )
        return held
    if tokenizer is not None:
        raise ConversionError(
            "tokenizer is of a model in memory; that of a checkpoint lies in its folder, leave it out"
        )
    return Checkpoint(source, revision, headers_only)


def _fill(
    plan: Plan,
    work: Workspace,
    shard_size: int,
    texts: Texts | None,
    prompts: list[list[str]] | None,
    device: str | None,
    verify: bool,
    record: dict[str, Any],
) -> None:
    """Every file of the checkpoint, config.json last; completes the record on the way."""
    folder = work.checkpoint
    digests = Digests(plan.sources)
    digests.start()
    measured = None
    if plan.settings.router != "normal":
        measured = work.recall("router")
        if measured is None:
            assert texts is not None
            with plan.sources[0].running(plan.dtype, device) as dense:
                measured = measured_router(plan, dense, texts.tokenizer, texts.calibration, prompts)
            work.keep("router", measured)
            del dense
        plan.router_rows.update(measured)
    config: Any = plan.config
    if not tokens_choose(config):
        config.thresholds_from = ESTIMATED if texts is None else text_name(record["text"], texts)
    write_shards(folder, plan.tensors, config.num_hidden_layers, shard_size)
    plan.sources[0].copy_companions(folder)
    keep_tokenizer(plan.sources[0], folder, plan.model.config)
    if plan.is_composite:
        keep_processor(plan.sources[0], folder, plan.model.config)
    custom_object_save(plan.model, folder)

    thresholds = work.recall("thresholds")
    if thresholds is None and not verify and not tokens_choose(config):
        thresholds = estimated_thresholds(plan, measured)
        work.keep("thresholds", thresholds)
    if thresholds is not None:
        overwrite_tensors(folder, thresholds)
    record["verification"] = None
    if verify:
        assert texts is not None
        converted = load_model(type(plan.model), folder, plan.dtype, device, plan.model.config)
        if thresholds is None and not tokens_choose(config):
            thresholds = _calibrate(converted, texts.calibration, plan)
            work.keep("thresholds", thresholds)
            overwrite_tensors(folder, thresholds)
        with plan.sources[0].running(plan.dtype, device) as dense:
            verification = compare(dense, converted, texts.tokenizer, texts.verification, VERIFICATION_BATCH)
        check(verification, plan.is_exact, plan.dtype)
        record["verification"] = verification | {"loss_tolerance": TOLERANCE[plan.dtype]}
        if plan.mixture is not None and not plan.is_exact:
            del record["verification"]["layer_errors"]  # of other routes, not of rounding
            measured_on = texts.calibration, list(texts.verification.values())
            record["verification"] |= measure_regimes(converted, *measured_on, _biases(plan))
    if plan.mixture is not None:  # with it `export` knows whether the router is still the source's
        rows = (t for t in plan.tensors if t.name.endswith(ROUTER_ROWS))
        record["router_sha256"] = router_digest(piece for tensor in rows for piece in tensor.pieces())
        record["router_biases"] = {
            str(layer_number(name)): (-threshold).tolist() for name, threshold in _biases(plan).items()
        }
    record["sources"] = [
        {"source": source.source, "revision": source.commit, "sha256": sha256}
        for source, sha256 in zip(plan.sources, digests.result(), strict=True)
    ]
    write_whole(folder / RECORD_NAME, json.dumps(record, indent=2) + "\n")
    write_whole(folder / "README.md", render_card(plan, record))
    with tempfile.TemporaryDirectory() as scratch:  # with config.json a folder loads, so it comes last and at once
        plan.model.config.save_pretrained(scratch)
        write_whole(folder / "config.json", (Path(scratch) / "config.json").read_text(encoding="utf-8"))


def _biases(plan: Plan) -> dict[str, Tensor]:
    """By threshold's name what stands for the biases of a mixture whose tokens choose by biased scores; [E] each."""
    held = (tensor for tensor in plan.tensors if tensor.sources and ".mlp.gate.threshold" in tensor.name)
    return {tensor.name: piece for tensor in held for piece in tensor.pieces()}


def _texts(plan: Plan, text: str | None, verify: bool, seed: int, calibration_tokens: int | None) -> Texts | None:
    """Tokenizer and windows, where something is measured on text."""
    for source in plan.sources[1:]:
        both = isinstance(source, Checkpoint) and isinstance(plan.sources[0], Checkpoint)
        if both:  # a model in memory says nothing of its tokenizer but the vocabulary's size
            check_same_tokenizer(plan.sources[0], source)
    if not verify and plan.settings.router == "normal":
        return None
    return read_texts(plan.sources[0], plan.config, text, seed, calibration_tokens)


def _prompts(plan: Plan, router_prompts: str | None) -> list[list[str]] | None:
    if router_prompts is None:
        return None
    config: Any = plan.config
    return read_prompts(Path(router_prompts).expanduser(), config.num_experts // plan.settings.num_shards)


def _check_room(plan: Plan, target: Path, verify: bool, device: str | None) -> None:
    """Disk for the output, and memory for the models that will be run; before anything is written."""
    check_disk(target, plan.nbytes)
    router = plan.settings.router
    dense_bytes = plan.sources[0].bytes_to_load if verify or router != "normal" else 0
    remedy = "verify=False (--no-verify)" if router == "normal" else "router=normal with --no-verify"
    check_memory(dense_bytes + plan.nbytes * verify, device, f"verify={verify}, router={router}", remedy)


def _calibrate(model: Any, windows: Tensor, plan: Plan) -> dict[str, Tensor]:
    """The thresholds and their counts, measured on the converted model.

    Raises:
        ConversionError: when its weights are finite and what it computes is not.
    """
    is_dense = plan.settings.initialisation.shares == "all"
    try:
        with _shared_experts_alone(model) if is_dense else contextlib.nullcontext():
            calibrate_thresholds(
                model,
                [{"input_ids": batch} for batch in windows.split(BATCH)],
                progress=lambda batches: progress_bar(batches, desc="Calibrating", unit="batch"),
            )
    except ValueError as error:
        raise ConversionError(f"the thresholds cannot be measured: {error}") from error
    for block in sparse_blocks(model).values():
        block.gate.threshold.copy_(one_per_replica(block.gate.threshold, plan.settings.num_shards))
    return {name: buffer.cpu() for name, buffer in model.state_dict().items() if ".mlp.gate.threshold" in name}


@contextlib.contextmanager
def _shared_experts_alone(model: Any) -> Iterator[None]:
    """While it is open a block runs its router and its shared expert, and no other.

    Where the whole dense FFN stays as shared expert, that is what the block computes at step 0 whatever the routes,
    which the verification checks afterwards, and half of the products.
    """
    blocks: list[Any] = list(sparse_blocks(model).values())

    def forward_of(block: Any) -> Any:
        def forward(hidden_states: Tensor) -> Tensor:
            block.gate(hidden_states.flatten(0, -2))
            return block.shared_expert(hidden_states)

        return forward

    for block in blocks:
        block.forward = forward_of(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
