"""The conversion from end to end: plan, write, calibrate, verify, and only then give the folder its name."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import accelerate
import safetensors
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import custom_object_save

from modeling_ecmoe import calibrate_thresholds

from .errors import ConversionError
from .plan import Plan, plan_conversion
from .sample import load_tokenizer, read_documents, sample_windows
from .source import SourceWeights, locate
from .verify import compare
from .writer import parse_size, rewrite_tensors, write_shards

RECORD_NAME = "ecmoe_conversion.json"
CALIBRATION_TOKENS = 16_384
VERIFICATION_TOKENS = 4_096
WINDOW = 256  # tokens; shorter where the model's context is
BATCH = 16  # windows; 4,096 tokens are one routing pool
# Exact in float32 up to rounding; in 16 bits the two sums round differently.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# What travels along as it is: tokenizer, chat template, generation defaults, licence.
COMPANIONS = ["*token*.json", "vocab*", "merges.txt", "*.model", "*.jinja", "additional_chat_templates/*"]
COMPANIONS += ["generation_config.json", "LICENSE*", "NOTICE*"]


def convert(
    source: str,
    destination: str,
    num_experts: int = 8,
    capacity_factor: float = 1,
    init: str = "blend",
    seed: int = 0,
    max_shard_size: str = "5GB",
    text: str | None = None,
    revision: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Converts a dense checkpoint into an expert-choice one and returns what was measured on the way.

    Args:
        source: checkpoint folder or Hub id, of a family in `conversion.plan.FAMILIES`.
        destination: folder to make; it must not exist. It appears when complete, or not at all.
        num_experts: experts in each layer.
        capacity_factor: mean experts per token.
        init: how experts come from the dense FFN, a key of `conversion.initialisations.INITIALISATIONS`.
        seed: of the router weights and of the order of the sample text.
        max_shard_size: such as "5GB"; also the peak memory of writing.
        text: UTF-8 text file to calibrate the thresholds on; a little English of Python's own when None.
        revision: of a Hub id.
        device: for calibration and verification; the first accelerator, or the CPU, when None.

    Raises:
        ConversionError: for anything the user can put right, and when an exact initialisation is not exact.
    """
    target = Path(destination).expanduser()
    if target.exists():
        raise ConversionError(f"destination={target} exists; name a folder that does not, or remove it")
    shard_size = parse_size(max_shard_size)
    weights = SourceWeights(locate(source, revision))
    plan = plan_conversion(weights, num_experts, capacity_factor, init, seed)
    tokenizer = load_tokenizer(weights.folder)
    calibration, verification = _windows(plan, tokenizer, text, seed)

    partial = _make_partial(target)
    try:
        _write(plan, weights, partial, shard_size, calibration, device)
        measured = _verify(plan, weights, partial, tokenizer, verification, device)
        record = {
            "source": source,
            "revision": revision,
            "init": init,
            "num_experts": num_experts,
            "capacity_factor": capacity_factor,
            "seed": seed,
            "text": text or "pydoc_data.topics",
            "calibration_tokens": calibration.numel(),
            "parameters": _parameters(plan, weights),
            "verification": measured,
            "versions": {
                module.__name__: module.__version__ for module in (torch, transformers, accelerate, safetensors)
            },
        }
        (partial / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.rename(target)
    except OSError as error:
        raise ConversionError(f"destination={target} cannot be written: {error}") from error
    finally:  # after Ctrl-C as well: nothing half-written stays behind
        shutil.rmtree(partial, ignore_errors=True)
    return record


def _make_partial(target: Path) -> Path:
    """A folder of this run's own beside the target, which is renamed when it is complete."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        partial.chmod(0o755)
    except OSError as error:
        raise ConversionError(f"destination={target} cannot be made: {error}") from error
    return partial


def _windows(plan: Plan, tokenizer: Any, text: str | None, seed: int) -> tuple[Tensor, Tensor]:
    """Windows for calibration and, from other text, for verification."""
    length = min(WINDOW, plan.config.max_position_embeddings)
    wanted = (CALIBRATION_TOKENS + VERIFICATION_TOKENS) // length
    documents = read_documents(Path(text).expanduser() if text else None)
    windows = sample_windows(tokenizer, documents, length, wanted, seed)
    held_out = max(1, len(windows) * VERIFICATION_TOKENS // (CALIBRATION_TOKENS + VERIFICATION_TOKENS))
    return windows[:-held_out], windows[-held_out:]


def _write(
    plan: Plan, weights: SourceWeights, folder: Path, shard_size: int, calibration: Tensor, device: str | None
) -> None:
    """Weights, companions and code, then the thresholds, measured on the checkpoint as it will load."""
    last_shard = write_shards(folder, plan.tensors, plan.dtype.itemsize, shard_size)
    for pattern in COMPANIONS:
        for path in filter(Path.is_file, weights.folder.glob(pattern)):
            copy = folder / path.relative_to(weights.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    custom_object_save(plan.model, folder)
    plan.config.save_pretrained(folder)

    model = _load(folder, device)
    batches = [{"input_ids": batch} for batch in calibration.split(BATCH)]
    calibrate_thresholds(model, batches)
    buffers = {name: buffer.cpu() for name, buffer in model.state_dict().items() if ".mlp.gate.threshold" in name}
    rewrite_tensors(last_shard, buffers)


def _load(folder: Path, device: str | None) -> Any:
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConversionError(f"device={device} is unknown here or cannot hold the model: {reason}") from error


def _verify(
    plan: Plan, weights: SourceWeights, folder: Path, tokenizer: Any, windows: Tensor, device: str | None
) -> dict[str, Any]:
    """Measures dense against converted, and refuses an initialisation that promises exactness and misses it."""
    measured = compare(_load(weights.folder, device), _load(folder, device), tokenizer, windows, BATCH)
    tolerance = TOLERANCE[plan.dtype]
    measured["loss_tolerance"] = tolerance
    changed = abs(measured["loss_change"])
    # In 16 bits a greedy choice between near ties may fall either way; in float32 it must not.
    same_text = measured["greedy_same"] or plan.dtype != torch.float32
    if plan.initialisation.exact and not (changed <= tolerance and same_text):
        raise ConversionError(
            f"the converted model does not compute what the dense one does: the loss changed by {changed:.2e} "
            f"(at most {tolerance:.0e} is rounding), greedy text {'kept' if measured['greedy_same'] else 'changed'}; "
            "nothing was written"
        )
    return measured


def _parameters(plan: Plan, weights: SourceWeights) -> dict[str, int]:
    """Parameters of the dense model, of the converted one, and those that the average token meets."""
    named = [(t.name, torch.Size(t.shape).numel()) for t in plan.tensors if ".mlp.gate.threshold" not in t.name]
    experts = sum(size for name, size in named if ".mlp.experts." in name)
    total = sum(size for _, size in named)
    idle = experts - round(experts * plan.config.capacity_factor / plan.config.num_experts)
    tied = set(plan.model.all_tied_weights_keys) if plan.config.tie_word_embeddings else set()
    dense = sum(torch.Size(weights.shape(name)).numel() for name in weights.names() - tied if "inv_freq" not in name)
    return {"dense": dense, "total": total, "active": total - idle}
