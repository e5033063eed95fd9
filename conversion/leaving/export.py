"""Leaving the family: an expert-choice checkpoint becomes a plain one, for tools that know no other.

As a conversion: plan, measure, write, verify, and only then give the folder its name.
"""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ecmoe.progress import gigabytes
from modeling_ecmoe import use_inference_routing

from ..arguments import check_arguments
from ..checkpoints.digests import ROUTER_ROWS, Digests, fingerprints, router_digest
from ..checkpoints.folder import Checkpoint
from ..checkpoints.hub import check_hub
from ..checkpoints.places import check_disk, free_place, parse_size, read_json
from ..checkpoints.provenance import RECORD_NAME, VERSIONS
from ..checkpoints.tokenizer import keep_tokenizer
from ..checkpoints.workspace import Workspace, produce
from ..checkpoints.writer import write_shards, write_whole
from ..errors import ConversionError
from ..machine import announce_work, machine_at_hand
from ..models import TOLERANCE, check_memory, greedy_texts, load_model, side_by_side
from ..targets import fields_for_older_tools, ways_out
from ..texts import OWN_TEXT, VERIFICATION_BATCH, Texts, read_texts
from .alike import layers_to_fit
from .card import render_plain_card
from .estimate import estimate, seconds_to_export, tokens_to_fit
from .fit import fit
from .plain import PlainPlan, layer_of, plan_plain

logger = logging.get_logger(__name__)


