"""What a user can get wrong: one line that names it, exit code 2, nothing written."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import psutil
import pytest
import torch
from checkpoints import all_tensors, write_dense
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import modeling_ecmoe
from ecmoe import conversion
from ecmoe.conversion import convert
from ecmoe.conversion.cli import main
from ecmoe.conversion.upcycling.mixtures import MIXTURES
from ecmoe.conversion.upcycling.refusals import REFUSALS


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_dense(folder, "Llama", max_shard_size="30KB")
    return folder


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_header(folder: Path, **fields: object) -> None:
    """Changes what the header of the first shard says of its first tensor."""
    content = first_shard(folder).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header[min(header.keys() - {"__metadata__"})] |= fields
    text = json.dumps(header).encode()
    first_shard(folder).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def scribble(folder: Path) -> None:
    path = first_shard(folder)
    path.write_bytes((200).to_bytes(8, "little") + b"\xff" * (path.stat().st_size - 8))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """One shard in place of all, after a change to the tensors."""
    tensors = all_tensors(folder)
    change(tensors)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def set_value(name: str, value: float) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors[name].view(-1)[5].fill_(value))


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    name = "model.layers.1.mlp.up_proj.weight"
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def pickle_only(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def widen_tokenizer(folder: Path) -> None:
    """A tokenizer of another model: the space is token 5000."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["Ġ"] = 5000
    path.write_text(json.dumps(content))


