"""Data parallelism: two ranks average the thresholds, and in the global pool route as one process with all tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
POOLS = ["plain", "bounded", "balanced, normalised", "sigmoid, complement"]  # as ddp_process.py has them


def on_two_ranks(script: str, *arguments: str) -> dict:
    """What a script of this folder prints on rank 0 of two."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("needs the gloo back-end of torch.distributed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(script)), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def errors() -> dict:
    """Largest difference of any rank from one process, see ddp_process.py."""
    return on_two_ranks("ddp_process.py")


@pytest.mark.parametrize("experts", [4, pytest.param(3, marks=pytest.mark.slow), 1])
def test_a_sharded_model_keeps_its_thresholds(experts: int) -> None:
    """FSDP2: the same float32 thresholds, averaged over the ranks, in the model and in its state dict; also of stacks
    that the ranks do not divide, and of fewer experts than ranks, where one holds none.

    And under DDP each rank's own pool gives the gradients that it gives without, averaged.
    """
    found = on_two_ranks("fsdp_process.py", str(experts))
    assert found["sharded"] and found["moved"] > 0
    assert found["gradients of shards"] < 1e-6
    # Weights that arrive in bfloat16: scores, thresholds and gradients are float32, scores those of rounded weights.
    assert found["mixed"] == ["torch.float32"] * 3 and found["mixed error"] < 1e-5
    assert found["updates"] == [1, 1]
    assert found["dtypes"] == ["torch.float32"]
    assert found["difference"] < 1e-6
    assert found["gradients"] < 1e-6


@pytest.mark.parametrize("way", ["one batch", "no_sync", "sync always"])
def test_ranks_average_over_all_batches(way: str, errors: dict) -> None:
    assert errors[way] < 1e-6


@pytest.mark.parametrize("halves", ["equal", "unequal", "another length"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("what", ["outputs", "gradients", "thresholds"])
def test_global_pool_is_one_process_with_all_tokens(what: str, pool: str, halves: str, errors: dict) -> None:
    assert errors[f"{pool}, {halves}"][what] < 1e-6


def test_a_pool_of_each_rank_is_told_apart(errors: dict) -> None:
    """Negative control."""
    assert errors["a pool of each rank"] > 1e-3
