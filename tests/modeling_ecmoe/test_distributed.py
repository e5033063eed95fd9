"""Thresholds under data parallelism: two ranks average what one process would see on all of their batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """Largest difference of any rank's thresholds, by the way of accumulation."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("needs the gloo back-end of torch.distributed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("ddp_process.py"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("way", ["one batch", "no_sync", "sync always"])
def test_ranks_average_over_all_batches(way: str, errors: dict[str, float]) -> None:
    assert errors[way] < 1e-6
