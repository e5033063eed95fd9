"""A mixture whose tokens choose, trained here, converted and trained on in five ways: `python -m benchmarks mixtures`.

The mixture: stories260K with eight copies of each FFN, two experts a token, trained by token choice with a balance loss
on four domains until its experts differ, and saved as a Mixtral. It is converted, measured under every bound on the
experts of a token, and trained for some more steps by each way of routing, on equal tokens; losses are causal, of
held-out documents, the mean over the domains. Expert choice is also begun warm, by the source's own rule whose loads
are evened out before the experts choose, with the loss along the way. Each training run is a file of its own and is not
run again.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ecmoe.analysis.variants import variants_of
from ecmoe.conversion import convert, export
from modeling_ecmoe import sparse_blocks

from .machine import save
from .quality import measure
from .quality.data import MIXTURE, training_batches
from .quality.execute import CALIBRATION, Bench
from .quality.grid import Run
from .quality.store import rounded
from .quality.train import train

TOP_K, EXPERTS = 2, 8
AT_LEAST_1 = "expert choice, at least 1"
_FIELDS = {variant.key: variant.fields for variant in variants_of(EXPERTS) if variant.num_choices == TOP_K}
WAYS = {
    "token choice, balance loss": _FIELDS["dropless"],
    "token choice, nudged bias": _FIELDS["nudged-bias"],
    "token choice, balanced by quantiles": _FIELDS["quantiles"],
    AT_LEAST_1: _FIELDS["at-least-1"],
    "expert choice": _FIELDS["expert-choice"],
    "thresholds": _FIELDS["threshold"],
}
_SOURCES_RULE = _FIELDS["dropless"] | {"router_aux_loss_coef": 0.0}
WARM_STEPS = 50


def _capacity_closing(step: int) -> dict[str, Any]:
    """Token choice that drops what exceeds a capacity, which falls from twice the equal share to the share itself."""
    return _SOURCES_RULE | {"token_choice_capacity_factor": 2 - step / WARM_STEPS}


def _bias_nudged(_step: int) -> dict[str, Any]:
    """Ten times the usual rate: the loads are to be even within WARM_STEPS."""
    return _SOURCES_RULE | {"token_choice_bias_update_rate": 1e-2}


STARTS: dict[str, Callable[[int], dict[str, Any]] | None] = {
    "experts choose at once": None,
    "capacity closes first": _capacity_closing,
    "bias is nudged first": _bias_nudged,
}
ROUTER_RATES = (0.0, 0.1, 1.0, 10.0)  # over the rate of the rest; of one seed
BOUNDS = {"from 0 to 8": (0, None), "from 1 to 8": (1, None), "from 1 to 4": (1, 4), "from 2 to 2": (2, 2)}


def main() -> None:
    """Runs what is not there yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder of stories260K and corpus-3domains")
    parser.add_argument("--runs", type=Path, default=Path("mixture_runs"), help="where runs and the mixture are kept")
    parser.add_argument("--parent-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.data, pairs_per_file=0)
    parent = _once(options.runs / "parent.json", lambda: train_parent(bench, options.runs, options.parent_steps))
    before = _once(options.runs / "before.json", lambda: measure_bounds(bench, options.runs / "mixtral"))
    after = {
        way: [
            _once(
                options.runs / f"{_file_name(way)}-{seed}.json",
                lambda way=way, seed=seed: go_on(bench, options, way, seed),
            )  # type: ignore[misc]
            for seed in range(options.seeds)
        ]
        for way in WAYS
    }
    starts = {
        start: [
            _once(
                options.runs / f"{_file_name(start)}-{seed}.json",
                lambda start=start, seed=seed: begin(bench, options, start, seed),
            )  # type: ignore[misc]
            for seed in range(options.seeds)
        ]
        for start in STARTS
    }
    rates = {
        str(rate): _once(
            options.runs / f"router_rate-{rate}.json", lambda rate=rate: go_on(bench, options, AT_LEAST_1, 0, rate)
        )  # type: ignore[misc]
        for rate in ROUTER_RATES
    }
    figures = {"parent": parent, "before": before, "after": after, "starts": starts, "router_rates": rates}
    path = save("mixtures", _in_short(figures) | {"steps": options.steps, "learning_rate": options.learning_rate})
    print("\n".join([*table(before, after), "", *curves(starts), ""]))
    for rate, run in rates.items():
        print(f"router's rate {rate} of the rest: {run['end']['loss']:.4f}")
    print(f"\n{path}")


def _file_name(title: str) -> str:
    return title.replace(", ", "-").replace(" ", "_")


def _in_short(figures: Any) -> Any:
    """Without the shares of single experts and domains, which the files of the runs keep."""
    if isinstance(figures, dict):
        return {
            name: _in_short(value) for name, value in figures.items() if not name.endswith(("_by_domain", "_shares"))
        }
    return [_in_short(value) for value in figures] if isinstance(figures, list) else figures


def _once(path: Path, work: Any) -> Any:
    """What the file holds, or what the work gives, which it then holds."""
    if not path.is_file():
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(rounded(work())) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    return json.loads(path.read_text(encoding="utf-8"))


def train_parent(bench: Bench, runs: Path, steps: int) -> dict[str, Any]:
    """The mixture, saved as a Mixtral in `runs`, and its figures before and after its training."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copies"
        convert(str(bench.parent), str(folder), init="copy", num_experts=EXPERTS, capacity_factor=TOP_K, verify=False)
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        _set(model, WAYS["token choice, balance loss"])
        start = _figures(bench, model)
        run = Run("tc-copy2", 0, "mixtures", steps=steps, learning_rate=1e-2)
        _train(bench, model, run, seed=100)
        model.save_pretrained(folder)
        bench.tokenizer.save_pretrained(folder)
        export(str(folder), str(runs / "mixtral"), verify=False)
        return {"steps": steps, "start": start, "end": _figures(bench, model)}


def measure_bounds(bench: Bench, mixtral: Path) -> dict[str, Any]:
    """The source by its own rule, and every bound, calibrated for each."""
    model = _converted(mixtral)
    _set(model, _SOURCES_RULE)
    found = {"the source's rule": _figures(bench, model)}
    for name, (least, most) in BOUNDS.items():
        _set(model, _FIELDS["expert-choice"] | {"min_experts_per_token": least, "max_experts_per_token": most})
        found[name] = _figures(bench, model)
    return found


def go_on(bench: Bench, options: Any, way: str, seed: int, router_rate: float = 1.0) -> dict[str, Any]:
    """One way of routing, trained for so many steps; thresholds are calibrated before and after."""
    torch.manual_seed(seed)
    model = _converted(options.runs / "mixtral")
    _set(model, WAYS[way])
    start = _figures(bench, model)
    rates = {"learning_rate": options.learning_rate, "router_rate": router_rate}
    _train(bench, model, Run("ec-copy2", seed, "mixtures", way, steps=options.steps, **rates), seed)
    return {"start": start, "end": _figures(bench, model)}


def begin(bench: Bench, options: Any, start: str, seed: int) -> list[dict[str, Any]]:
    """Expert choice, at least 1, begun in one of STARTS: loss, load and steps at each checkpoint of the training."""
    torch.manual_seed(seed)
    model = _converted(options.runs / "mixtral")
    fields_of = STARTS[start]
    found: list[dict[str, Any]] = []

    def measure_at(step: int) -> None:
        figures = _figures(bench, model)
        found.append({"step": step, "loss": figures["loss"], "routes": figures["routes"]})

    def in_turn(batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Sets the fields of each step before its batch."""
        for step, batch in enumerate(batches):
            is_warm = fields_of is None or step >= WARM_STEPS
            _set(model, WAYS[AT_LEAST_1] if fields_of is None or is_warm else fields_of(step))
            yield batch

    _set(model, WAYS[AT_LEAST_1] if fields_of is None else fields_of(0))
    run = Run("ec-copy2", seed, "mixtures", start, steps=options.steps, learning_rate=options.learning_rate)
    _train(bench, model, run, seed, in_turn, measure_at)
    return found


def curves(starts: dict[str, list[list[dict[str, Any]]]]) -> list[str]:
    """The causal loss along the way, means over the seeds, as a table in Markdown."""
    steps = [point["step"] for point in next(iter(starts.values()))[0]]
    lines = [f"| causal loss after steps | {' | '.join(map(str, steps))} |", f"| --- |{' ---: |' * len(steps)}"]
    for start, seeds in starts.items():
        means = [statistics.fmean(points[number]["loss"] for points in seeds) for number in range(len(steps))]
        lines.append(f"| {start} | {' | '.join(f'{mean:.4f}' for mean in means)} |")
    return lines


def table(before: dict[str, Any], after: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Loss, experts of a token, load and what a token shares with its domain, as a table in Markdown."""
    lines = ["| | causal loss | experts per token | load of an expert | without any |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name, figures in before.items():
        lines.append(_line(f"before: {name}", [figures]))
    lines += [_line(f"after: {way}", [run["end"] for run in runs]) for way, runs in after.items()]
    return lines


def _line(title: str, seeds: list[dict[str, Any]]) -> str:
    losses = [figures["loss"] for figures in seeds]
    spread = f" ± {statistics.stdev(losses) / len(losses) ** 0.5:.4f}" if len(losses) > 1 else ""
    routes = [figures["routes"] for figures in seeds]
    least, most = min(each["load_min"] for each in routes), max(each["load_max"] for each in routes)
    mean = statistics.fmean(each["experts_per_token"] for each in routes)
    without = statistics.fmean(each["uncovered"] for each in routes)
    loss = f"{statistics.fmean(losses):.4f}{spread}"
    return f"| {title} | {loss} | {mean:.2f} | {least:.2f} to {most:.2f} | {without:.1%} |"


def _converted(mixtral: Path) -> Any:
    """Without thresholds, which would be a bias where tokens choose; they are calibrated where experts do."""
    with tempfile.TemporaryDirectory() as scratch:
        convert(str(mixtral), str(Path(scratch) / "converted"), verify=False)
        model = AutoModelForCausalLM.from_pretrained(Path(scratch) / "converted")
    for block in sparse_blocks(model).values():
        block.gate.threshold.zero_()
    return model


def _set(model: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        setattr(model.config, name, value)
    model.config.validate()


def _train(
    bench: Bench,
    model: Any,
    run: Run,
    seed: int,
    in_turn: Callable[[Iterable[Tensor]], Iterable[Tensor]] = lambda batches: batches,
    measure_at: Callable[[int], None] = lambda _step: None,
) -> None:
    pools = {domain: bench.windows[domain].train for domain in MIXTURE}
    train(model, in_turn(training_batches(pools, run.rows, run.steps, seed)), run, run.steps, measure_at)


def _figures(bench: Bench, model: Any) -> dict[str, Any]:
    """Loss, losses by domain and routes of the held-out windows; calibrated on others where there are thresholds."""
    held_out = {domain: bench.windows[domain].held_out for domain in MIXTURE}
    measured = copy.deepcopy(model) if model.config.routing == "threshold" else model  # its own average goes on
    if model.config.inference_routing == "threshold":
        share = CALIBRATION // len(MIXTURE)
        measure.calibrate(measured, {d: bench.windows[d].calibration[:share] for d in MIXTURE}, 32)
    losses, routes = measure.losses_and_routes(measured, held_out)
    return {"loss": statistics.fmean(losses.values()), "losses": losses, "routes": routes}
