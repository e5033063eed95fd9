"""Expert parallelism: the experts spread over ranks compute, forward and backward, what a whole block does."""

import pytest
import torch

from modeling_ecmoe.versions_ecmoe import EPImplementationInterface

if EPImplementationInterface is None:
    pytest.skip("expert parallelism is an interface of Transformers since 5.23", allow_module_level=True)

from benchmarks.parallel import on_ranks

from .ep_process import BATCH, SIZE, compare, unequal

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

HIDDEN, _, EXPERTS, TOKENS, CAPACITY = SIZE


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("pool", ["batch", "sequence"])
def test_equal_splits(pool: str, ranks: int) -> None:
    """The results of a whole block; out and back, forward and backward, go the rows and nothing else."""
    found = on_ranks(ranks, compare, "equal_splits", pool)
    assert found["apart"] < 1e-6
    pools = BATCH if pool == "sequence" else 1
    slots = pools * -(-CAPACITY * TOKENS // pools // EXPERTS)  # C of each pool
    assert found["bytes"] == 4 * EXPERTS * slots * HIDDEN * 4
    assert found["calls"] == 4


def test_unequal_batches_are_refused() -> None:
    said = on_ranks(2, unequal)
    assert "take from 5 to 9 rows of one; pack the sequences, or set ep_implementation=all_to_all" in said


def test_the_way_of_transformers() -> None:
    """`all_to_all` computes the same and tells the ranks in a call of its own how many rows they get."""
    found = on_ranks(2, compare, "all_to_all", "batch")
    assert found["apart"] < 1e-6
    assert found["calls"] == 5
