"""Four arms on one GPU in one short sitting: `python -m benchmarks gpu-quality --minutes 9 --pack FILE --output DIR`.

`--make-pack FILE --data FOLDER` packs the tokens of all domains into one file of at most 40 MB, where the text is. The
sitting itself needs that file, torch and Transformers. A dense parent is trained from random weights for a quarter of
the time; then the arms go on from it, all of them 50 steps at a time, so that a cut leaves every arm with the same
tokens. Losses are causal, of held-out documents, and are written after every 50 steps. The number of steps comes from
measured ones. `--tiny` runs it at sizes that show nothing but that it runs, on a CPU too.
"""

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import ecmoe
from modeling_ecmoe import calibrate_thresholds

from .gpu import write
from .machine import commit, machine
from .quality.data import DOMAINS, files, interleave, read_domain, trained_bpe, training_batches
from .quality.grid import ARMS
from .quality.train import BETAS, MOST_NORM, WEIGHT_DECAY, learning_rate_factor

MOST_BYTES = 40_000_000
VOCABULARY = 4096
LENGTH = 256  # tokens of a window
HELD_OUT, CALIBRATION = 32, 16  # windows of each domain
CHUNK = 50  # steps between two measurements
PARENT_SHARE = 1 / 4  # of the time
SPARE = 0.85  # of the time that is left is planned; the rest is for what is slower than it was at first
ARM_NAMES = ("dense", "tcq-copy2", "ec-copy2", "tcq-halves")


@dataclass(frozen=True)
class Size:
    hidden: int = 512
    intermediate: int = 1408
    layers: int = 8
    rows: int = 160  # windows of a step; the five domains divide them
    parent_rate: float = 2e-3
    rate: float = 5e-4

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.hidden // 64),
            num_key_value_heads=max(1, self.hidden // 128),
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )


TINY = Size(hidden=32, intermediate=48, layers=1, rows=5)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks gpu-quality", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything; default: %(default)s")
    parser.add_argument("--pack", type=Path, help="the file of tokens")
    parser.add_argument("--output", type=Path, default=Path("gpu_quality"))
    parser.add_argument("--make-pack", type=Path, metavar="FILE", help="write that file, and run nothing")
    parser.add_argument("--data", type=Path, help="folder of corpus-3domains and tinystories-v2-2MiB, for --make-pack")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that it runs, on a CPU too")
    options = parser.parse_args(arguments)
    if options.make_pack:
        if options.data is None:
            stop("make-pack wants --data, the folder of the text")
        missing = [name for name in files() if not (options.data / name).is_file()]
        if missing:
            stop(f"data={options.data} lacks {', '.join(missing)}; name the folder that has them")
        print(make_pack(options.data, options.make_pack))
        return
    if options.pack is None or not options.pack.is_file():
        stop(f"pack={options.pack} is no file; make it with --make-pack FILE --data FOLDER")
    if not options.tiny and not torch.cuda.is_available():
        stop("no GPU is here; give --tiny to see that it runs")
    options.output.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # of every calibration
    Sitting(options.pack, options.output, 60 * options.minutes, TINY if options.tiny else Size()).run()


def stop(reason: str) -> NoReturn:
    """Raises SystemExit, code 2, after one line."""
    print(f"gpu-quality: error: {reason}", file=sys.stderr)
    sys.exit(2)


def make_pack(data: Path, path: Path) -> str:
    """Tokenises every domain by a byte-level BPE of its training documents; a line about what was written."""
    documents = {domain: read_domain(domain, data) for domain in DOMAINS}
    texts: Iterator[str] = itertools.chain.from_iterable(train for train, _ in documents.values())
    tokenizer = trained_bpe(texts, VOCABULARY)
    tensors = {}
    for domain, (train, held_out) in documents.items():
        for part, chosen in (("train", train), ("held_out", held_out)):
            ids = [token for each in tokenizer.encode_batch(chosen) for token in (*each.ids, 0)]
            whole = len(ids) // LENGTH * LENGTH
            tensors[f"{domain} {part}"] = torch.tensor(ids[:whole], dtype=torch.uint16).view(-1, LENGTH)
    size = sum(2 * each.numel() for each in tensors.values())
    if size > MOST_BYTES:
        print(
            f"gpu-quality: error: data={data} makes {size:,} bytes of tokens, more than {MOST_BYTES:,}", file=sys.stderr
        )
        sys.exit(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"vocabulary": str(VOCABULARY)})
    return f"{path}: {size:,} bytes, {', '.join(f'{name} {each.numel():,}' for name, each in tensors.items())}"


