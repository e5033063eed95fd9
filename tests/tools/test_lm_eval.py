"""lm-evaluation-harness on a local task: the same scores for every batch size, and those of `ecmoe-inspect`."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from checkpoints import DATA
from transformers import AutoModelForCausalLM, AutoTokenizer

from ecmoe.analysis import evaluate
from ecmoe.analysis.evaluation import log_likelihoods
from ecmoe.analysis.text import pad
from modeling_ecmoe import sparse_blocks, use_inference_routing

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "lm_eval"
BLIMP = DATA / "blimp" / "BLiMP.zip"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The task reads its file where the command runs, and `datasets` keeps it where the test's files go."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda *_: None)  # asks the machine for seconds
    monkeypatch.chdir(tmp_path)
    yield


def write_pairs(folder: Path, rows: list[tuple[str, str]]) -> Path:
    path = folder / "minimal_pairs.jsonl"
    lines = [json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def made_up_pairs() -> list[tuple[str, str]]:
    """Sentences of many lengths, each beside itself read backwards."""
    sentences = [part.strip() for part in topics["assignment"].replace("\n", " ").split(". ")]
    chosen = [sentence for sentence in sentences if 10 < len(sentence) < 150][:20]
    return [(sentence, " ".join(reversed(sentence.split()))) for sentence in chosen]


def harness(model: Any, tokenizer: Any, batch_size: int) -> tuple[float, list[list[float]]]:
    """Accuracy, and the log-likelihoods of both sentences of every pair."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    tasks = TaskManager(include_path=str(RECIPES), include_defaults=False)
    found = simple_evaluate(language_model, tasks=["minimal_pairs"], task_manager=tasks, bootstrap_iters=0)
    samples = sorted(found["samples"]["minimal_pairs"], key=lambda sample: sample["doc_id"])
    scores = [[score for score, _ in sample["filtered_resps"]] for sample in samples]
    return found["results"]["minimal_pairs"]["acc,none"], scores


def largest_difference(scores: list[list[float]], others: list[list[float]]) -> float:
    return float((torch.tensor(scores) - torch.tensor(others)).abs().max())


def check(checkpoint: Path, pairs: Path) -> tuple[float, Any, Any]:
    """Batches of 1 and 16 give one score, that of `ecmoe-inspect`: the accuracy, the model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    alone, together = (harness(model, tokenizer, batch_size) for batch_size in (1, 16))
    print("largest difference of a log-likelihood", largest_difference(alone[1], together[1]))
    assert largest_difference(alone[1], together[1]) < 1e-3
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()[:8]]
    ids = [tokenizer(row[name])["input_ids"] for row in rows for name in ("sentence_good", "sentence_bad")]
    with torch.no_grad():
        likelihoods = log_likelihoods(model, pad(ids, 0)).view(-1, 2)
    assert largest_difference(alone[1][:8], likelihoods.tolist()) < 1e-3
    ours = evaluate(str(checkpoint), pairs=[str(pairs)], device="cpu")["pairs"]
    assert ours["pairs"] == len(alone[1])
    assert alone[0] == together[0] == pytest.approx(ours["accuracy"])
    return alone[0], model, tokenizer


def test_a_batch_changes_no_score(stories: Path, tmp_path: Path) -> None:
    """The harness pads on the right and passes no attention mask; by top-k, batch mates and padding do change scores.

    Each expert is louder than the one before it, so that another route would show.
    """
    model = AutoModelForCausalLM.from_pretrained(stories)
    with torch.no_grad():
        for block in sparse_blocks(model).values():
            block.experts.down_proj.mul_(torch.linspace(0.5, 1.5, 8)[:, None, None])
    model.save_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / "out")
    _, model, tokenizer = check(tmp_path / "out", write_pairs(tmp_path, made_up_pairs()))
    with use_inference_routing(model, "expert_choice"):
        leaky = [harness(model, tokenizer, batch_size)[1] for batch_size in (1, 16)]
    print("and by top-k", largest_difference(*leaky))
    assert largest_difference(*leaky) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, accuracy",
    [("principle_A_case_1", 0.99), ("irregular_past_participle_verbs", 0.91), ("anaphor_gender_agreement", 0.79)],
)
def test_blimp(stories: Path, tmp_path: Path, name: str, accuracy: float) -> None:
    """1,000 pairs each; the accuracies of the dense model, which `blend` leaves as they are."""
    if not BLIMP.is_file():
        pytest.skip("BLiMP is not beside the repository (ECMOE_TEST_DATA)")
    lines = zipfile.ZipFile(BLIMP).read(f"data/{name}.jsonl").decode().splitlines()
    rows = [(row["sentence_good"], row["sentence_bad"]) for row in map(json.loads, lines)]
    found, _, _ = check(stories, write_pairs(tmp_path, rows))
    print(name, found)
    assert found == pytest.approx(accuracy, abs=0.005)


@pytest.mark.slow
def test_the_command_of_the_recipe(stories: Path, tmp_path: Path) -> None:
    """As written in its first line, in a process that cannot import the package: the code beside the weights runs."""
    words = (RECIPES / "minimal_pairs.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").split()
    assert words[0] == "lm_eval"
    write_pairs(tmp_path, made_up_pairs())
    words = [word.replace("qwen3-8x", str(stories)).replace("recipes/lm_eval", str(RECIPES)) for word in words]
    script = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "from lm_eval.__main__ import cli_evaluate\n"
        "cli_evaluate()\n"
        "assert 'modeling_ecmoe' not in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *words[1:], "--device", "cpu", "--output_path", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["minimal_pairs"]["acc,none"]
    ours = evaluate(str(stories), pairs=[str(tmp_path / "minimal_pairs.jsonl")], device="cpu")["pairs"]
    assert found == pytest.approx(ours["accuracy"])
