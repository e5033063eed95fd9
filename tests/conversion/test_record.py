"""What a conversion says of itself: the record, the model card, the upload."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import safetensors
import torch
import transformers
from checkpoints import contents, write_dense
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from ecmoe.conversion import convert
from ecmoe.conversion.cli import main
from ecmoe.conversion.upcycling.initialisations import INITIALISATIONS

# The front matter of a real card, and one thing that must not travel.
README = """---
license: other
license_name: tiny-licence
license_link: LICENSE
base_model: somebody/else
---
# The dense model
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny-dense"
    write_dense(folder, "Llama", max_shard_size="30KB", num_hidden_layers=3)
    (folder / "README.md").write_text(README)
    (folder / "LICENSE").write_text("terms\n")
    return folder


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory, dense: Path, text: Path) -> tuple[Path, dict[str, Any]]:
    """A verified conversion of layers 1 and 2 that is not exact, and its record."""
    out = tmp_path_factory.mktemp("verified") / "out"
    options = {"init": "noise", "ratio": 0.1, "num_experts": 4, "layers": "last-half", "seed": 5, "text": str(text)}
    return out, convert(str(dense), str(out), capacity_factor=1.5, **options)


def sha256(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_the_record_is_the_file(verified: tuple[Path, dict]) -> None:
    out, record = verified
    assert json.loads((out / "ecmoe_conversion.json").read_text()) == record


def test_the_record_holds_the_digest_of_every_source_file(tmp_path: Path, dense: Path) -> None:
    write_dense(tmp_path / "other", "Llama", num_hidden_layers=3, seed=1)
    mixed = {"init": "mix", "mix_with": [str(tmp_path / "other")], "verify": False}
    record = convert(str(dense), str(tmp_path / "out"), **mixed)
    assert record["sources"] == [
        {"source": str(dense), "revision": None, "sha256": sha256(dense)},
        {"source": str(tmp_path / "other"), "revision": None, "sha256": sha256(tmp_path / "other")},
    ]
    assert len(sha256(dense)) > 3 and len(sha256(tmp_path / "other")) == 1


def test_the_record_holds_options_and_versions(verified: tuple[Path, dict], dense: Path, text: Path) -> None:
    _, record = verified
    expected = {"source": str(dense), "revision": None, "text": str(text), "calibration_tokens": 16_384}
    expected |= {"init": "noise", "num_experts": 4, "capacity_factor": 1.5, "ratio": 0.1, "granularity": 1}
    expected |= {"layers": "last-half", "router": "normal", "mix_attention": "average", "seed": 5}
    assert {name: record[name] for name in expected} == expected
    modules = (torch, transformers, accelerate, safetensors)
    assert record["versions"] == {module.__name__: module.__version__ for module in modules}


def test_the_record_holds_what_was_measured(verified: tuple[Path, dict]) -> None:
    """Of an initialisation that changes the model a little: errors of the sparse layers, loss, divergence, texts."""
    measured = verified[1]["verification"]
    assert measured["layer_errors"].keys() == {"1", "2"}
    assert all(0.05 < error < 0.5 for error in measured["layer_errors"].values())  # ratio 0.1, in three matrices
    assert 1e-4 < measured["kl_divergence"] < 1
    assert measured["loss_change"] == measured["loss_converted"] - measured["loss_dense"] != 0
    assert measured["tokens"] == 4096
    assert measured["loss_tolerance"] == 1e-5
    assert 0 < measured["load_min"] <= 1 <= measured["load_max"]
    assert 1 <= measured["experts_per_token"] < 2 and measured["uncovered"] == 0
    assert measured["greedy_prompt"] and measured["greedy_dense"] and measured["greedy_converted"]
    assert measured["greedy_same"] == (measured["greedy_dense"] == measured["greedy_converted"])


def test_the_card_says_what_the_record_says(verified: tuple[Path, dict]) -> None:
    out, record = verified
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    licence = {"license": "other", "license_name": "tiny-licence", "license_link": "LICENSE"}
    general = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    tags = ["mixture-of-experts", "expert-choice", "ecmoe"]
    assert data == licence | general | {"tags": tags}  # no base_model: a folder has no name that others know
    assert (out / "LICENSE").read_text() == "terms\n"
    measured, parameters = record["verification"], record["parameters"]
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", card.text, re.MULTILINE))
    assert rows["parameters"] == f"{parameters['dense']:,} | {parameters['total']:,}"
    assert rows["active per token, on average"] == f"{parameters['dense']:,} | {parameters['active']:,}"
    assert rows["experts per layer"] == "| 4"
    assert rows["mean experts per token"] == "| 1.5"
    assert rows["layers with experts"] == "| 2 of 3"
    loss = rows["causal loss (nats per token, 4,096 tokens of `topics.txt`)"]
    assert loss == f"{measured['loss_dense']:.4f} | {measured['loss_converted']:.4f}"
    assert rows["divergence from the dense model (nats per token)"] == f"| {measured['kl_divergence']:.1e}"
    assert rows["load of an expert, 1 is its share"] == f"| {measured['load_min']:.2f} to {measured['load_max']:.2f}"
    assert rows["tokens chosen by no expert"] == "| 0.0 %"
    noise = INITIALISATIONS["noise"]
    for part in ("`tiny-dense`", "`noise`", noise.summary, noise.source, noise.step_0):
        assert part in card.text
    assert "not verified" not in card.text and "## Licence" not in card.text


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second checkpoint, to mix."""
    folder = tmp_path_factory.mktemp("other")
    write_dense(folder, "Llama", num_hidden_layers=3, seed=1)
    return folder


WORDS = {
    "granular": "cut into 4 shards, each copied 2 times; a token has one of each",
    "mix": "all else is averaged; after",
    "drop": "| share of the neurons that is drawn anew | | 0.5 |",
    "noise": "| the noise's deviation over that of the matrix | | 0.01 |",
    "split": "| share of the neurons that every token passes through | | 0.5 |",
}


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("init", INITIALISATIONS)
def test_every_value_of_a_card_is_filled_in(
    tmp_path: Path, dense: Path, other: Path, text: Path, init: str, verify: bool
) -> None:
    options: dict[str, Any] = {"granular": {"granularity": 4}, "mix": {"mix_with": [str(other)], "num_experts": 8}}
    record = convert(
        str(dense), str(tmp_path / "out"), init=init, verify=verify, text=str(text), **options.get(init, {})
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert not re.search(r"\bG\b|num_experts|[{}]|None|\bnan\b|Undefined|\|\s*\|\s*\|\s*$", card, re.MULTILINE)
    assert WORDS.get(init, "") in card
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", card, re.MULTILINE))
    assert rows["experts per layer"] == "| 8" and rows["router at the start"] == "| N(0, initializer_range)"
    least = 0 if init in ("blend", "shared") else 4 if init == "granular" else 1
    assert rows["experts of one token"] == f"| {least} to 8"
    assert ("thresholds calibrated on" in rows) == ("greedy text" in rows) == verify
    assert ("the router has no gradient" in card) == bool(record["notes"])
    assert bool(record["notes"]) == (init in ("copy", "noise", "drop", "split", "mix"))  # one expert a token, weight 1
    ways = "Mixtral (`--to token-choice`)" + (", GLM-4-MoE (`--to glm4-moe`)" if least == 0 else "")
    assert f"with routes that differ: {ways}." in card


@pytest.mark.parametrize("verify", [True, False])
def test_the_card_holds_no_path_of_this_machine(
    tmp_path: Path, dense: Path, text: Path, verify: bool, few_tokens: None
) -> None:
    """Nor does the folder's name: under another name it is the same card."""
    for name in ("one", "two"):
        convert(str(dense), str(tmp_path / name), text=str(text), verify=verify)
    card = (tmp_path / "one" / "README.md").read_text()
    assert card == (tmp_path / "two" / "README.md").read_text()
    assert str(tmp_path.parents[1]) not in card
    assert not re.search(r"(^|[\s`\"'(])[~/]\w*/", card)


def test_an_unverified_card_says_so_and_holds_no_loss(tmp_path: Path, dense: Path) -> None:
    convert(str(dense), str(tmp_path / "out"), verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "was not verified (`--no-verify`)" in card
    assert "calibrate_thresholds(model, batches)" in card
    assert not re.search("nats|divergence|its share|None|nan", card)


def test_the_card_s_snippet_runs_unattended_without_the_package(tmp_path: Path, verified: tuple[Path, dict]) -> None:
    """Whoever downloads the folder copies it; no line of it may wait for an answer."""
    card = (verified[0] / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    packages = ("modeling_ecmoe", "conversion", "finetune", "analysis")
    hide = f"import sys\nsys.modules.update(dict.fromkeys({packages}))\n"  # an import of them raises
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    script = hide + snippet.replace("this-folder-or-repository", str(verified[0]))
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "[y/N]" not in done.stdout + done.stderr, done.stderr[-2000:]


READMES = {
    "none": (None, "The licence of the dense model applies: LICENSE in this folder."),
    "no front matter": ("# A model\n", "The licence of the dense model applies"),
    "no licence": ("---\ntags: [a]\n---\n", "The licence of the dense model applies"),
    "broken": ("---\nlicense: [mit\nb: : c\n---\n", "The licence of the dense model applies"),
    "a list": ("---\n- mit\n---\n", "The licence of the dense model applies"),
    "no text": (b"\xff\xfe\x00", "The licence of the dense model applies"),
}


@pytest.mark.parametrize("kind", READMES)
def test_sources_without_a_licence_field(
    tmp_path: Path, dense: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    content, note = READMES[kind]
    source = tmp_path / "source"
    source.mkdir()
    for path in dense.iterdir():
        (source / path.name).symlink_to(path)
    (source / "README.md").unlink()
    if content is not None:
        (source / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    main([str(source), str(tmp_path / "out"), "--no-verify"])
    assert capfd.readouterr().err == ""
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "license" not in card.data.to_dict()
    assert f"## Licence\n\n{note}" in card.text
    (source / "LICENSE").unlink()
    convert(str(source), str(tmp_path / "bare"), verify=False)
    assert "The dense checkpoint names no licence" in (tmp_path / "bare" / "README.md").read_text()


def test_the_report_on_the_screen_holds_the_records_figures(
    tmp_path: Path, dense: Path, text: Path, few_tokens: None, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(dense), str(tmp_path / "out"), f"--text={text}"])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "ecmoe_conversion.json").read_text())
    measured = record["verification"]
    figures = [f"{record['parameters'][kind]:,}" for kind in ("dense", "total", "active")]
    figures += [f"{measured['loss_dense']:.6f}", f"{measured['kl_divergence']:.1e}", f"{measured['uncovered']:.1%}"]
    figures += [f"{max(measured['layer_errors'].values()):.1e}", f"{measured['experts_per_token']:.2f}"]
    for figure in [*figures, "Greedy text: the same.", f"Calibrated and measured on {text}.\n"]:
        assert figure in printed


def test_the_report_says_on_which_text_and_how_to_go_on(
    tmp_path: Path, dense: Path, few_tokens: None, capsys: pytest.CaptureFixture[str]
) -> None:
    where = "easured on the package's sample of several kinds of text; --text FILE takes yours.\n"
    main([str(dense), str(tmp_path / "out")])
    assert f"Calibrated and m{where}" in capsys.readouterr().out
    main([str(tmp_path / "out"), str(tmp_path / "plain"), "--to=token-choice"])
    assert f"M{where}" in capsys.readouterr().out
    main([str(dense), str(tmp_path / "estimated"), "--no-verify"])
    printed = capsys.readouterr().out
    assert "train, or call ecmoe.calibrate_thresholds(model, batches), before" in printed
    assert "measured on" not in printed


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A login on the Hub; the list of what was asked of it."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def called(name: str) -> Any:
        return lambda _api, *arguments, **options: asked.append((name, dict(enumerate(arguments)) | options))

    for name in ("whoami", "create_repo", "upload_folder"):
        monkeypatch.setattr(HfApi, name, called(name))
    return asked


def test_push_uploads_the_complete_folder(tmp_path: Path, dense: Path, account: list) -> None:
    complete: dict[str, bytes] = {}
    upload = HfApi.upload_folder

    def look(api: HfApi, **options: Any) -> None:
        complete.update(contents(options["folder_path"]))
        upload(api, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "upload_folder", look)
        main([str(dense), str(tmp_path / "out"), "--no-verify", "--push-to-hub=me/model"])
    assert [name for name, _ in account] == ["whoami", "create_repo", "upload_folder"]
    assert account[1][1] == {0: "me/model", "private": True, "exist_ok": True}
    assert (account[2][1]["repo_id"], account[2][1]["folder_path"]) == ("me/model", tmp_path / "out")
    assert complete == contents(tmp_path / "out")
    assert {"config.json", "README.md", "model.safetensors", "tokenizer.json"} <= complete.keys()


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_a_failed_upload_leaves_the_checkpoint(
    tmp_path: Path, dense: Path, account: list, step: str, refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        response = type("Response", (), {"headers": {}, "request": None})()
        raise HfHubHTTPError("503 Server Error", response=response)

    def disconnect(*_: object, **__: object) -> None:
        raise RuntimeError("Connection refused")  # the HTTP library has errors of its own

    for number, error in enumerate((fail, disconnect), start=1):
        out = tmp_path / f"out{number}"
        monkeypatch.setattr(HfApi, step, error)
        reason = "503 Server Error" if error is fail else "Connection refused"
        message = f"push_to_hub=me/model: {reason}. The checkpoint is complete in {out}; upload it with"
        left = [f"out{i}" for i in range(1, number + 1)]
        refuse([str(dense), str(out), "--no-verify", "--push-to-hub=me/model"], message, left=left)
        transformers.AutoModelForCausalLM.from_pretrained(out)
