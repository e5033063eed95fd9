"""Bad input and bad luck end in one line that says what to do, and no earlier checkpoint is lost."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_dense
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, Gemma3Config, T5Config, TrainerState

from ecmoe.conversion import convert
from ecmoe.finetune import RecipeError, load_recipe, run
from ecmoe.finetune.cli import main
from ecmoe.finetune.folder import last_whole_checkpoint

pytestmark = pytest.mark.usefixtures("quick_end")

# Overrides of a recipe, and what the line holds. Names in braces are files of the fixture `files`.
REFUSALS = {
    "learning_rte=1": "learning_rte=1 is no field of a recipe; did you mean learning_rate?",
    "max_lenght=3": "did you mean max_length?",
    "lr=3": "did you mean learning_rate?",
    "batch_size=3": "did you mean per_device_train_batch_size?",
    "model_name_or_path=x": "did you mean model?",
    "dataset={answers.jsonl}": "; set prompt_column=prompt completion_column=answer",
    "treshold_decay=0.5": "did you mean threshold_decay?",
    "num_experts=3": "num_experts=3 is no field of a recipe: the number of experts is fixed at conversion; leave",
    'training={"max_steps":10}': "training={'max_steps': 10} is no field of a recipe; write its fields at the top",
    'args={"max_steps":10}': "args={'max_steps': 10} is no field of a recipe; write its fields at the top level",
    "routing_fields=": "routing_fields=None is no field of a recipe; write its fields at the top level",
    "max_length=many": "max_length='many' must be int",
    "sequence_length=64": "sequence_length=64 is no field of a recipe; did you mean max_length?",
    "text_column=story": "text_column='story' is no field of a recipe; did you mean dataset_text_field?",
    "chat_template=chatml": "chat_template='chatml' is no field of a recipe; did you mean chat_template_path?",
    'model_init_kwargs={"dtype":"float32"}': "names dtype; write dtype=float32 beside it",
    'model_init_kwargs={"attn_implementation":"flash_attention_9"}': "flash_attention_9",
    "max_length=1": "max_length=1 must be at least 2",
    "max_length=4096": "is more than the model's 128 positions; shorten it",
    "validation_fraction=2": "validation_fraction=2 must be",
    "validation_fraction=0.9999999": "leaves nothing to learn from",
    "dtype=float8": "dtype=float8 is unknown",
    "too_long=cut": "too_long=cut is unknown; choose refuse, truncate or drop",
    "model=/no/such/model": "model=/no/such/model does not exist",
    "model={adapter}": 'is a PEFT adapter of me/base, not a whole model; merge it first, python -c "import ecmoe',
    "model={merged_one}": "merged_one/merged",
    "model={no_tokenizer}": "no_tokenizer has no tokenizer; save that of its source there, AutoTokenizer.from_pretr",
    "model={dense}": "",  # the control: nothing is refused
    "learning_rate=fast": "learning_rate='fast' must be float",
    "learning_rate=-1e-3": "learning_rate=-0.001 must be at least 0",
    "router_learning_rate=-1": "router_learning_rate=-1 must not be negative; 0 freezes",
    "experts_learning_rate=-1e-5": "experts_learning_rate=-1e-05 must not be negative",
    "per_device_train_batch_size=0": "per_device_train_batch_size=0 must be at least 1",
    "gradient_accumulation_steps=0": "gradient_accumulation_steps=0 must be at least 1",
    "dataloader_drop_last=true per_device_train_batch_size=9999": "all sequences to train on, less than a batch of ",
    "dataloader_drop_last=true": "dataloader_drop_last=true drops all sequences to eval on, less than a batch of ",
    "max_steps=abc": "max_steps='abc' must be int",
    "max_steps": "must be written as field=value",
    "max_steps=[": "the value is not valid YAML; quote it",
    "lr_scheduler_type=wavy": "SFTConfig refuses",
    "quantization=4": "quantization=4 must be str",
    "lora=true": "lora=True must be dict",
    "router_learning_rate=fast": "router_learning_rate='fast' must be float or int",
    "too_long=3": "too_long=3 must be str",
    "dataset=3": "dataset=3 must be list or str",
    "output_dir=": "output_dir is missing",
    "output_dir=/etc/passwd": "output_dir=/etc/passwd is a file",
    "resume_from_checkpoint=true": "finds no checkpoint",
    "streaming=true max_steps=": "streaming=true needs max_steps",
    "model={dense} router_learning_rate=1e-3": "router_learning_rate=0.001: llama has no router; leave it out",
    "model={dense} experts_learning_rate=0": "experts_learning_rate=0: llama has no routed experts",
    "model={dense} routing=threshold": "routing=threshold is for expert-choice models, and model=",
    "routing=sideways": "Field 'routing' expected one of ('expert_choice', 'threshold', 'token_choice'), got sideways",
    "capacity_factor=99": "capacity_factor=99 must be above 0 and at most num_experts=4",
    "routing=token_choice": "routing=token_choice does not go with inference_routing=threshold",
    "distributed={fsdp_sice: 2}": "fsdp_sice=2 is no field of distributed (DistributedConfig); did you mean fsdp_size?",
    "distributed={fsdp_size: 2}": "is for 2 processes and 1 run; start it with accelerate launch --num_processes 2",
    "distributed={fsdp_size: 2, ep_size: 3}": "`ep_size` must divide",
    'packing=false distributed={"fsdp_size":2,"ep_size":2,"ep_implementation":"equal_splits"}': (
        "packing=False makes batches of other lengths on each rank, which ep_implementation=equal_splits cannot divide"
    ),
    "distributed={fsdp_size: zwei}": "distributed={'fsdp_size': 'zwei'} is refused",
    "chat_template_path=none.jinja": "chat_template_path=none.jinja cannot be read",
    "bf16_full_eval=true": "bf16_full_eval=True casts the weights that are trained and saved; leave it out",
    "eval_packing=false": "eval_packing=False differs from packing=True: held-out rows are read as the others are",
    "packing_strategy=bfd_split pad_to_multiple_of=64": "=64 fills batches that are one row with padding",
    "packing=false padding_free=true max_length= pad_to_multiple_of=64 dataset={short.jsonl}": "pad_to_multiple_of=64",
    "use_liger_kernel=true": "the recipe asks for a package that is not installed",
    # Datasets.
    "dataset=@x": "is not valid YAML",
    "dataset=/no/such.txt": "dataset=/no/such.txt does not exist",
    "dataset=missing.txt": "dataset=missing.txt does not exist",
    "dataset=missing.jsonl": "dataset=missing.jsonl does not exist",
    "dataset={empty.txt}": "empty.txt is empty",
    "dataset={empty.jsonl}": "empty.jsonl is empty",
    "dataset={empty.jsonl} streaming=true": "empty.jsonl is empty",
    "dataset={blank.jsonl}": "blank.jsonl holds 0 rows",
    "dataset={broken.jsonl}": "broken.jsonl cannot be read",
    "dataset={short.jsonl}": "gives no",
    "dataset={short.jsonl} streaming=true": "gives no",
    "dataset={folder}": "must be a .txt, .jsonl or .parquet file or a Hub dataset id",
    "dataset={text.jsonl} dataset_text_field=story": "dataset_text_field=story is not in dataset=",
    "dataset={text.jsonl} packing=false": "more than max_length=64; raise it, or say too_long=truncate or",
    "dataset={text.jsonl} packing=false too_long=drop": "gives no held-out sequence",
    "dataset=[{dataset: a.txt, wait: 2}]": "wait=2 is no field of a dataset; did you mean weight?",
    "dataset=[{weight: 2}]": "must be a path or Hub id, or a mapping with `dataset`",
    "dataset=[]": "dataset=[] holds nothing",
    "dataset=[{dataset: text.jsonl, weight: 0}]": "weight=0 of dataset=text.jsonl must be a number above 0",
    "dataset=[{dataset: text.jsonl, weight: much}]": "weight=much of dataset=text.jsonl must be a number above 0",
    "dataset=[{dataset: {text.jsonl}}, {dataset: {chat.jsonl}}]": "dataset mixes rows of messages and text",
    "dataset={text.jsonl} validation_dataset={chat.jsonl}": "holds messages and dataset text rows",
    "dataset=[{dataset: {named.jsonl}}, {dataset: {chat.jsonl}}]": "dataset mixes rows whose columns hold different",
    # Conversations and instructions.
    "dataset={chat.jsonl} model={bare}": "the tokenizer has no chat template and the dataset holds conversations",
    "dataset={sharegpt.jsonl}": "to learn from among the roles human, gpt:",
    "dataset={users.jsonl}": "has no token of the assistant to learn from",
    "dataset={odd.jsonl}": "a message of a conversation has the keys speaker, words; it needs role (system, user or",
    "dataset={odd.jsonl} chat_template_path={raises.jinja}": "has the keys speaker, words; it needs role",
    "dataset={chat.jsonl} chat_template_path={last.jinja}": "does not render a conversation turn by turn",
    "dataset={chat.jsonl} chat_template_path={raises.jinja}": "the chat template refuses",
    "dataset={chat.jsonl} chat_template_path={broken.jinja}": "the chat template refuses",
    "dataset={numbers.jsonl}": "completion_column=completion holds Value",
    "model={small}": "the tokenizer makes token 2",
    "model={gemma3}": "gemma3, which reads images too, and recipes train on text alone; convert it with --text-only",
    "model={t5}": "is of model_type t5, which has no AutoModelForCausalLM; give a decoder",
    "model={bert}": "is of model_type bert, an encoder, whose tokens see the ones they would predict; give a decoder",
    "model={quantised}": "is quantised, and such weights cannot be trained themselves; lora={} trains adapters on them",
    "model={opt} packing=true": "packing=True puts several documents in one row, and ecmoe_opt models, the dense ones",
    "model={opt} packing=false padding_free=true": "padding_free=True puts several documents in one row",
}


@pytest.fixture(scope="module")
def files(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bad datasets and templates, and checkpoints: dense, without a chat template, and with too small a vocabulary."""
    folder = tmp_path_factory.mktemp("bad")
    talk = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well, thank you."}]
    rows = {
        "blank": [{"text": "  "}, {"text": ""}, {"text": None}, {"text": " "}],
        "short": [{"text": "a"}] * 9,
        "text": [{"text": "Once upon a time there was a word. " * 9}] * 9,
        "chat": [{"messages": talk}] * 9,
        "users": [{"messages": talk[:1]}] * 9,
        "sharegpt": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}] * 9,
        "answers": [{"prompt": "1 + 1?", "answer": "2"}] * 9,
        "named": [{"messages": [{**message, "name": "x"} for message in talk]}] * 9,
        "odd": [{"messages": [{"speaker": "human", "words": "How are you?"}]}] * 9,
        "numbers": [{"prompt": "1 + 1 = ", "completion": 2}] * 9,
        "empty": [],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "empty.txt").write_text(" \n<|endoftext|>\n")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "last.jinja").write_text("{{ messages[-1]['role'] }}{{ messages[-1]['content'] }}")
    (folder / "raises.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    (folder / "broken.jinja").write_text("{% for %}")
    (folder / "folder").mkdir()
    for name in ("adapter", "merged_one"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')
    (folder / "merged_one" / "merged").mkdir()
    (folder / "merged_one" / "merged" / "config.json").write_text("{}")
    tokenizer = AutoTokenizer.from_pretrained(place / "dense")
    write_dense(folder / "small", "Llama", vocab_size=200)
    write_dense(folder / "opt_dense", "OPT")
    convert(str(folder / "opt_dense"), str(folder / "opt"), num_experts=4, verify=False)
    for name in ("bare", "no_tokenizer", "quantised"):
        AutoModelForCausalLM.from_pretrained(place / "dense").save_pretrained(folder / name)
    fields = json.loads((folder / "quantised" / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "quantised" / "config.json").write_text(json.dumps(fields))
    Gemma3Config().save_pretrained(folder / "gemma3")
    BertConfig().save_pretrained(folder / "bert")
    T5Config().save_pretrained(folder / "t5")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "bare")
    return {path.name: path for path in folder.iterdir()} | {"dense": place / "dense"}


@pytest.mark.parametrize("overrides", REFUSALS)
def test_refusals(
    place: Path, files: dict[str, Path], tmp_path: Path, overrides: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = [f"model={place / 'ecmoe'}", f"output_dir={tmp_path / 'out'}", "max_steps=1", "max_eval_sequences=1"]
    given = [overrides] if "[" in overrides or overrides.startswith("distributed") else overrides.split()
    for name, path in files.items():
        given = [field.replace("{" + name + "}", str(path)) for field in given]
    command = [str(place / "recipe.yaml"), *fixed, *given]
    if not REFUSALS[overrides]:
        main(command)
        return
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and lines[0].startswith("ecmoe-finetune: error:"), lines
    assert REFUSALS[overrides] in lines[0]
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml does not exist; give a YAML file, or .* shipped: chat, "):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match="field: value"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_a_loss_that_is_no_number(recipe_of: Callable, precision: dict[str, Any]) -> None:
    """The run ends where it is seen, before a checkpoint of it is written."""
    recipe = recipe_of(
        max_steps=8,
        learning_rate=1e30,
        warmup_steps=2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        **precision,
    )
    with pytest.raises(RecipeError, match=r"at step [234]: training has diverged; lower learning_rate") as stop:
        run(recipe)
    checkpoint = last_whole_checkpoint(Path(recipe.output_dir))
    assert checkpoint is not None and str(stop.value).endswith(f"the last checkpoint is {checkpoint}")
    weights = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_gradient_that_is_no_number(recipe_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of that step is still a number; the weights after it are not, and are not saved."""
    recipe = recipe_of(max_steps=4, save_strategy="steps", save_steps=1)
    monkeypatch.setattr(
        "ecmoe.finetune.trainer.EcMoeTrainer._get_grad_norm",
        lambda self, *_, **__: float("nan") if self.state.global_step == 2 else 1.0,
    )
    with pytest.raises(RecipeError, match=r"grad_norm=nan at step 3: training has diverged"):
        run(recipe)
    assert last_whole_checkpoint(Path(recipe.output_dir)) == Path(recipe.output_dir) / "checkpoint-2"


def test_a_loss_that_is_no_number_from_the_beginning(place: Path, recipe_of: Callable, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "ecmoe")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(place / "ecmoe").save_pretrained(tmp_path / "broken")
    with pytest.raises(RecipeError, match=r"eval_loss=nan before any training; check model="):
        run(recipe_of(model=tmp_path / "broken"))


# What a full disk really says: Transformers' weights, torch's optimiser, Trainer's state.
FULL = {
    "transformers.modeling_utils.safe_save_file": SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
    "torch.save": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "save_to_json": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("function", FULL)
def test_a_full_disk(recipe_of: Callable, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """At the second checkpoint: the first stays whole, the half one is gone, and with space the run goes on."""
    recipe = recipe_of(max_steps=4, save_strategy="steps", save_steps=2)
    out = Path(recipe.output_dir)
    target = (TrainerState, "save_to_json") if function == "save_to_json" else (function,)

    def fail(*args: Any, **kwargs: Any) -> None:
        path = Path(str(next(arg for arg in args if isinstance(arg, (str, Path)))))
        if "checkpoint-4" in str(path):
            path.write_text("half")
            raise FULL[function]
        original(*args, **kwargs)

    original = {"torch.save": torch.save, "save_to_json": TrainerState.save_to_json}.get(function, save_file)
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(RecipeError, match="free some space; the same command goes on from") as stop:
            run(recipe)
    assert str(stop.value).startswith(f"output_dir={out} cannot be written:") and "\n" not in str(stop.value)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert last_whole_checkpoint(out) == out / "checkpoint-2"
    assert run(recipe)["steps"] == 4


OTHER_LUCK = {
    "memory": (torch.OutOfMemoryError("CUDA out of memory."), "per_device_train_batch_size=8 does not fit into memory"),
    "network": (ConnectionError("Could not reach the server"), "cannot be read any more: Could not reach the server"),
    "a bug": (RuntimeError("shapes do not match"), None),
}


@pytest.mark.parametrize("luck", OTHER_LUCK)
def test_other_bad_luck(recipe_of: Callable, monkeypatch: pytest.MonkeyPatch, luck: str) -> None:
    """While training; an error that nobody foresaw keeps its traceback."""
    error, line = OTHER_LUCK[luck]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("ecmoe.finetune.trainer.EcMoeTrainer.training_step", fail)
    with pytest.raises(type(error) if line is None else RecipeError, match=line):
        run(recipe_of(max_steps=2))


def test_an_old_transformers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.16.1")
    with pytest.raises(RecipeError, match=r"transformers=5.16.1 is too old .* pip install 'transformers>=5.23'"):
        load_recipe(place / "recipe.yaml")


def test_ranks_that_do_not_see_each_other(recipe_of: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torchrun on a machine without a GPU: Accelerate says one process to each, and both would write one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = recipe_of(max_steps=2, use_cpu=False, output_dir=tmp_path / "out")
    with pytest.raises(RecipeError, match=r"2 processes were started .* output_dir=\S+/out; set use_cpu=true to train"):
        run(recipe)
    assert not (tmp_path / "out").exists()


def test_one_process_that_sees_two_gpus(recipe_of: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    recipe = recipe_of(max_steps=2, output_dir=tmp_path / "out")
    with pytest.raises(RecipeError, match=r"one process sees 2 GPUs; start one for each .*per_node 2 .*DEVICES=0"):
        run(recipe)
    assert not (tmp_path / "out").exists()
