"""ecmoe-finetune in processes of its own, for what only a process can show: kills, ranks, and ranks that die.

The processes are forked from a server that has imported everything once, so that each starts in milliseconds.
"""

import importlib
import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from safetensors.torch import load_file

from ecmoe.finetune.data import Endless, prepare
from ecmoe.finetune.losses import IGNORE
from ecmoe.finetune.recipe import Recipe, training_arguments

ROOT = Path(__file__).resolve().parents[1]
# In the processes below and in the fixture `quick_end`: no picture, and little calibration, each sequence a pool of its
# own, so that any number of ranks finds the same thresholds.
QUICK_END: dict[str, Any] = {
    "ecmoe.finetune.calibration.CALIBRATION_TOKENS": 4096,
    "ecmoe.finetune.calibration.CALIBRATION_POOL": 1,
    "ecmoe.finetune.train.draw_curves": lambda *_: None,
}
_context = multiprocessing.get_context("forkserver")


def _main(arguments: list[str], environment: dict[str, str], log: str, dies_at_step: int | None) -> None:
    """What a forked process does: the command, with its output in a file."""
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from ecmoe.finetune.callbacks import StepTimer
    from ecmoe.finetune.cli import main

    torch.set_num_threads(1)
    for name, value in QUICK_END.items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    if dies_at_step is not None:

        def on_step_begin(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == dies_at_step:
                os._exit(1)

        StepTimer.on_step_begin = on_step_begin
    main(arguments)


def prepared(recipe: Recipe, tokenizer: Any, vocab_size: int = 300, wanted: int | None = None) -> Any:
    """Training and held-out sequences of a recipe, as its trainer gets them."""
    train, held_out, _ = prepare(recipe, training_arguments(recipe), tokenizer, vocab_size, wanted)
    return Endless(train) if isinstance(train, IterableDataset) else train, held_out


def learned(tokenizer: Any, labels: list[int]) -> list[str]:
    """The text of each stretch of learned tokens."""
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORE:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def start(
    arguments: list[str], log: Path, environment: dict[str, str] | None = None, dies_at_step: int | None = None
) -> Any:
    """A process that runs the command; `exitcode` is its exit status once it was joined."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    if "PYTHONPATH" not in os.environ:  # the server reads it when it starts
        os.environ["PYTHONPATH"] = path
    _context.set_forkserver_preload(["ecmoe.finetune.cli", "ecmoe.finetune.train", "modeling_ecmoe"])
    process = _context.Process(target=_main, args=(arguments, environment or {}, str(log), dies_at_step), daemon=True)
    process.start()
    return process


def start_ranks(arguments: list[str], folder: Path, ranks: int = 2, dying: tuple[int, int] | None = None) -> list[Any]:
    """The command on several ranks that talk over gloo, as torchrun starts them; their output is in rank*.log.

    dying: a rank and the step at which it is gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        environment |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dies_at_step = dying[1] if dying is not None and dying[0] == rank else None
        processes.append(start(arguments, folder / f"rank{rank}.log", environment, dies_at_step))
    return processes


def finish(processes: list[Any], timeout: float = 120) -> list[int]:
    """Their exit codes; one that does not end in time is killed and fails the test."""
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def comparable(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, Any]]:
    """Weights and thresholds, log and results of a finished run, without what a clock decides."""
    clocks = ("runtime", "per_second", "_time")
    (weights,) = folder.glob("*.safetensors")
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    log = [{name: value for name, value in row.items() if not any(map(name.count, clocks))} for row in log]
    results = json.loads((folder / "finetune_results.json").read_text())
    return load_file(weights), log, {name: value for name, value in results.items() if "per_second" not in name}


def assert_same_run(folder: Path, other: Path) -> None:
    """Bit for bit."""
    weights, log, results = comparable(folder)
    others = comparable(other)
    assert weights.keys() == others[0].keys()
    assert [name for name in weights if not torch.equal(weights[name], others[0][name])] == []
    assert log == others[1]
    assert results == others[2]
