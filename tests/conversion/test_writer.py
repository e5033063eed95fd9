"""The shards that are written piece by piece are safetensors files as the library itself writes them."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import all_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ecmoe.conversion.checkpoints.places import parse_size
from ecmoe.conversion.checkpoints.writer import PlannedTensor, overwrite_tensors, write_shards
from ecmoe.conversion.errors import ConversionError

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def tensors_of_all_kinds() -> dict[str, Tensor]:
    """Odd sizes in an order that would leave wide tensors off their borders."""
    return {
        "model.layers.0.a": torch.randn(3).bfloat16(),
        "model.layers.0.b": torch.randn(5, 7),
        "model.layers.1.c": torch.randn(1, 3).half(),
        "count": torch.tensor(7),
        "model.layers.1.d": torch.randn(2, 3, 5),
        "é": torch.arange(3),
        "last": torch.full((1,), -0.0),
    }


def planned(tensors: dict[str, Tensor]) -> list[PlannedTensor]:
    """Each made in pieces: its rows, which are views of it."""
    return [
        PlannedTensor(name, tuple(t.shape), t.dtype, lambda t=t: iter(t.split(1) if t.dim() else [t]))
        for name, t in tensors.items()
    ]


def header_of(path: Path) -> tuple[dict, int]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), 8 + length


def test_one_file_is_what_the_library_reads_and_would_write(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    write_shards(tmp_path, planned(tensors), 2, 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("model", "theirs"))
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert torch.equal(ours[name].view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_slice("model.layers.0.b")[1:3], tensors["model.layers.0.b"][1:3])
    our_header, their_header = (header_of(tmp_path / f"{name}.safetensors")[0] for name in ("model", "theirs"))
    for name in tensors:
        assert our_header[name]["dtype"] == their_header[name]["dtype"] == DTYPES[tensors[name].dtype]
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("model", "theirs")]
    assert 0 <= sizes[0] - sizes[1] < 64  # spaces after the header


@pytest.mark.parametrize(("dtype", "num_experts"), [(torch.float32, 3), (torch.float32, 8), (torch.bfloat16, 8)])
def test_weights_lie_where_grouped_products_take_them(tmp_path: Path, dtype: torch.dtype, num_experts: int) -> None:
    """A file is mapped into memory as it is, and torch's grouped product takes no weights but on borders of 16 bytes;
    what is between them may be of any size."""
    tensors = {}
    for layer in range(3):
        gate = f"model.layers.{layer}.mlp.gate"
        tensors[f"{gate}.threshold"] = torch.rand(num_experts)
        tensors[f"{gate}.threshold_updates"] = torch.tensor(10)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.rand(num_experts, 16, 8).to(dtype)
    write_shards(tmp_path, planned(tensors), 3, 10**9)
    header, start = header_of(tmp_path / "model.safetensors")
    places = {name: start + header[name]["data_offsets"][0] for name in tensors}
    assert all(place % 8 == 0 for name, place in places.items() if name.endswith("updates"))
    assert all(place % 16 == 0 for name, place in places.items() if "experts" in name)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_every_tensor_lies_on_a_border_of_its_own_width(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    write_shards(tmp_path, planned(tensors), 2, 10**9)
    header, start = header_of(tmp_path / "model.safetensors")
    assert start % 8 == 0
    ends = [0]
    for name, entry in sorted(
        (item for item in header.items() if item[0] in tensors), key=lambda i: i[1]["data_offsets"]
    ):
        first, last = entry["data_offsets"]
        assert first == ends[-1]  # without gaps
        assert (start + first) % tensors[name].element_size() == 0
        ends.append(last)
    assert start + ends[-1] == (tmp_path / "model.safetensors").stat().st_size


def test_shards_are_filled_in_order_and_large_tensors_are_alone(tmp_path: Path) -> None:
    sizes = {"a": 60, "b": 30, "c": 300, "d": 20, "e": 80, "f": 100, "g": 1}
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    write_shards(tmp_path, planned(tensors), 1, 400)
    expected = [["a", "b"], ["c"], ["d", "e"], ["f"], ["g"]]  # 400 bytes are 100 numbers
    names = [f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    for name, content in zip(names, expected, strict=True):
        assert sorted(load_file(tmp_path / name)) == content
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * sum(sizes.values())}
    assert index["weight_map"] == {
        each: name for name, content in zip(names, expected, strict=True) for each in content
    }
    found = all_tensors(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_pieces_that_do_not_add_up_make_no_shard(tmp_path: Path) -> None:
    short = PlannedTensor("a", (4,), torch.float32, lambda: iter([torch.zeros(3)]))
    with pytest.raises(RuntimeError, match="a has 12 bytes, planned were 16"):
        write_shards(tmp_path, [short], 1, 10**9)
    assert not list(tmp_path.glob("*.safetensors"))


def test_overwriting_changes_the_named_tensors_alone(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    write_shards(tmp_path, planned(tensors), 2, 50)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert len(before) > 2
    overwrite_tensors(tmp_path, {"model.layers.0.b": torch.ones(5, 7), "count": torch.tensor(-1)})
    after = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert {name: len(content) for name, content in after.items()} == {n: len(c) for n, c in before.items()}
    found = all_tensors(tmp_path)
    expected = tensors | {"model.layers.0.b": torch.ones(5, 7), "count": torch.tensor(-1)}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(RuntimeError, match=r"count has 16 bytes, its place in .* 8"):
        overwrite_tensors(tmp_path, {"count": torch.zeros(2, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("20kb", 20_000), (" 3 MB ", 3_000_000), ("007KB", 7_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "0KB", "-1GB", "1.5GB", "5GiB", "5TB", "5GB 5GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConversionError, match="is no size; write it as 500MB or 5GB"):
        parse_size(text)