def export(
    source: str,
    destination: str,
    to: str = "token-choice",
    num_experts_per_tok: int | None = None,
    calibration_tokens: int | None = None,
    seed: int = 0,
    max_shard_size: str = "5GB",
    text: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    verify: bool = True,
    push_to_hub: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes an expert-choice checkpoint as a plain Transformers one and returns what was measured on the way.

    The routing changes: each token takes its `num_experts_per_tok` best experts, and there are no thresholds. Both
    models are run side by side on held-out text, and the record and the card hold the change of the loss.

    Args:
        source: checkpoint folder or Hub id (`name@revision`) of this family.
        destination: folder to make; it must not exist or be empty. It appears when complete, or not at all.
        to: "token-choice" for Mixtral (from Llama and Mistral), Qwen2-MoE or Qwen3-MoE; "glm4-moe" for GLM-4-MoE,
            whose biased sigmoid scores express thresholds, from checkpoints with sigmoid scores.
        num_experts_per_tok: experts of a token; None is the mean number of the source, rounded, and with
            to="glm4-moe" four times that as room for those who have more, unless combine weights are normalised. A
            token-choice source has its own.
        calibration_tokens: what the numbers are measured on that stand for thresholds and weights; None is eight for
            each number of a hidden state, from 4,096 to 16,384. Nothing is measured where the experts of a layer are
            alike or add nothing, as in most conversions before training.
        seed: of the order of the sample text.
        max_shard_size, text, revision, device, push_to_hub: as in `convert`.
        verify: run both models side by side. Without it no model is run at all, which is possible only where
            nothing has to be measured.
        dry_run: return the plan's figures and touch neither weights nor disk.

    Raises:
        ConversionError: for anything the user can put right, for a source that no plain class can hold, and when an
            export that promises to be exact is not.
    """
    check_arguments(locals())
    if not isinstance(source, str | os.PathLike):
        raise ConversionError("source must be a folder or Hub id; save a model in memory with save_pretrained")
    source = os.fspath(source)
    text = None if text is None else os.fspath(text)
    target, shard_size = free_place(destination), parse_size(max_shard_size)
    machine = machine_at_hand(device)
    held = Checkpoint(source, revision, dry_run)
    plan = plan_plain(held, to, num_experts_per_tok, _router_of_a_mixture(held))
    record = _record(plan, source, to, text, seed)
    if not dry_run:  # which reads no weights
        held.check_tied(plan.tied)
    if plan.form.is_scaled and not verify:
        raise ConversionError(
            "verify=False (--no-verify): the scales that stand for the combine weights are measured on text; leave it "
            "out, or say device=auto to run the models off the disk"
        )
    num_tokens = calibration_tokens or tokens_to_fit(plan.source_config)
    texts = read_texts(held, plan.source_config, text, seed, num_tokens) if verify else None
    if push_to_hub:
        check_hub(push_to_hub)
    for note in record["notes"]:
        logger.warning(note)
    if dry_run:
        return record | estimate(plan, target, machine, num_tokens, verify)
    check_disk(target, plan.nbytes)
    check_memory((held.bytes_to_load + plan.nbytes) * verify, device, f"verify={verify}", "verify=False (--no-verify)")
    if texts is not None:
        plan.fitted.extend(layers_to_fit(plan))
        record["calibration_tokens"] = texts.calibration.numel() * bool(plan.fitted)
    what = f"writes {gigabytes(plan.nbytes)}"
    if plan.fitted:
        what += f", measures on {record['calibration_tokens']:,} tokens"
    what += f" and runs both models on {machine.name}" * verify
    announce_work(seconds_to_export(plan, machine, record["calibration_tokens"], verify), what)
    options = {"max_shard_size": max_shard_size, "device": device, "verify": verify}
    purpose = record | options | {"files": fingerprints([held], text)}
    produce(target, purpose, lambda work: _fill(plan, work, shard_size, texts, device, record), push_to_hub)
    return record


def _router_of_a_mixture(held: Checkpoint) -> dict[str, list[float]] | None:
    """Where the router is, to the bit, that of the token-choice checkpoint which this one was converted from: the
    biases that one adds to its scores, by layer. Then it leaves as it came. None elsewhere."""
    path = held.folder / RECORD_NAME
    record = read_json(path) if path.is_file() else {}
    if "router_sha256" not in record:
        return None
    names = sorted((name for name in held.headers if name.endswith(ROUTER_ROWS)), key=lambda name: int(layer_of(name)))
    if record["router_sha256"] != router_digest(piece for name in names for piece in held.pieces(name)):
        return None
    biases: dict[str, list[float]] = record.get("router_biases", {})
    return biases


def _record(plan: PlainPlan, source: str, to: str, text: str | None, seed: int) -> dict[str, Any]:
    """What is known before anything is run."""
    source_config = plan.source_config
    return {
        "source": source,
        "revision": plan.source.commit,
        "to": to,
        "architecture": plan.target.architecture,
        "num_experts": source_config.num_experts + plan.form.num_idle,
        "num_experts_per_tok": plan.form.top_k,
        "capacity_factor": source_config.capacity_factor,
        "form": {name: getattr(plan.form, name) for name in ("num_idle", "is_joined", "is_scaled", "is_shifted")},
        "is_exact": plan.form.is_exact,
        "routing": source_config.routing,
        "is_biased": source_config.token_choice_bias_update_rate is not None,
        "num_expert_groups": source_config.num_expert_groups,
        "same_routes": plan.same_routes,
        "notes": _notes(plan),
        "text": text or OWN_TEXT,
        "calibration_tokens": 0,
        "seed": seed,
        "parameters": plan.parameters,
        "versions": VERSIONS,
    }


def _notes(plan: PlainPlan) -> list[str]:
    """What another tool makes of the output that Transformers does not, one line each."""
    if plan.target.architecture != "Qwen2MoeForCausalLM" or not plan.form.normalised:
        return []
    is_open = "glm4-moe" in ways_out(plan.source_config)
    remedy = "--to glm4-moe writes what it reads right" if is_open else "run this with other tools"
    return [
        "llama.cpp does not read norm_topk_prob=true of Qwen2-MoE, says nothing, and computes something else; " + remedy
    ]


def _fill(
    plan: PlainPlan, work: Workspace, shard_size: int, texts: Texts | None, device: str | None, record: dict[str, Any]
) -> None:
    """Every file of the checkpoint, config.json last; completes the record on the way."""
    folder, dtype = work.checkpoint, plan.source.dtype
    digests = Digests([plan.source])
    digests.start()
    model = None
    if texts is not None:
        model = load_model(AutoModelForCausalLM, plan.source.folder, dtype, device, None)
        if plan.fitted:
            measured = work.recall("measured")
            if measured is None:
                measured = fit(model, plan.form, texts.calibration, plan.fitted)
                work.keep("measured", measured)
            plan.measured.update(measured)
    write_shards(folder, plan.tensors, plan.source_config.num_hidden_layers, shard_size)
    plan.source.copy_companions(folder)
    keep_tokenizer(plan.source, folder, plan.config)
    record["scales"] = {
        name.partition(".")[0]: scales.tolist() for name, scales in plan.measured.items() if name.endswith("scales")
    }
    record["verification"] = None
    if texts is not None:
        record["verification"] = _verify(plan, model, folder, texts, device)
    (sha256,) = digests.result()
    record["sources"] = [{"source": plan.source.source, "revision": plan.source.commit, "sha256": sha256}]
    write_whole(folder / RECORD_NAME, json.dumps(record, indent=2) + "\n")
    write_whole(folder / "README.md", render_plain_card(plan, record))
    write_whole(folder / "config.json", _config_json(plan))  # with it a folder loads, so it comes last


def _config_json(plan: PlainPlan) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        plan.config.save_pretrained(scratch)
        content = json.loads((Path(scratch) / "config.json").read_text(encoding="utf-8"))
    return json.dumps(content | fields_for_older_tools(plan.config), indent=2, sort_keys=True) + "\n"


def _verify(plan: PlainPlan, model: Any, folder: Path, texts: Texts, device: str | None) -> dict[str, Any]:
    """Both models side by side on the text that nothing was measured on, the source by its causal routes.

    Raises:
        ConversionError: when a loss is not finite, or an exact form is not exact.
    """
    dtype = plan.source.dtype
    written_class = getattr(transformers, plan.target.architecture)
    written = load_model(written_class, folder, dtype, device, plan.config)
    models = {"source": model, "export": written}
    routing = "token_choice" if plan.source_config.routing == "token_choice" else "threshold"
    with use_inference_routing(model, routing):
        measured = side_by_side(models, texts.verification, VERIFICATION_BATCH)
    measured |= greedy_texts(models, texts.tokenizer, next(iter(texts.verification.values())))
    measured["loss_tolerance"] = TOLERANCE[dtype]
    changed = abs(measured["loss_change"])
    if not math.isfinite(changed):
        raise ConversionError(
            f"the loss of the source is {measured['loss_source']} and of the export {measured['loss_export']}: the "
            "weights are damaged; fetch them again"
        )
    if plan.form.is_exact and max(changed, measured["kl_divergence"]) > TOLERANCE[dtype]:
        raise ConversionError(
            f"the export does not compute what its source does: the loss changed by {changed:.2e}, divergence "
            f"{measured['kl_divergence']:.2e} (at most {TOLERANCE[dtype]:.0e} is rounding); nothing was written"
        )
    return measured