def tie(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Says that the embeddings are tied, and leaves an lm_head in the file."""
    edit_config(folder, tie_word_embeddings=True)
    rewrite(folder, change)


def copy_embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
NO_MODEL = "describes no model that can be built"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "unsupported family": (
        lambda folder: edit_config(folder, model_type="qwenn3"),
        "model_type=qwenn3 is not supported: no family has that name; the nearest are qwen3, ",
    ),
    "FFN of another kind": (
        lambda folder: edit_config(folder, model_type="bloom"),
        "model_type=bloom is not supported: its FFN adds the residual itself; convert a dense decoder whose layer does",
    ),
    "experts already": (
        lambda folder: edit_config(folder, model_type="gpt_oss", num_local_experts=8),
        "model_type=gpt_oss is not supported: its experts have biases and clamped activations, and its attention ",
    ),
    "cross-attention": (
        lambda folder: edit_config(folder, add_cross_attention=True),
        "its layers look at an encoder, and only decoders by themselves can be converted; give one of those",
    ),
    "experts beside FFNs": (
        lambda folder: edit_config(folder, model_type="gemma4_text", enable_moe_block=True),
        "a gemma4_text with experts beside its FFNs; convert one without",
    ),
    "encoder": (
        lambda folder: edit_config(folder, model_type="t5", is_encoder_decoder=True),
        "model_type=t5 is not supported: it is an encoder and a decoder; convert a decoder by itself",
    ),
    "images": (
        lambda folder: edit_config(folder, model_type="paligemma", vision_config={}),
        "model_type=paligemma is not supported: it reads more than text; convert a text model",
    ),
    "sounds": (
        lambda folder: edit_config(folder, model_type="qwen2_audio", audio_config={}),
        "model_type=qwen2_audio is not supported: it reads more than text; convert a text model",
    ),
    "family is no text": (lambda folder: edit_config(folder, model_type=[]), "model_type=[] is not supported"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object"),
    "unknown dtype": (lambda folder: edit_config(folder, dtype="float33"), "dtype=float33 is no torch dtype"),
    "wrong width": (lambda folder: edit_config(folder, intermediate_size=64), "config.json promises"),
    "width is text": (lambda folder: edit_config(folder, hidden_size="x"), "Field 'hidden_size' expected int"),
    "no heads": (lambda folder: edit_config(folder, num_attention_heads=0), "is no valid llama config"),
    "no width": (lambda folder: edit_config(folder, hidden_size=0), "config.json promises [300, 0]"),
    "no vocabulary": (lambda folder: edit_config(folder, vocab_size=0), NO_MODEL),
    "negative vocabulary": (lambda folder: edit_config(folder, vocab_size=-1), NO_MODEL),
    "unknown activation": (lambda folder: edit_config(folder, hidden_act="foo"), NO_MODEL),
    "padding beyond": (lambda folder: edit_config(folder, pad_token_id=400), NO_MODEL),
    "unknown rope": (lambda folder: edit_config(folder, rope_parameters={"rope_type": "foo"}), NO_MODEL),
    "no context": (lambda folder: edit_config(folder, max_position_embeddings=1), "max_position_embeddings=1"),
    "no biases": (lambda folder: edit_config(folder, mlp_bias=True), "lacks the tensor"),
    "sees later tokens": (
        lambda folder: edit_config(folder, use_bidirectional_attention=True),
        "use_bidirectional_attention=True in ",
    ),
    "quantised": (lambda folder: edit_config(folder, quantization_config={"quant_method": "x"}), "is quantised"),
    "missing shard": (lambda folder: first_shard(folder).unlink(), "is missing"),
    "truncated shard": (lambda folder: os.truncate(first_shard(folder), 2000), "damaged or truncated"),
    "empty shard": (lambda folder: os.truncate(first_shard(folder), 0), "damaged or truncated"),
    "garbage header": (scribble, "damaged or truncated"),
    "dtype of no kind": (lambda folder: edit_header(folder, dtype="F99"), "unknown variant `F99`"),
    "negative shape": (lambda folder: edit_header(folder, shape=[-1]), "damaged or truncated"),
    "eight-bit integers": (cast(torch.int8), "has dtype I8; only float32, bfloat16 and float16"),
    "eight-bit floats": (cast(torch.float8_e4m3fn), "has dtype F8_E4M3; only float32, bfloat16 and float16"),
    "two dtypes": (cast(torch.bfloat16), "have dtypes BF16 and F32; use one"),
    "missing tensor": (lambda folder: edit_index(folder, lambda index: index.pop(UP)), f"lacks the tensor {UP}"),
    "surplus tensor": (
        lambda folder: rewrite(folder, lambda tensors: tensors.update(extra=torch.ones(2))),
        "holds extra (1 such tensors), which a dense llama model of this config does not have",
    ),
    "index lies": (
        lambda folder: edit_index(folder, lambda index: index.update({NORM: first_shard(folder).name})),
        f"lacks {NORM}, which model.safetensors.index.json places there",
    ),
    "index is empty": (lambda folder: edit_index(folder, lambda index: index.clear()), "holds no weight_map"),
    "index points outside": (
        lambda folder: edit_index(folder, lambda index: index.update({NORM: "../model.safetensors"})),
        "is no safetensors file name",
    ),
    "index points anywhere": (
        lambda folder: edit_index(folder, lambda index: index.update({NORM: str(first_shard(folder).resolve())})),
        "is no safetensors file name",
    ),
    "pickles alone": (pickle_only, "pickled, which is never loaded"),
    "not a number": (set_value(UP, float("nan")), f"{UP} of "),
    "infinity": (set_value("lm_head.weight", float("inf")), "holds NaN or infinity: it is damaged"),
    "NaN in a padding row": (set_value("model.embed_tokens.weight", float("nan")), "holds NaN or infinity"),
    "overflow": (set_value(UP, 1e38), "router scores of model.layers.1.mlp are no numbers"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "has no tokenizer"),
    "another tokenizer": (widen_tokenizer, "makes token 5000, beyond vocab_size=300"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_source(tmp_path: Path, dense: Path, damage: str, refuse) -> None:
    source = shutil.copytree(dense, tmp_path / "source")
    act, message = DAMAGE[damage]
    act(source)
    refuse([str(source), str(tmp_path / "out")], message, left=["source"])


def test_an_embedding_that_is_said_to_be_tied_and_is_not(
    tmp_path: Path, dense: Path, refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers loads both, so a model without one of them is another; found in the last of many pieces, also where
    no model is run. An lm_head that is the embedding is none too many."""
    monkeypatch.setattr("ecmoe.conversion.checkpoints.source.PIECE_BYTES", 1000)
    source = shutil.copytree(dense, tmp_path / "source")
    command = [str(source), str(tmp_path / "out"), "--no-verify"]
    message = "is not model.embed_tokens.weight, which tie_word_embeddings=True makes it; set tie_word_embeddings to fa"
    for change in (
        lambda tensors: tensors["lm_head.weight"][-1, -1].add_(1),
        lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].bfloat16()}),
        lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][:-1].contiguous()}),
    ):
        tie(source, lambda tensors, change=change: (copy_embedding(tensors), change(tensors)))
        refuse(command, message, left=["source"])
        main([*command, "--dry-run"])  # which reads no weights
    tie(source, copy_embedding)
    main(command)
    assert "lm_head.weight" not in all_tensors(tmp_path / "out")


