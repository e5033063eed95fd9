"""One run from the parent to its figures."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import modeling_ecmoe  # noqa: F401  registers the family
from ecmoe.conversion import convert

from ..machine import commit, machine
from . import measure, weights
from .data import DOMAINS, LENGTH, MIXTURE, Windows, interleave, load, training_batches
from .grid import ARMS, Run
from .parents import PARENTS
from .train import train

CURVE_WINDOWS = 32  # of each domain at each checkpoint; all of them in the end
CURVE_CALIBRATION = 64  # windows of all domains together
CALIBRATION = 128  # the same, in the end
PAIRS_PER_FILE = 30
TRAIN_WINDOWS = 10_240


class Bench:
    """The data, tokenised once for all runs of a parent.

    data: the folder of `stories260K`, `corpus-3domains`, `tinystories-v2-2MiB` and `blimp`.
    train_windows: of each domain, at most. pairs_per_file: of BLiMP; 0 leaves it out. parent: the dense model's folder.
    """

    def __init__(
        self,
        data: Path,
        train_windows: int = TRAIN_WINDOWS,
        pairs_per_file: int = PAIRS_PER_FILE,
        parent: Path | None = None,
    ) -> None:
        self.data = data
        self.pairs_per_file = pairs_per_file
        self.commit = commit()  # of the code that was loaded; files may change while runs go on
        self.parent = parent or data / "stories260K" / "hf"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.parent)
        self.windows: dict[str, Windows] = load(data, self.tokenizer, train_windows)

    def execute(self, run: Run) -> dict[str, Any]:
        """Trains and measures one run; its figures with recipe, machine, versions and commit."""
        torch.manual_seed(run.seed)
        model, parameters = self.build(run)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in PARENTS[run.parent].frozen))
        steps = self.steps_of(run, parameters)
        measured = _Measured(self, run, model)
        with weights.of(ARMS[run.arm].weights, model, interleave(list(measured.calibration.values()))[: run.pool_rows]):
            found = measured.over(steps)
        return {
            "name": run.name,
            "recipe": run.recipe(),
            "steps": steps,
            "commit": self.commit,
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "parameters": parameters,
            **found,
        }

    def build(self, run: Run) -> tuple[Any, dict[str, int]]:
        """The model that a run begins with, and its parameters: total, and active per token on average."""
        arm = ARMS[run.arm]
        if arm.init is None:
            dense: Any = AutoModelForCausalLM.from_pretrained(self.parent, dtype=torch.float32)
            count = sum(parameter.numel() for parameter in dense.parameters())
            ffn = sum(p.numel() for name, p in dense.named_parameters() if ".mlp." in name)
            return dense, {"total": count, "active": count, "ffn": ffn}
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(Path(scratch) / "converted")
            options: dict[str, Any] = {"init": arm.init, "capacity_factor": float(arm.routed)}
            options |= arm.conversion | run.conversion
            record = convert(str(self.parent), folder, verify=False, seed=run.seed, **options)
            config = AutoConfig.from_pretrained(folder, **arm.fields(run.steps) | run.config)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
        return model, {"total": record["parameters"]["total"], "active": record["parameters"]["active"]}

    @staticmethod
    def steps_of(run: Run, parameters: dict[str, int]) -> int:
        """More steps where a dense run is to have the matrix products of a second FFN, attention scores left out."""
        if not ARMS[run.arm].matched:
            return run.steps
        return round(run.steps * (parameters["active"] + parameters["ffn"]) / parameters["active"])


class _Measured:
    """What is measured of one run on its way."""

    def __init__(self, bench: Bench, run: Run, model: Any) -> None:
        self.bench, self.run, self.model = bench, run, model
        self.domains = MIXTURE if run.data == "mixture" else (run.data,)
        self.held_out = {domain: bench.windows[domain].held_out for domain in self.domains}
        share = CALIBRATION // len(self.domains)
        self.calibration = {domain: bench.windows[domain].calibration[:share] for domain in self.domains}
        self.routed = ARMS[run.arm].init is not None
        self.by_threshold = self.routed and model.config.inference_routing == "threshold"
        # A model that was trained by its thresholds is measured by them; they are as causal as others.
        self.calibrated = self.by_threshold and model.config.routing != "threshold"
        self.curve: list[dict[str, Any]] = []

    def over(self, steps: int) -> dict[str, Any]:
        """Trains, and returns the curve and what is measured before and after."""
        pools = {domain: self.bench.windows[domain].train for domain in self.domains}
        batches = training_batches(pools, self.run.rows, steps, self.run.seed)
        # Of the parent alone: conversions are exact, and would answer the same.
        before = None if self.routed else self._pairs()
        start = self._start()
        weights_before = measure.copied_weights(self.model)
        train(self.model, batches, self.run, steps, self._checkpoint)
        return {
            "start": start,
            "curve": self.curve,
            "movement": measure.movement(self.model, weights_before),
            "final": self._final() | {"pairs_before": before, "pairs_after": self._pairs()},
        }

    def _start(self) -> dict[str, float] | None:
        """What routers that nobody has trained tell about the domains: the naught of `mutual_information`."""
        if not self.routed:
            return None
        with measure.kept_thresholds(self.model):
            if self.by_threshold:
                measure.calibrate(self.model, self.calibration, self.run.pool_rows)
            losses, routes = measure.losses_and_routes(self.model, self.held_out)
        return {"loss": statistics.fmean(losses.values()), "mutual_information": routes["mutual_information"]}

    def _checkpoint(self, step: int) -> None:
        """Loss as inference routes, with thresholds of this moment's weights; those of the training stay."""
        tokens = step * self.run.rows * LENGTH
        if self.calibrated:
            with measure.kept_thresholds(self.model):
                measure.calibrate(self.model, self.calibration, self.run.pool_rows, CURVE_CALIBRATION)
                losses = measure.domain_losses(self.model, self.held_out, CURVE_WINDOWS)
        else:
            losses = measure.domain_losses(self.model, self.held_out, CURVE_WINDOWS)
        self.curve.append({"step": step, "tokens": tokens, "losses": losses})

    def _final(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.calibrated:
            averaged = measure.domain_losses(self.model, self.held_out)
            found["loss_averaged_thresholds"] = statistics.fmean(averaged.values())
            measure.calibrate(self.model, self.calibration, self.run.pool_rows)
        if self.routed:
            losses, found["routes"] = measure.losses_and_routes(self.model, self.held_out)
        else:
            losses = measure.domain_losses(self.model, self.held_out)
        found |= {"loss": statistics.fmean(losses.values()), "losses": losses}
        others = {domain: self.bench.windows[domain].held_out for domain in DOMAINS if domain not in losses}
        found["losses_elsewhere"] = measure.domain_losses(self.model, others)
        if self.by_threshold:
            found["loss_top_k"] = measure.top_k_loss(self.model, self.held_out, self.run.pool_rows)
            found["gap"] = found["loss"] - found["loss_top_k"]
        return found

    def _pairs(self) -> dict[str, Any] | None:
        """BLiMP, of the main comparison alone, at both learning rates."""
        if self.run.part not in ("main", "gentle") or not self.bench.pairs_per_file:
            return None
        archive = self.bench.data / "blimp" / "BLiMP.zip"
        return measure.minimal_pairs(self.model, self.bench.tokenizer, archive, self.bench.pairs_per_file)
