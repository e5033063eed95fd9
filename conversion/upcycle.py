"""The conversion from end to end: plan, write, calibrate, verify, and only then give the folder its name."""

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import psutil
import safetensors
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import custom_object_save

from modeling_ecmoe import calibrate_thresholds, sparse_blocks

from .card import render_card
from .errors import ConversionError
from .estimate import estimate, parameters
from .hub import check_hub
from .measure import estimated_thresholds, measured_router, one_per_replica
from .plan import Plan, plan_conversion
from .router import read_prompts
from .sample import OWN_TEXT, check_same_tokenizer, load_tokenizer, read_documents, sample_windows
from .settings import Settings
from .source import Digests, Source
from .verify import TOLERANCE, check, compare
from .workspace import Workspace, produce, sweep
from .writer import overwrite_tensors, parse_size, write_shards, write_whole

RECORD_NAME = "ecmoe_conversion.json"
CALIBRATION_TOKENS = 16_384
VERIFICATION_TOKENS = 4_096
WINDOW = 256  # tokens; shorter where the model's context is
BATCH = 16  # windows; 4,096 tokens are one routing pool
VERIFICATION_BATCH = 4  # windows whose logits of two models are held at once
# What travels along as it is: tokenizer, chat template, generation defaults, licence.
COMPANIONS = ["*token*.json", "vocab*", "merges.txt", "*.model", "*.jinja", "additional_chat_templates/*"]
COMPANIONS += ["generation_config.json", "LICENSE*", "NOTICE*"]

VERSIONS = {module.__name__: module.__version__ for module in (torch, transformers, accelerate, safetensors)}


@dataclass(frozen=True)
class Texts:
    """What the models are run on: token ids [W, L] of text to calibrate on and of other text to verify on."""

    tokenizer: Any
    calibration: Tensor
    verification: Tensor


def convert(
    source: str,
    destination: str,
    num_experts: int | None = None,
    capacity_factor: float | None = None,
    init: str = "shared",
    ratio: float | None = None,
    granularity: int | None = None,
    layers: str = "all",
    router: str = "normal",
    router_prompts: str | None = None,
    mix_with: list[str] | None = None,
    mix_attention: str = "average",
    seed: int = 0,
    max_shard_size: str = "5GB",
    text: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    verify: bool = True,
    push_to_hub: str | None = None,
    dry_run: bool = False,
    num_gpus: int = 8,
) -> dict[str, Any]:
    """Converts a dense checkpoint into an expert-choice one and returns what was measured on the way.

    Killed at any moment, the same call goes on where it stopped, and the folder has the same bytes in the end.

    Args:
        source: checkpoint folder or Hub id (`name@revision` for a certain one) of a family in `plan.FAMILIES`.
        destination: folder to make; it must not exist or be empty. It appears when complete, or not at all.
        num_experts: experts in each layer; None is 8, and with init="mix" one for each checkpoint.
        capacity_factor: mean experts per token; None is 1, and with init="granular" the shards of one FFN.
        init: how experts come from the dense FFN, a key of `conversion.initialisations.INITIALISATIONS`.
        ratio: of the initialisations noise, drop and split; None is their default.
        granularity: shards per dense FFN of the initialisation granular; None is 2.
        layers: "all", "every-second", "last-half", or a list such as "1,3,5"; the others stay dense.
        router: "normal", "centroid", or "hidden" with router_prompts.
        router_prompts: JSON file with one list of texts per expert.
        mix_with: the other checkpoints of init="mix".
        mix_attention: what is not an FFN in init="mix": the "average" of all checkpoints or that of the "first".
        seed: of the router weights, of drawn expert weights and of the order of the sample text.
        max_shard_size: such as "5GB".
        text: UTF-8 text file to calibrate the thresholds on; a little English of Python's own when None.
        revision: of a Hub id.
        device: for calibration and verification; None is the first accelerator, or the CPU. "auto" spreads the models
            over all devices, memory and disk.
        verify: run dense and converted model side by side. Without it no model is run at all, and the thresholds are
            estimated from the router weights.
        push_to_hub: repository to upload the finished folder to.
        dry_run: return the plan's figures and touch neither weights nor disk.
        num_gpus: of the dry run's estimates.

    Raises:
        ConversionError: for anything the user can put right, and when an exact initialisation is not exact.
    """
    settings = Settings(init, num_experts, capacity_factor, ratio, granularity, layers, router, mix_attention, seed)
    target = free_place(destination)
    shard_size = parse_size(max_shard_size)
    if num_gpus < 1:
        raise ConversionError(f"num_gpus={num_gpus} must be at least 1")
    sources = [Source(name, revision if name == source else None, dry_run) for name in [source, *(mix_with or [])]]
    plan = plan_conversion(sources, settings)
    if dry_run:
        return estimate(plan, num_gpus)
    for held in sources:
        held.check_tied(plan.tied)  # not in a dry run, which reads no weights

    texts = _texts(plan, text, verify, seed)
    prompts = _prompts(plan, router_prompts)
    _check_room(plan, target, verify, device)
    if push_to_hub:
        check_hub(push_to_hub)
    record = {
        "source": source,
        "revision": sources[0].commit,
        "text": text or OWN_TEXT,
        "calibration_tokens": texts.calibration.numel() if texts and verify else 0,
        **asdict(plan.settings),
        "parameters": parameters(plan),
        "versions": VERSIONS,
    }
    options = {"max_shard_size": max_shard_size, "device": device, "verify": verify}
    purpose = record | options | {"files": fingerprints(sources, text, router_prompts)}
    produce(
        target,
        purpose,
        lambda work: _fill(plan, work, shard_size, texts, prompts, device, verify, record),
        push_to_hub,
    )
    return record