def test_damage_is_found_where_the_router_is_measured_first(tmp_path: Path, dense: Path, refuse) -> None:
    source = shutil.copytree(dense, tmp_path / "source")
    set_value("model.layers.0.self_attn.q_proj.weight", float("nan"))(source)
    refuse([str(source), str(tmp_path / "out"), "--router=centroid"], "weights are damaged", left=["source"])


OPTIONS = {
    "--num-experts=0": "num_experts=0 must be at least 1",
    "--num-experts=-2": "num_experts=-2 must be at least 1",
    "--capacity-factor=0": "capacity_factor=0.0 must be above 0",
    "--capacity-factor=9": "at most num_experts=8",
    "--capacity-factor=nan": "capacity_factor=nan must be above 0",
    "--init=clone": "init=clone is unknown; choose one of blend, shared, copy, noise",
    "--init=mix": "init=mix makes experts of several checkpoints; name the others with mix_with",
    "--mix-attention=last": "mix_attention=last is unknown; choose one of average, first",
    "--ratio=0.5": "ratio=0.5 means nothing to init=shared",
    "--init=drop --ratio=1.5": "ratio=1.5 must be between 0 and 1",
    "--init=noise --ratio=-1": "ratio=-1.0 must be between 0 and inf",
    "--init=noise --ratio=inf": "ratio=inf must be between 0 and inf",
    "--init=split --ratio=0": "ratio=0.0 leaves one part of the 48 neurons empty",
    "--init=split --ratio=1": "ratio=1.0 leaves one part of the 48 neurons empty",
    "--granularity=2": "granularity=2 belongs to init=granular, not shared",
    "--init=copy --capacity-factor=0.5": "capacity_factor=0.5: init=copy needs at least 1",
    "--init=mix --capacity-factor=0.5 --mix-with x": "capacity_factor=0.5: init=mix needs at least 1",
    "--init=granular --capacity-factor=1": "capacity_factor=1.0: init=granular needs at least its granularity, 2",
    "--init=granular --capacity-factor=1.5": "init=granular needs at least its granularity, 2",
    "--init=granular --capacity-factor=3 --granularity=4": "init=granular needs at least its granularity, 4",
    "--init=granular --granularity=0": "granularity=0 must be at least 1",
    "--init=granular --granularity=3": "granularity=3 does not divide num_experts=8",
    "--init=granular --granularity=5 --num-experts=10": "does not divide the dense intermediate_size=48",
    "--layers=banana": "layers=banana must be all, every-second, last-half or a list",
    "--layers=99": "layers=99 must be all, every-second, last-half or a list such as 1,3,5 of layers 0 to 1",
    "--layers=-1": "layers=-1 must be all",
    "--router=random": "router=random is unknown; choose one of normal, centroid, hidden",
    "--router=hidden": "router=hidden needs a file of prompts",
    "--router=centroid --num-experts=1": "router rows are all the same",
    "--router-prompts=x.json": "no other router reads one",
    "--router=hidden --router-prompts=missing.json": "router_prompts=missing.json cannot be read (No such file",
    "--num-gpus=0": "num_gpus=0 must be at least 1",
    "--num-gpus=0 --dry-run": "num_gpus=0 must be at least 1",
    "--max-shard-size=5": "max_shard_size=5 is no size",
    "--max-shard-size=0GB": "max_shard_size=0GB is no size",
    "--text=missing.txt": "text=missing.txt cannot be read",
    "--device=warp": "device=warp",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_wrong_option(tmp_path: Path, dense: Path, options: str, refuse) -> None:
    """Of a dry run as well, but for what only running a model shows."""
    command = [str(dense), str(tmp_path / "out"), *options.split()]
    refuse(command, OPTIONS[options], left=[])
    if options != "--router=centroid --num-experts=1":
        refuse([*command, "--dry-run"], OPTIONS[options], left=[])


PROMPTS = {
    '[["a"], ["b"]': "cannot be read as JSON",
    '{"a": ["b"]}': "must hold a JSON list with a list of texts for each expert",
    '["a", "b"]': "must hold a JSON list with a list of texts for each expert",
    '[["a"], []]': "must hold a JSON list with a list of texts for each expert",
    '[["a"], [3]]': "must hold a JSON list with a list of texts for each expert",
    '[["a"], [""]]': "must hold a JSON list with a list of texts for each expert",
    '[["a"]]': "holds 1 lists of texts; 2 are needed",
    '[["a"], ["b"], ["c"]]': "holds 3 lists of texts; 2 are needed",
    '[["a"], ["a"]]': "router rows are all the same",
}


@pytest.mark.parametrize("content", PROMPTS)
def test_wrong_prompts(tmp_path: Path, dense: Path, content: str, refuse) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(content)
    options = ["--num-experts=2", "--router=hidden", f"--router-prompts={path}"]
    command = [str(dense), str(tmp_path / "out"), *options]
    refuse(command, PROMPTS[content], left=["prompts.json"])
    if "router rows" not in PROMPTS[content]:  # which only running the model shows
        refuse([*command, "--dry-run"], PROMPTS[content], left=["prompts.json"])


def test_prompts_of_another_vocabulary(tmp_path: Path, dense: Path, text: Path, refuse) -> None:
    source = shutil.copytree(dense, tmp_path / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 5000, "content": "☃", "special": False})
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "prompts.json").write_text('[["a"], ["☃"]]')
    options = ["--num-experts=2", "--router=hidden", f"--router-prompts={tmp_path}/prompts.json", f"--text={text}"]
    message = "one beyond vocab_size=300"
    refuse([str(source), str(tmp_path / "out"), *options], message, left=["prompts.json", "source"])


