"""What TRL's own preparation makes of rows that ours reads otherwise: the reason why rows to labels stay here.

A test that fails says that TRL has changed, and that our part may go.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from checkpoints import STORIES_MODEL, tiny_tokenizer, write_dense
from datasets import Dataset, load_dataset
from runs import learned
from tokenizers import normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

SFTConfig = pytest.importorskip("trl").SFTConfig
MARKED = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def talk(answer: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And then?"},
    ]


def prepared(folder: Path, model: Path, tokenizer: Any, rows: Any, **options: Any) -> tuple[str, list[str]]:
    """The text of TRL's first row, and what is learned of it."""
    from trl import SFTTrainer

    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    arguments = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, activation_checkpointing=False, **options)
    language_model = AutoModelForCausalLM.from_pretrained(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(language_model, arguments, train_dataset=rows, processing_class=tokenizer)
    row = trainer.train_dataset[0]
    return tokenizer.decode(row["input_ids"]), learned(tokenizer, row["labels"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl") / "dense"
    write_dense(folder, "Llama")
    return folder


@pytest.fixture
def marked() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKED
    return tokenizer


def test_a_normaliser_makes_it_learn_the_user_s_turn(marked: Any, model: Path, tmp_path: Path) -> None:
    """Case 3."""
    marked.backend_tokenizer.normalizer = normalizers.NFC()
    row = {"messages": talk("caf" + "e\u0301")}
    _, found = prepared(tmp_path, model, marked, [row], assistant_only_loss=True)
    assert found == ["café" + "And then?"]


def test_prompt_and_completion_are_tokens_of_their_text(model: Path, tmp_path: Path) -> None:
    """Case 7 is right there."""
    if not STORIES_MODEL.is_dir():
        pytest.skip("stories260K is not beside the repository (ECMOE_TEST_DATA)")
    tokenizer = AutoTokenizer.from_pretrained(STORIES_MODEL)
    tokenizer.chat_template = None
    text, found = prepared(tmp_path, model, tokenizer, [{"prompt": "A:", "completion": " Lily"}])
    assert text.count("  ") == 0 and [part.strip() for part in found] == ["Lily</s>"]


def test_an_end_that_the_tokenizer_adds_comes_twice(model: Path, tmp_path: Path) -> None:
    """Case 8."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    for row in ({"text": "One."}, {"prompt": "A:", "completion": " Lily"}):
        text, _ = prepared(tmp_path, model, tokenizer, [row])
        assert text.endswith("<eos><eos>")


def test_calls_get_the_keys_of_other_rows(marked: Any, model: Path, tmp_path: Path) -> None:
    """Case 10: of a parquet file, whose structs have one set of keys."""
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"a": 1}, {"city": "Paris"})]
    messages = [[talk("")[0], {"role": "assistant", "content": "", "tool_calls": [call]}] for call in calls]
    Dataset.from_list([{"messages": each} for each in messages]).to_parquet(tmp_path / "rows.parquet")
    rows = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path))
    _, found = prepared(tmp_path, model, marked, rows, assistant_only_loss=True)
    assert '"city": null' in found[0]


def test_tools_are_handed_to_the_template(marked: Any, model: Path, tmp_path: Path) -> None:
    """Case 11 is right there."""
    tools = json.dumps([{"type": "function", "function": {"name": "weather"}}])
    text, _ = prepared(tmp_path, model, marked, [{"messages": talk("Yes."), "tools": tools}])
    assert "weather" in text


def test_a_template_without_marks_is_refused_or_learned_whole(model: Path, tmp_path: Path) -> None:
    """Templates that TRL does not know: what the assistant says can be told apart in most of them."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ValueError, match="not training-compatible"):
        prepared(tmp_path, model, tokenizer, [{"messages": talk("Yes.")}], assistant_only_loss=True)
    text, found = prepared(tmp_path, model, tokenizer, [{"messages": talk("Yes.")}])
    assert found == [text]


def test_what_a_template_leaves_out_is_not_said(model: Path, tmp_path: Path) -> None:
    """A call that Llama 3's template does not write: the model learns to answer nothing."""
    from trl.chat_template_utils import llama3_chat_template

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = llama3_chat_template
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    _, found = prepared(tmp_path, model, tokenizer, [{"messages": [talk("")[0], call]}], assistant_only_loss=True)
    assert found == ["<|eot_id|>"]


def test_parts_are_written_as_python_prints_them(marked: Any, model: Path, tmp_path: Path) -> None:
    """By a template that takes text alone."""
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in talk("Yes.")]
    _, found = prepared(tmp_path, model, marked, [{"messages": parts}], assistant_only_loss=True)
    assert found == ["[{'text': 'Yes.', 'type': 'text'}]"] or found == ["[{'type': 'text', 'text': 'Yes.'}]"]


def test_an_evaluation_is_a_mean_of_means(tmp_path: Path) -> None:
    """Case 2: another loss for another batch size, of the same rows and weights. -s shows both."""
    if not STORIES_MODEL.is_dir():
        pytest.skip("stories260K is not beside the repository (ECMOE_TEST_DATA)")
    from trl import SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(STORIES_MODEL)
    tokenizer.chat_template = None
    rows = Dataset.from_list([{"prompt": "Say cat.", "completion": " cat" * n} for n in (1, 40)])
    found = []
    for size in (1, 2):
        options: dict[str, Any] = {"per_device_eval_batch_size": size, "report_to": "none", "use_cpu": True}
        arguments = SFTConfig(output_dir=str(tmp_path), bf16=False, activation_checkpointing=False, **options)
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(STORIES_MODEL),
            arguments,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
        )
        found.append(trainer.evaluate()["eval_loss"])
    print(found)
    assert abs(found[0] - found[1]) > 1