class Arm:
    """A model, its optimiser and the batches it has not seen."""

    def __init__(self, model: Any, rate: float, batches: Iterator[Tensor], device: str) -> None:
        self.model = model.to(device).train()
        self.optimizer = torch.optim.AdamW(model.parameters(), rate, BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        self.rate, self.batches, self.device = rate, batches, device
        self.steps, self.seconds = 0, 0.0

    def train(self, count: int, planned: int) -> None:
        """`count` steps of a schedule of `planned`, bfloat16 products on a GPU."""
        self.model.train()
        begin = time.perf_counter()
        for rows in itertools.islice(self.batches, count):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * learning_rate_factor(min(self.steps, planned - 1), planned)
            ids = rows.to(self.device)
            with autocast(self.device):
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MOST_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
        self._wait()
        self.seconds += time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


class Sitting:
    """The parent, then the arms in turns, within the time."""

    def __init__(self, pack: Path, output: Path, seconds: float, size: Size) -> None:
        self.end = time.monotonic() + seconds
        self.seconds, self.size, self.output = seconds, size, output
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            with safe_open(pack, "pt") as file:
                made_here = file.metadata() == {"vocabulary": str(VOCABULARY)}
        except SafetensorError:  # cut off, or something else
            made_here = False
        if not made_here:
            stop(f"pack={pack} is none of --make-pack, or is cut off; make it again")
        tensors = {name: each.to(torch.int64) for name, each in load_file(pack).items()}
        train = {domain: tensors[f"{domain} train"] for domain in DOMAINS}
        self.calibration = {domain: rows[:CALIBRATION] for domain, rows in train.items()}
        self.pools = {domain: rows[CALIBRATION:] for domain, rows in train.items()}
        self.held_out = {domain: tensors[f"{domain} held_out"][:HELD_OUT] for domain in DOMAINS}
        self.figures: dict[str, Any] = {
            "commit": commit(),
            "machine": machine(),
            "size": vars(size) | {"length": LENGTH, "vocabulary": VOCABULARY},
            "tokens_of_domain": {domain: rows.numel() for domain, rows in self.pools.items()},
        }

    def run(self) -> None:
        parent = self._parent()
        arms = {name: self._arm(name, parent) for name in ARM_NAMES}
        self.figures["arms"] = {
            name: {"title": ARMS[name].title, "parameters": arm.model.num_parameters(), "curve": []}
            for name, arm in arms.items()
        }
        self._measure(arms)
        planned = self._planned(arms)
        while all(arm.steps < planned for arm in arms.values()) and self._fits(arms):
            for arm in arms.values():
                arm.train(min(CHUNK, planned - arm.steps), planned)
            self._measure(arms)
        finals = {name: each["curve"][-1]["loss"] for name, each in self.figures["arms"].items()}
        print("; ".join(f"{ARMS[name].title} {loss:.4f}" for name, loss in finals.items()), flush=True)

    def _parent(self) -> Any:
        """A dense model from random weights."""
        torch.manual_seed(0)
        parent = Arm(
            LlamaForCausalLM(self.size.config()), self.size.parent_rate, self._batches(1 << 20, 0), self.device
        )
        parent.train(3, 1 << 20)  # kernels are chosen and memory is taken
        parent.seconds = 0.0
        parent.train(5, 1 << 20)
        second = parent.seconds / 5
        planned = max(10, int(PARENT_SHARE * self.seconds / second))
        parent.train(planned, planned + 8)
        losses = self._losses(parent.model)
        self.figures["parent"] = {
            "steps": parent.steps,
            "tokens": parent.steps * self.size.rows * LENGTH,
            "seconds": parent.seconds,
            "loss": statistics.fmean(losses.values()),
            "losses": losses,
        }
        self._write()
        print(f"parent: {parent.steps} steps, causal loss {self.figures['parent']['loss']:.4f}", flush=True)
        return parent.model

    def _arm(self, name: str, parent: Any) -> Arm:
        arm, model = ARMS[name], copy.deepcopy(parent)
        if arm.init is not None:
            options = {"init": arm.init, "capacity_factor": float(arm.routed), **arm.conversion}
            model = ecmoe.upcycle(model, **options)
            for field, value in arm.fields(1 << 20).items():
                setattr(model.config, field, value)
            model.config.validate()
        return Arm(model, self.size.rate, self._batches(1 << 20, 1), self.device)

    def _batches(self, steps: int, seed: int) -> Iterator[Tensor]:
        return training_batches(self.pools, self.size.rows, steps, seed)

    def _planned(self, arms: dict[str, Arm]) -> int:
        """How many steps of every arm fit; the steps that are timed for it count."""
        for arm in arms.values():
            arm.train(3, 1 << 20)
            arm.seconds = 0.0
            arm.train(4, 1 << 20)
        second = sum(arm.seconds / 4 for arm in arms.values())
        fits = int(SPARE * (self.end - time.monotonic()) / second)
        planned = max(CHUNK, fits // CHUNK * CHUNK)
        self.figures["seconds_per_step"] = {name: arm.seconds / 4 for name, arm in arms.items()}
        print(f"{planned} steps of each of {len(arms)} arms, {second:.3f} s for one of each", flush=True)
        return planned

    def _fits(self, arms: dict[str, Arm]) -> bool:
        """Whether another turn ends in time, by the turns so far."""
        return time.monotonic() + CHUNK * sum(arm.seconds / max(arm.steps, 1) for arm in arms.values()) < self.end

    def _measure(self, arms: dict[str, Arm]) -> None:
        for name, arm in arms.items():
            if arm.model.config.model_type != "llama" and arm.model.config.inference_routing == "threshold":
                rows = interleave(list(self.calibration.values()))
                with autocast(self.device):
                    batches = [{"input_ids": part.to(self.device)} for part in rows.split(self.size.rows)]
                    calibrate_thresholds(arm.model, batches)
            losses = self._losses(arm.model)
            found: dict[str, Any] = {
                "steps": arm.steps,
                "tokens": arm.steps * self.size.rows * LENGTH,
                "seconds": arm.seconds,
            }
            found |= {"loss": statistics.fmean(losses.values()), "losses": losses}
            self.figures["arms"][name]["curve"].append(found)
        self._write()

    @torch.no_grad()
    def _losses(self, model: Any) -> dict[str, float]:
        """Nats per token of each domain's held-out windows, as inference routes."""
        model.eval()
        found = {}
        for domain, rows in self.held_out.items():
            ids = rows.to(self.device)
            with autocast(self.device):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            found[domain] = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
        return found

    def _write(self) -> None:
        write(self.output / "gpu_quality.json", self.figures)


if __name__ == "__main__":
    main()