def test_checkpoints_that_do_not_mix(tmp_path: Path, dense: Path, refuse) -> None:
    write_dense(tmp_path / "wider", "Llama", intermediate_size=64)
    write_dense(tmp_path / "qwen", "Qwen2")
    write_dense(tmp_path / "half", "Llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    shutil.copytree(dense, tmp_path / "tokens")
    path = tmp_path / "tokens" / "tokenizer.json"
    path.write_text(path.read_text().replace('"<eos>"', '"<end>"'))
    others = sorted(path.name for path in tmp_path.iterdir())

    def check(message: str, *options: str) -> None:
        refuse([str(dense), str(tmp_path / "out"), *options], message, left=others)

    check("one architecture: intermediate_size=64", "--init=mix", "--mix-with", str(tmp_path / "wider"))
    check("one architecture: ", "--init=mix", "--mix-with", str(tmp_path / "qwen"))
    check("save both in one dtype", "--init=mix", "--mix-with", str(tmp_path / "half"))
    check("one tokenizer: token '<end>' is None", "--init=mix", "--mix-with", str(tmp_path / "tokens"))
    check("num_experts=3 is no multiple of the 2", "--init=mix", "--num-experts=3", "--mix-with", str(dense))
    check("mix_with is given and init=shared takes one checkpoint", "--mix-with", str(dense))
    check("does not exist", "--init=mix", "--mix-with", str(tmp_path / "nowhere"))


def test_places(tmp_path: Path, dense: Path, refuse) -> None:
    """Where from and where to."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").touch()
    refuse([str(dense), str(tmp_path / "taken")], "exists; name a folder", left=["taken"])
    refuse([str(tmp_path / "no"), str(tmp_path / "out")], "does not exist", left=["taken"])
    refuse([str(tmp_path / "taken"), str(tmp_path / "out")], "no safetensors checkpoint", left=["taken"])
    (tmp_path / "taken" / "file").touch()
    refuse([str(dense), str(tmp_path / "taken" / "file" / "x")], "cannot be made", left=["taken"])
    refuse([str(tmp_path / "taken" / "file"), str(tmp_path / "out")], "is a file", left=["taken"])
    empty = tmp_path / "taken" / "empty.txt"
    empty.write_text(" ")
    for dry in ([], ["--dry-run"]):
        refuse([str(dense), str(tmp_path / "out"), f"--text={empty}", *dry], "is empty", left=["taken"])
    short = tmp_path / "taken" / "short.txt"
    short.write_text("Too little.")
    for dry in ([], ["--dry-run"]):
        refuse([str(dense), str(tmp_path / "out"), f"--text={short}", *dry], "need at least", left=["taken"])
    short.write_bytes(b"\xff\xfe\xfd")
    for dry in ([], ["--dry-run"]):
        refuse([str(dense), str(tmp_path / "out"), f"--text={short}", *dry], "cannot be read as UTF-8", left=["taken"])


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("to", [[], ["--to=token-choice"]])
def test_an_adapter_is_to_be_merged_first(
    tmp_path: Path, dense: Path, refuse, to: list[str], with_config: bool
) -> None:
    """As Trainer leaves it: pickled arguments beside the adapter, which are no weights."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/base"}))
    save_file({"x": torch.ones(1)}, adapter / "adapter_model.safetensors")
    (adapter / "training_args.bin").touch()
    if with_config:
        shutil.copy(dense / "config.json", adapter)
    load = f"PeftModel.from_pretrained(t.AutoModelForCausalLM.from_pretrained('me/base'), '{adapter}')"
    load = f'python -c "import ecmoe, peft, transformers as t; peft.{load}.merge_and_unload().save_pre'
    message = f"is a PEFT adapter of me/base, not a whole model; merge it first, {load}"
    refuse([str(adapter), str(tmp_path / "out"), *to], message, left=["adapter"])


