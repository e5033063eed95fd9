"""The dense models that arms go on from, and what is run of each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .grid import ONE, Run, all_runs, main_runs

# Of the larger parents, what a claim rests on.
_FIVE = ("tcq-copy2", "ec-copy2", "dense", "ec-shared", "tc-copy2", "tcb-copy2", "ec0-copy2", "dense-matched")
_FIVE_AT_ONE = ("tcq-copy1", "tc-copy1", "tcb-copy1", "ec0-copy1", "tcq-halves", "ec0-halves")
_REAL = ("dense", "tcq-copy2", "ec-copy2", "ec0-halves")


@dataclass(frozen=True)
class Parent:
    """A dense model.

    about: for the card. folder: below the data folder where it comes with the data, None where it is given. runs: makes
    what is run of it. card: the page of its tables. frozen: parts of the names of parameters that no arm trains.
    bfloat16: whether training multiplies in it (torch.autocast; weights, moments and what is measured stay float32).
    """

    about: str
    folder: str | None
    runs: Callable[[], list[Run]]
    card: str
    frozen: tuple[str, ...] = ()
    bfloat16: bool = False

    def place(self, data: Path, given: Path | None) -> Path | None:
        return data / self.folder if self.folder else given


def _five_runs() -> list[Run]:
    """Three seeds at both rates; the other ways of one FFN per token with one."""
    arms = (*_FIVE, *_FIVE_AT_ONE)
    runs = main_runs(arms=arms, parent="5M", learning_rate=1e-3)
    runs += main_runs(arms=arms, parent="5M", part="gentle", learning_rate=1e-4)
    runs += [Run(arm, 0, "one", parent="5M", learning_rate=1e-3) for arm in ONE]
    return runs + [Run(arm, 0, "one-gentle", parent="5M", learning_rate=1e-4) for arm in ONE]


def _real_runs() -> list[Run]:
    """One seed, 200,000 tokens."""
    return main_runs((0,), _REAL, parent="SmolLM2-135M", steps=100, rows=16, pool_rows=16, learning_rate=1e-4)


PARENTS = {
    "stories260K": Parent(
        "260,032 parameters, trained on stories alone: the other domains are new to it",
        "stories260K/hf",
        all_runs,
        "stories260K.md",
    ),
    "5M": Parent(
        "a Llama of 5.5 million parameters and 4,096 tokens, trained on prose, documentation and stories "
        "(`--train-parent`; benchmarks/results/quality-parent.json): mathematics and code are new to it",
        None,
        _five_runs,
        "5M.md",
        bfloat16=True,
    ),
    "SmolLM2-135M": Parent(
        "SmolLM2-135M-Instruct (Apache-2.0), as `make real` makes it; embeddings and attention are frozen",
        None,
        _real_runs,
        "SmolLM2-135M.md",
        ("embed_tokens", "lm_head", "self_attn"),
        bfloat16=True,
    ),
}
