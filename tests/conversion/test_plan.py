"""Dry runs: nothing is read but headers, nothing is written, and the figures are those of the real thing."""

import json
import os
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoints import contents, write_dense
from huggingface_hub.errors import NotASafetensorsRepoError, RepositoryNotFoundError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from ecmoe.conversion import convert
from ecmoe.conversion.checkpoints.source import Source
from ecmoe.conversion.cli import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_dense(folder, "Llama", max_shard_size="30KB")
    return folder


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Source, "read", read)


def plan_of(source: object, **options: Any) -> dict[str, Any]:
    return convert(str(source), "nowhere", dry_run=True, **options)


def test_dry_run_reads_no_weights_and_writes_nothing(
    tmp_path: Path, dense: Path, no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(dense)
    main([str(dense), str(tmp_path / "out"), "--dry-run", "--num-experts=4", "--router=centroid", "--num-gpus=4"])
    printed = capsys.readouterr().out
    assert "Nothing was written." in printed
    assert "34,720" in printed and "71,840" in printed  # parameters, as below
    assert not list(tmp_path.iterdir())
    assert contents(dense) == before


def header_of(tensors: dict[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """The header of a safetensors file of bf16 tensors, and the size of the file."""
    entries, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + offset


def write_hollow_llama_70b(folder: Path) -> None:
    """Llama-2-70B in fifteen shards of the right headers and sizes, and of holes."""
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 8192}
    config |= {"intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config |= {"num_key_value_heads": 8, "max_position_embeddings": 4096, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    layer = {"input_layernorm": (8192,), "post_attention_layernorm": (8192,)}
    layer |= {f"self_attn.{part}_proj": (8192, 8192) for part in "qo"}
    layer |= {f"self_attn.{part}_proj": (1024, 8192) for part in "kv"}
    layer |= {"mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192), "mlp.down_proj": (8192, 28672)}
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(15)]
    shards[0] = {"model.embed_tokens.weight": (32000, 8192)}
    shards[14] = {"model.norm.weight": (8192,), "lm_head.weight": (32000, 8192)}
    for number in range(80):
        shards[number * 15 // 80] |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    index = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-00015.safetensors"
        header, size = header_of(shard)
        (folder / name).write_bytes(header)
        os.truncate(folder / name, size)
        index |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_seventy_billion_parameters_in_seconds(tmp_path: Path, no_weights: None) -> None:
    write_hollow_llama_70b(tmp_path / "llama")
    began = time.monotonic()
    plan = plan_of(tmp_path / "llama", num_experts=8, capacity_factor=2, num_gpus=64, verify=False)
    assert time.monotonic() - began < 30
    dense, expert, router = 68_976_648_192, 3 * 8192 * 28672, 8 * 8192
    total = dense + 80 * (8 * expert + router)
    active = dense + 80 * (2 * expert + router)
    expected = {"dense": dense, "dense_active": dense, "total": total, "active": active}
    assert plan["parameters"] == expected | {"experts": 80 * 8 * expert}
    assert plan["output_bytes"] == 2 * total + 80 * (8 * 4 + 8)  # and thresholds in float32, their count in int64
    assert plan["sparse_layers"] == 80
    assert plan["flops_per_token"] == {"dense": 2 * (dense - 32000 * 8192), "converted": 2 * (active - 32000 * 8192)}
    others = total - 80 * 8 * expert
    memory = {"ddp": 16 * total, "fsdp2": 16 * total // 64, "expert_parallel": 16 * (others + 80 * 8 * expert // 64)}
    assert plan["training_bytes_per_gpu"] == memory
    # Two experts for each of 16,384 tokens, bf16 rows there and back, forward and backward, 63 of 64 to other GPUs.
    assert plan["all_to_all_bytes_per_step"] == 80 * 4 * (2 * 16384) * (8192 * 2) * 63 // 64
    assert not list(tmp_path.glob("nowhere*")) and not Path("nowhere").exists()


CASES: dict[str, dict[str, Any]] = {
    "Llama": {"num_experts": 4},
    "Mistral": {"num_experts": 4, "capacity_factor": 1.5, "init": "copy"},
    "Qwen2": {"num_experts": 8, "init": "granular", "granularity": 4},
    "Qwen3": {"num_experts": 3, "init": "split", "ratio": 0.25, "layers": "1"},
}


@pytest.mark.parametrize("family", CASES)
def test_sizes_are_those_of_the_files(tmp_path: Path, family: str) -> None:
    """Also with tied embeddings, which are one tensor in the file and one parameter, and with biases."""
    dense = write_dense(tmp_path / "dense", family, tie_word_embeddings=family == "Qwen3")
    plan = plan_of(tmp_path / "dense", **CASES[family])
    convert(str(tmp_path / "dense"), str(tmp_path / "out"), verify=False, max_shard_size="30KB", **CASES[family])
    files = [path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")]
    assert plan["output_bytes"] == sum(len(file) - 8 - int.from_bytes(file[:8], "little") for file in files)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert plan["parameters"]["dense"] == dense.num_parameters()
    assert plan["parameters"]["total"] == model.num_parameters()
    assert plan["parameters"]["experts"] == experts
    used = model.config.capacity_factor / model.config.num_experts
    assert plan["parameters"]["active"] == model.num_parameters() - experts + experts * used
    if family == "Qwen2":  # of its experts' active parameters, the dense FFN's
        assert plan["parameters"]["active"] == dense.num_parameters() + 2 * 8 * 32


def test_memory_is_what_a_step_of_adamw_holds(tmp_path: Path, dense: Path, make_tokens) -> None:
    plan = plan_of(dense, num_experts=4, num_gpus=4)
    convert(str(dense), str(tmp_path / "out"), num_experts=4, verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = make_tokens(2, 30)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    held, of_experts = 0, 0
    for name, parameter in model.named_parameters():
        moments = [value for value in optimizer.state[parameter].values() if value.shape == parameter.shape]
        size = sum(tensor.nbytes for tensor in (parameter, parameter.grad, *moments))
        held += size
        of_experts += size * (".experts." in name)
    expected = {"ddp": held, "fsdp2": held // 4, "expert_parallel": held - of_experts + of_experts // 4}
    assert plan["training_bytes_per_gpu"] == expected
    alone = plan_of(dense, num_experts=4, num_gpus=1)
    assert set(alone["training_bytes_per_gpu"].values()) == {held}
    assert alone["all_to_all_bytes_per_step"] == 0


def test_flops_are_those_that_are_counted(tmp_path: Path, dense: Path, make_tokens) -> None:
    """Of matrix products in a forward pass, without attention scores and without norms."""
    convert(str(dense), str(tmp_path / "out"), num_experts=4, verify=False, capacity_factor=2)
    plan = plan_of(dense, num_experts=4, capacity_factor=2)
    ids = make_tokens(4, 64)
    for name, folder in (("dense", dense), ("converted", tmp_path / "out")):
        model = AutoModelForCausalLM.from_pretrained(folder).train()  # exactly c experts per token, on average
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(ids)
        counted = counter.get_flop_counts()["Global"]
        products = sum(flops for operation, flops in counted.items() if "attention" not in str(operation))
        assert plan["flops_per_token"][name] == pytest.approx(products / ids.numel(), rel=0.01)


# The Hub.


@pytest.fixture
def hub(tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """me/model on the Hub; the list of what was asked of it."""
    asked: list[dict[str, Any]] = []
    snapshot = tmp_path / "hub" / "snapshots" / COMMIT

    def download(repository: str, **options: Any) -> str:
        asked.append({"repository": repository, **options})
        snapshot.mkdir(parents=True, exist_ok=True)
        for path in dense.iterdir():
            if any(path.match(pattern) for pattern in options["allow_patterns"]):
                (snapshot / path.name).write_bytes(path.read_bytes())
        return str(snapshot)

    def metadata(repository: str, revision: str) -> SafetensorsRepoMetadata:
        asked.append({"headers": repository, "revision": revision})
        files, weight_map = {}, {}
        for path in dense.glob("*.safetensors"):
            content = path.read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            header.pop("__metadata__")
            tensors = {name: TensorInfo(**entry) for name, entry in header.items()}
            files[path.name] = SafetensorsFileMetadata({}, tensors)
            weight_map |= dict.fromkeys(tensors, path.name)
        return SafetensorsRepoMetadata(None, len(files) > 1, weight_map, files)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    return asked


def test_dry_run_of_a_hub_id_fetches_no_weights(tmp_path: Path, dense: Path, hub: list, no_weights: None) -> None:
    of_hub, of_folder = plan_of("me/model@v2", num_experts=4), plan_of(dense, num_experts=4)
    for plan in (of_hub, of_folder):  # what changes from one moment to the next
        plan.pop("free_disk_bytes"), plan["conversion"].pop("free_bytes")
    assert of_hub == of_folder
    download, headers = hub
    assert (download["repository"], download["revision"]) == ("me/model", "v2")
    assert not any("safetensors" in pattern or pattern == "*" for pattern in download["allow_patterns"])
    assert headers == {"headers": "me/model", "revision": COMMIT}
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("source", "revision", "fetched"),
    [("me/model", None, None), ("me/model", "v1", "v1"), ("me/model@v2", None, "v2"), ("me/model@v2", "v1", "v2")],
)
def test_hub_id_with_its_revision(
    tmp_path: Path, hub: list, source: str, revision: str | None, fetched: str | None
) -> None:
    """The one in the name goes first. The record holds the commit it came to, the card its name without it."""
    record = convert(source, str(tmp_path / "out"), verify=False, revision=revision)
    (download,) = hub
    assert (download["repository"], download["revision"]) == ("me/model", fetched)
    assert "*.safetensors" in download["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", ".pth")) for pattern in download["allow_patterns"])
    assert (record["source"], record["revision"], record["sources"][0]["revision"]) == (source, COMMIT, COMMIT)
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["me/model"]
    assert f"dense `{source}` by" in card.text


def test_what_the_hub_does_not_have(tmp_path: Path, hub: list, refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Any:
        def act(*_: object, **__: object) -> None:
            raise error

        return act

    for error in (NotASafetensorsRepoError("me/model is no safetensors repo"), Exception("Connection refused")):
        monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", fail(error))
        refuse(["me/model", str(tmp_path / "out"), "--dry-run"], f"could be read from the Hub: {error}", left=["hub"])
    response = type("Response", (), {"headers": {}, "request": None})()
    error = RepositoryNotFoundError("404 Client Error.\n\nRepository Not Found for url: ...", response=response)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail(error))
    message = "source=me/no is no local folder and could not be fetched from the Hub: it has no such repository, or a"
    refuse(["me/no", str(tmp_path / "out")], message, left=["hub"])