def test_a_mount_point_cannot_be_replaced(tmp_path: Path, dense: Path, refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder gives way to the checkpoint; an empty mounted disk cannot, and that must show before the work."""
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    refuse([str(dense), str(tmp_path / "disk")], "is a mount point", left=["disk"])


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path, dense: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(str(dense), str(tmp_path / "link"), verify=False)
    assert (tmp_path / "real" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_full_disk(tmp_path: Path, dense: Path, refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before anything is written where it can be, and cleaned up after where it could not."""
    command = [str(dense), str(tmp_path / "out"), "--no-verify"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
        refuse(command, " MB and 10 kB are free there; free some, or choose another disk", left=[])
    real, synced = conversion.checkpoints.writer._to_disk, []
    for full_at in ("purpose", "thresholds", "ecmoe_conversion", "README", "config"):

        def sync(file, full_at: str = full_at) -> None:
            synced.append(Path(file.name).name.partition(".")[0])
            if synced[-1] == full_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(file)

        with monkeypatch.context() as patch:
            patch.setattr(conversion.checkpoints.writer, "_to_disk", sync)
            refuse(command, "No space left on device", left=[])
    pieces = []

    def piece(tensor: torch.Tensor) -> memoryview:
        pieces.append(tensor)
        if len(pieces) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return in_bytes(tensor)

    in_bytes = conversion.checkpoints.writer._bytes
    with monkeypatch.context() as patch:  # in the middle of a shard
        patch.setattr(conversion.checkpoints.writer, "_bytes", piece)
        refuse(command, "No space left on device", left=[])
    main(command)


def test_too_little_memory(tmp_path: Path, dense: Path, refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    command = [str(dense), str(tmp_path / "out"), "--device=cpu"]
    refuse(command, "are free; say verify=False (--no-verify), or device=auto", left=[])
    refuse([*command, "--router=centroid"], "say router=normal with --no-verify", left=[])
    main([*command, "--no-verify"])


def test_no_login(tmp_path: Path, dense: Path, refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the Hub cannot be reached, which the HTTP library says with an exception of its own."""
    for error in (LocalTokenNotFoundError("Token is required"), Exception("Connection refused")):

        def whoami(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "whoami", whoami)
        command = [str(dense), str(tmp_path / "out"), "--no-verify", "--push-to-hub=me/model"]
        for dry in ([], ["--dry-run"]):
            refuse([*command, *dry], f"push_to_hub=me/model: {error}; log in with `hf auth login`", left=[])


def test_a_converted_checkpoint_is_not_converted_again(
    tmp_path: Path, dense: Path, text: Path, refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(dense), str(tmp_path / "once"), "--num-experts=2", f"--text={text}"])
    assert "Greedy text: the same." in capsys.readouterr().out
    command = [str(tmp_path / "once"), str(tmp_path / "twice")]
    refuse(command, "is an expert-choice checkpoint already", left=["once"])


def test_every_decoder_of_transformers_is_converted_or_refused_with_a_reason() -> None:
    known = {*modeling_ecmoe.families(), *modeling_ecmoe.composites(), *MIXTURES, *REFUSALS}
    decoders = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not name.startswith("ecmoe_")}
    assert decoders - known == set()