def free_place(destination: str) -> Path:
    """The folder that a checkpoint may take, after a look at what is there.

    Raises:
        ConversionError: when something is.
    """
    target = Path(destination).expanduser().resolve()  # a link to an empty folder could not be renamed over
    sweep(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConversionError(f"destination={target} exists; name a folder that does not, or remove it")
    if target.is_mount():
        raise ConversionError(f"destination={target} is a mount point and cannot be replaced; name a folder in it")
    return target


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
            dense = _load(plan, plan.sources[0].folder, device)
            measured = measured_router(plan, dense, texts.tokenizer, texts.calibration, prompts)
            work.keep("router", measured)
            del dense
        plan.router_rows.update(measured)
    config: Any = plan.config
    write_shards(folder, plan.tensors, config.num_hidden_layers, shard_size)
    copy_companions(plan.sources[0].folder, folder)
    custom_object_save(plan.model, folder)

    thresholds = work.recall("thresholds")
    if thresholds is None and not verify:
        thresholds = estimated_thresholds(plan, measured)
        work.keep("thresholds", thresholds)
    if thresholds is not None:
        overwrite_tensors(folder, thresholds)
    record["verification"] = None
    if verify:
        assert texts is not None
        converted = _load(plan, folder, device)
        if thresholds is None:
            thresholds = _calibrate(converted, texts.calibration, plan.settings.num_shards)
            work.keep("thresholds", thresholds)
            overwrite_tensors(folder, thresholds)
        dense = _load(plan, plan.sources[0].folder, device)
        verification = compare(dense, converted, texts.tokenizer, texts.verification, VERIFICATION_BATCH)
        check(verification, plan.settings.initialisation.exact, plan.dtype)
        record["verification"] = verification | {"loss_tolerance": TOLERANCE[plan.dtype]}
    record["sources"] = [
        {"source": source.source, "revision": source.commit, "sha256": sha256}
        for source, sha256 in zip(plan.sources, digests.result(), strict=True)
    ]
    write_whole(folder / RECORD_NAME, json.dumps(record, indent=2) + "\n")
    write_whole(folder / "README.md", render_card(plan, record))
    with tempfile.TemporaryDirectory() as scratch:  # with config.json a folder loads, so it comes last and at once
        plan.config.save_pretrained(scratch)
        write_whole(folder / "config.json", (Path(scratch) / "config.json").read_text(encoding="utf-8"))


def _texts(plan: Plan, text: str | None, verify: bool, seed: int) -> Texts | None:
    """Tokenizer and windows, where something is measured on text."""
    for source in plan.sources[1:]:
        check_same_tokenizer(plan.sources[0], source)
    if not verify and plan.settings.router == "normal":
        return None
    return read_texts(plan.sources[0], plan.config, text, seed)


def read_texts(source: Source, config: Any, text: str | None, seed: int) -> Texts:
    """The source's tokenizer, and windows of the user's text or of Python's own.

    Raises:
        ConversionError: when there is no tokenizer, or too little text, or the two do not fit the model.
    """
    tokenizer = load_tokenizer(source.folder)
    length = min(WINDOW, config.max_position_embeddings)
    if length < 2:
        raise ConversionError(f"max_position_embeddings={length} in config.json is too short to run the model on text")
    wanted = (CALIBRATION_TOKENS + VERIFICATION_TOKENS) // length
    documents = read_documents(Path(text).expanduser() if text else None)
    windows = sample_windows(tokenizer, documents, length, wanted, seed)
    if int(windows.max()) >= config.vocab_size:
        raise ConversionError(
            f"the tokenizer of source={source.source} makes token {int(windows.max())}, beyond "
            f"vocab_size={config.vocab_size}; they do not belong together"
        )
    held_out = max(1, len(windows) * VERIFICATION_TOKENS // (CALIBRATION_TOKENS + VERIFICATION_TOKENS))
    return Texts(tokenizer, windows[:-held_out], windows[-held_out:])


def _prompts(plan: Plan, router_prompts: str | None) -> list[list[str]] | None:
    settings = plan.settings
    if (settings.router == "hidden") != (router_prompts is not None):
        raise ConversionError(
            f"router={settings.router} and router_prompts={router_prompts}: router=hidden needs a file of prompts, and "
            "no other router reads one"
        )
    if router_prompts is None:
        return None
    config: Any = plan.config
    return read_prompts(Path(router_prompts).expanduser(), config.num_experts // settings.num_shards)


def _check_room(plan: Plan, target: Path, verify: bool, device: str | None) -> None:
    """Disk for the output, and memory for the models that will be run; before anything is written."""
    check_disk(target, plan.nbytes)
    router = plan.settings.router
    dense_bytes = plan.sources[0].nbytes if verify or router != "normal" else 0
    remedy = "verify=False (--no-verify)" if router == "normal" else "router=normal with --no-verify"
    check_memory(dense_bytes + plan.nbytes * verify, device, f"verify={verify}, router={router}", remedy)


def check_disk(target: Path, nbytes: int) -> None:
    """Room for the output, counting what an earlier run has written of it already.

    Raises:
        ConversionError: with what is needed and what is there.
    """
    place = next(folder for folder in target.absolute().parents if folder.exists())
    written = target.parent / f".{target.name}.partial"
    there = sum(path.stat().st_size for path in written.rglob("*") if path.is_file()) if written.is_dir() else 0
    free = shutil.disk_usage(place).free + there
    if free < nbytes:
        raise ConversionError(
            f"destination={target} needs {nbytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there; "
            "free some, or choose another disk"
        )


def check_memory(nbytes: int, device: str | None, options: str, remedy: str) -> None:
    """Memory for the models that will be run, where they run on the CPU.

    Raises:
        ConversionError: naming the options that ask for it, with what is needed and what is there.
    """
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if device == "auto" or on_gpu:
        return
    available = psutil.virtual_memory().available
    if nbytes > available:
        raise ConversionError(
            f"{options}: the models that are run need {nbytes / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB "
            f"are free; say {remedy}, or device=auto to run them off the disk"
        )


def fingerprints(sources: list[Source], *texts: str | None) -> dict[str, Any]:
    """What tells one state of the input files from another, without reading the weights."""
    stats = {str(path): path.stat() for source in sources for path in source.folder.glob("*") if path.is_file()}
    read = {name: hashlib.sha256(Path(name).expanduser().read_bytes()).hexdigest() for name in texts if name}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()} | read


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, templates, generation defaults and licence of the source folder, byte for byte."""
    for pattern in COMPANIONS:
        for path in filter(Path.is_file, source.glob(pattern)):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _load(plan: Plan, folder: Path, device: str | None) -> Any:
    """The dense model of a source folder, or the converted one, whose folder has no config.json yet."""
    is_dense = (folder / "config.json").is_file()
    return load_model(AutoModelForCausalLM if is_dense else type(plan.model), folder, plan.dtype, device, plan.config)


def load_model(model_class: Any, folder: Path, dtype: torch.dtype, device: str | None, config: Any) -> Any:
    """The model of a folder in eval mode; `config` is used where the folder has no config.json yet.

    Raises:
        ConversionError: when the device is unknown or cannot hold it.
    """
    kwargs: dict[str, Any] = {} if (folder / "config.json").is_file() else {"config": config}
    try:
        if device == "auto":
            return model_class.from_pretrained(folder, dtype=dtype, device_map="auto", **kwargs).eval()
        model: Any = model_class.from_pretrained(folder, dtype=dtype, **kwargs)
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConversionError(f"device={device} is unknown here or cannot hold the model: {reason}") from error


def _calibrate(model: Any, windows: Tensor, granularity: int) -> dict[str, Tensor]:
    """The thresholds and their counts, measured on the converted model.

    Raises:
        ConversionError: when its weights are finite and what it computes is not.
    """
    try:
        calibrate_thresholds(model, [{"input_ids": batch} for batch in windows.split(BATCH)])
    except ValueError as error:
        raise ConversionError(f"the thresholds cannot be measured: {error}") from error
    for block in sparse_blocks(model).values():
        block.gate.threshold.copy_(one_per_replica(block.gate.threshold, granularity))
    return {name: buffer.cpu() for name, buffer in model.state_dict().items() if ".mlp.gate.threshold" in name}
