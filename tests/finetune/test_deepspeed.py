"""ZeRO-3 with the leaf setting that is shipped; runs where DeepSpeed is installed, which the tests do not ask for."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkpoints import write_dense, write_text
from safetensors.torch import load_file

from ecmoe.conversion import convert

CONFIG = Path(__file__).resolve().parents[2] / "recipes" / "accelerate" / "zero3.yaml"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_two_processes_under_zero_3(tmp_path: Path) -> None:
    """Trains, keeps one threshold update per step, and saves the whole weights."""
    write_dense(tmp_path / "dense", "Llama")
    text = write_text(tmp_path / "text.txt", documents=12)
    convert(str(tmp_path / "dense"), str(tmp_path / "ecmoe"), num_experts=4, init="blend", verify=False)
    config = yaml.safe_load(CONFIG.read_text()) | {"num_processes": 2, "mixed_precision": "no", "use_cpu": True}
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump(config))
    recipe = {
        "model": str(tmp_path / "ecmoe"),
        "dataset": str(text),
        "output_dir": str(tmp_path / "out"),
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 0.003,
        "validation_fraction": 0.2,
        "max_eval_sequences": 16,
        "use_cpu": True,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "zero3.yaml")]
    command += ["--main_process_port=0", "-m", "ecmoe.finetune", str(tmp_path / "recipe.yaml")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = load_file(tmp_path / "ecmoe/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    checkpoint = load_file(tmp_path / "out/checkpoint-4/model.safetensors")
    updates = {int(tensor) for name, tensor in checkpoint.items() if name.endswith("threshold_updates")}
    assert updates == {1 + 4}  # an estimate counts as one
