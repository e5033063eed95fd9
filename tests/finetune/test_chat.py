"""Conversations and instructions: which tokens are learned, what does not fit, and a chat model from end to end."""

import json
import unicodedata
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DATA, tiny_tokenizer
from datasets import Dataset
from runs import ROOT, learned, prepared
from tokenizers import normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from ecmoe.finetune import RecipeError, run
from ecmoe.finetune.data import Collator
from ecmoe.finetune.encode import Encoder, stop_token
from ecmoe.finetune.losses import IGNORE
from ecmoe.finetune.train import make_trainer

CHATML = ROOT / "recipes" / "chatml.jinja"
DOLLY = DATA / "dolly-151" / "dolly.jsonl"
# No marks, and turns that the text alone tells apart.
UNMARKED = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# As Qwen3's, an earlier answer is rendered in another way once a later one follows.
REWRITES = (
    "{% for m in messages %}[{{ m['role'] }}] {% if m['role'] == 'assistant' and not loop.last %}(earlier)"
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALKS = {
    "one turn": [said("user", "How are you?"), said("assistant", "Well, thank you.")],
    "multi-turn after a system message": [
        said("system", "Be brief."),
        said("user", "Hello  there!\nHow are you?"),
        said("assistant", " Well, thank you. \n\n And you?"),
        said("user", "1 + 1?"),
        said("assistant", "héllo ✓ 2\n"),
    ],
    "the user has the last word": [said("user", "Hi"), said("assistant", "Hello."), said("user", "Bye")],
    "two answers in a row": [said("user", "Hi"), said("assistant", "One."), said("assistant", "Two.")],
    "the user says the same": [said("user", "Yes."), said("assistant", "Yes."), said("user", "Yes.")],
}


def encoder(template: str | None, kind: str = "messages", tokenizer: Any = None, **fields: Any) -> Encoder:
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, kind, len(tokenizer), **fields)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("template", [CHATML.read_text(encoding="utf-8"), UNMARKED], ids=["marked", "unmarked"])
def test_only_the_assistant_is_learned(template: str, talk: str) -> None:
    """To the letter, with the end of its turn, which it has to say as well."""
    encode = encoder(template)
    ids, labels = encode({"messages": TALKS[talk]}).values()
    end = "\n" if template == UNMARKED else "<eos>\n"
    answers = [message["content"] + end for message in TALKS[talk] if message["role"] == "assistant"]
    assert learned(encode.tokenizer, labels) == answers
    assert encode.tokenizer.decode(ids) == encode.tokenizer.apply_chat_template(TALKS[talk], tokenize=False)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))


def test_a_tokenizer_without_byte_level(stories: Path) -> None:
    """SentencePiece, as in the Llama family: the words' leading spaces shift no mark."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    encode = encoder(CHATML.read_text(encoding="utf-8"), tokenizer=tokenizer)
    talk = TALKS["multi-turn after a system message"]
    ids, labels = encode({"messages": talk}).values()
    assert [text.lstrip().replace("</s> ", "</s>") for text in learned(encode.tokenizer, labels)] == [
        message["content"].lstrip() + "</s>\n" for message in talk if message["role"] == "assistant"
    ]
    assert len(ids) == len(labels)


def test_a_template_that_rewrites_turns() -> None:
    """Refused only where it does rewrite one: with one answer there is nothing to tell apart."""
    encode = encoder(REWRITES)
    assert learned(encode.tokenizer, encode({"messages": TALKS["one turn"]})["labels"]) == ["Well, thank you."]
    with pytest.raises(RecipeError, match=r"does not render a conversation turn by turn.*mark them in it with"):
        encode({"messages": TALKS["multi-turn after a system message"]})
    marked = REWRITES.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")
    encode = encoder(marked)
    labels = encode({"messages": TALKS["multi-turn after a system message"]})["labels"]
    assert learned(encode.tokenizer, labels)[-1] == "héllo ✓ 2\n"


def test_conversations_without_a_template() -> None:
    with pytest.raises(RecipeError, match="has no chat template and the dataset holds conversations; name a Jinja"):
        encoder(None)


@pytest.mark.parametrize("template", [CHATML.read_text(encoding="utf-8"), UNMARKED], ids=["marked", "unmarked"])
def test_nothing_to_learn(template: str) -> None:
    """A conversation without the assistant is refused, unless all of it is learned."""
    with pytest.raises(RecipeError, match=r"has no token of the assistant to learn from.*How are you"):
        encoder(template)({"messages": TALKS["one turn"][:1]})
    ids, labels = encoder(template, learned="all")({"messages": TALKS["one turn"][:1]}).values()
    assert ids == labels


def test_prompt_and_completion() -> None:
    """Through the template where there is one; joined as they are elsewhere, with the end of the sequence learned."""
    batch = {"prompt": "Q: 1 + 1? A:", "completion": " 2."}
    encode = encoder(CHATML.read_text(encoding="utf-8"), kind="prompt")
    ids, labels = encode(batch).values()
    assert learned(encode.tokenizer, labels) == [" 2.<eos>\n"]
    assert encode.tokenizer.decode(ids).startswith("<|im_start|>user\nQ: 1 + 1? A:<eos>\n<|im_start|>assistant\n")
    for append_eos, end in ((True, "<eos>"), (False, "")):
        encode = encoder(None, kind="prompt", append_eos=append_eos)
        ids, labels = encode(batch).values()
        assert learned(encode.tokenizer, labels) == [" 2." + end]
        assert encode.tokenizer.decode(ids) == "Q: 1 + 1? A: 2." + end


@pytest.mark.parametrize("streaming", [False, True])
def test_too_long(recipe_of: Callable, place: Path, tmp_path: Path, streaming: bool) -> None:
    """Exactly max_length fits; one token more is refused with both numbers, cut, or left out."""
    encode = encoder(UNMARKED)
    talks = [TALKS["one turn"]] * 8 + [[*TALKS["one turn"], said("assistant", "No.")]] * 8
    short, long = (len(encode({"messages": talk})["input_ids"]) for talk in (talks[0], talks[-1]))
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"messages": talk, "n": n}) for n, talk in enumerate(talks))
    )
    (tmp_path / "t.jinja").write_text(UNMARKED)
    rows, template = tmp_path / "rows.jsonl", str(tmp_path / "t.jinja")
    fields = {"dataset": rows, "validation_dataset": rows, "chat_template_path": template, "packing": False}

    def sizes(**more: Any) -> set[int]:
        trainer = make_trainer(recipe_of(**fields, streaming=streaming, **more))
        parts = [islice(trainer.train_dataset, 100), trainer.eval_dataset]
        return {len(row["input_ids"]) for part in parts for row in part}

    assert sizes(max_length=long) == {short, long}
    with pytest.raises(RecipeError, match=f"a row has {long} tokens, more than max_length={long - 1};"):
        sizes(max_length=long - 1)
    assert sizes(max_length=long - 1, too_long="truncate") == {short, long - 1}
    assert sizes(max_length=long - 1, too_long="drop") == {short}


def test_padding() -> None:
    """On the right, to the longest row of the batch; padding is neither learned nor attended to."""
    batch = Collator(7)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 7, 7]],
        "labels": [[-100, 2, 3], [4, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


@pytest.mark.parametrize("name", ["dense", "ecmoe"])
@torch.no_grad()
def test_a_padded_batch_gives_each_conversation_its_own_loss(place: Path, name: str) -> None:
    """In eval mode, where expert choice routes by threshold and rows cannot see each other."""
    model = AutoModelForCausalLM.from_pretrained(place / name).eval()
    encode = encoder(UNMARKED)
    rows = [encode({"messages": talk}) for talk in TALKS.values()]
    assert len({len(row["input_ids"]) for row in rows}) == len(rows) == len(TALKS)
    batch = Collator(0)(rows)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    for row, found, labels in zip(rows, logits, batch["labels"], strict=True):
        together = torch.nn.functional.cross_entropy(found[:-1], labels[1:])
        alone = model(
            input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]), use_cache=False
        ).loss
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("quick_end")
def test_a_chat_column_of_another_name(place: Path, recipe_of: Callable, tmp_path: Path) -> None:
    """messages_column names it, and chat_template replaces the tokenizer's own, in the result as well."""
    lines = [json.dumps({"talk": TALKS["one turn"], "id": number}) for number in range(20)]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    (tmp_path / "own.jinja").write_text(UNMARKED)
    recipe = recipe_of(
        dataset=tmp_path / "talk.jsonl",
        messages_column="talk",
        chat_template_path=str(tmp_path / "own.jinja"),
        packing=False,
        max_steps=6,
        learning_rate=1e-2,
    )
    results = run(recipe)
    assert results["loss_after"] < results["loss_before"] - 1  # the same row every time
    tokenizer = AutoTokenizer.from_pretrained(recipe.output_dir)
    assert tokenizer.chat_template == UNMARKED != AutoTokenizer.from_pretrained(place / "ecmoe").chat_template
    train, _ = prepared(recipe, tokenizer, 300)
    size = len(train[0]["input_ids"])
    assert results["tokens"] == 6 * 8 * size


@pytest.mark.usefixtures("quick_end")
def test_the_example(stories: Path, recipe_of: Callable, tmp_path: Path) -> None:
    """stories260K learns to answer Dolly's questions in ChatML, and a pipeline talks to the result."""
    if not DOLLY.is_file():
        pytest.skip("Dolly is not beside the repository (ECMOE_TEST_DATA)")
    short = [line for line in DOLLY.read_text(encoding="utf-8").splitlines() if len(line) < 700]
    (tmp_path / "dolly.jsonl").write_text("\n".join(short), encoding="utf-8")
    recipe = recipe_of(
        model=stories,
        dataset=tmp_path / "dolly.jsonl",
        completion_column="answer",
        chat_template_path=str(CHATML),
        max_length=320,
        too_long="truncate",
        packing=False,
        per_device_train_batch_size=4,
        max_steps=20,
        learning_rate=2e-3,
    )
    results = run(recipe)
    assert results["loss_after"] < results["loss_before"] - 1
    answering = pipeline("text-generation", model=recipe.output_dir)
    question = [said("user", "Name a colour.")]
    (answer,) = answering(question, max_new_tokens=12, do_sample=False)
    *before, last = answer["generated_text"]
    assert before == question and last["role"] == "assistant" and last["content"]
    # The same tokens as from the text that the template makes of the question.
    prompt = answering.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nName a colour.</s>\n<|im_start|>assistant\n"
    ids = answering.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(recipe.output_dir).eval()
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert last["content"] == answering.tokenizer.decode(expected, skip_special_tokens=True)


NFC = "e\u0301"  # which a normaliser makes one character of


@pytest.mark.parametrize("answer", ["caf" + NFC, NFC + "t\u00e9", "A " + NFC * 3, "\u2126 ohm", "plain"])
def test_only_the_assistant_is_learned_whatever_a_normaliser_does(answer: str) -> None:
    """Case 3: an answer that ends in characters which become one, and a turn of the user after it."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    marked = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    )
    marked += "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    encode = encoder(marked, tokenizer=tokenizer)
    talk = [said("user", "Which?"), said("assistant", answer), said("user", "And then?")]
    ids, labels = encode({"messages": talk}).values()
    assert learned(encode.tokenizer, labels) == [unicodedata.normalize("NFC", answer)]
    assert ids == tokenizer("Which?" + answer + "And then?")["input_ids"]


def test_what_ends_an_answer_ends_generation(stories: Path, recipe_of: Callable, tmp_path: Path, capsys: Any) -> None:
    """Case 4: in the shipped template the tokenizer's own end; a marker that is no token is said before training."""
    talk = [said("user", "Which animal?"), said("assistant", "A cat.")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for _ in range(40)))
    fields = {"dataset": tmp_path / "rows.jsonl", "model": stories, "learning_rate": 3e-3, "packing": False}
    fields["max_length"] = 128
    recipe = recipe_of(**fields, chat_template_path="chatml", max_steps=60)
    run(recipe)
    answering = pipeline("text-generation", model=recipe.output_dir)
    (answer,) = answering(talk[:1], max_new_tokens=40, do_sample=False)
    assert answer["generated_text"][-1]["content"] == "A cat."
    assert "which is no token of its own" not in capsys.readouterr().out
    old = CHATML.read_text(encoding="utf-8").replace("eos_token if eos_token is defined and eos_token else ", "")
    (tmp_path / "old.jinja").write_text(old)
    run(recipe_of(**fields, chat_template_path=str(tmp_path / "old.jinja"), max_steps=1, output_dir=tmp_path / "other"))
    assert (
        "the chat template ends an answer with '<|im_end|>\\n', which is no token of its own" in capsys.readouterr().out
    )


def test_a_special_token_that_ends_answers_joins_the_generation_config(
    place: Path, recipe_of: Callable, tmp_path: Path, quick_end: None
) -> None:
    """As <|eot_id|> of Llama 3, which is not the end of a text."""
    tokenizer = AutoTokenizer.from_pretrained(place / "ecmoe")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<pad>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (tmp_path / "t.jinja").write_text(template)
    talk = [said("user", "Which animal?"), said("assistant", "A cat.")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for _ in range(40)))
    recipe = recipe_of(dataset=tmp_path / "rows.jsonl", chat_template_path=str(tmp_path / "t.jinja"), max_steps=1)
    run(recipe)
    stops = AutoModelForCausalLM.from_pretrained(recipe.output_dir).generation_config.eos_token_id
    assert stops == [tokenizer.eos_token_id, tokenizer.pad_token_id]


def test_prompt_and_completion_are_the_tokens_of_their_text(stories: Path) -> None:
    """Cases 7 and 8: no second space, and one end of the sequence where the tokenizer adds one by itself."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    encode = encoder(None, kind="prompt", tokenizer=tokenizer)
    ids, labels = encode({"prompt": "A:", "completion": " Lily"}).values()
    assert ids == [*tokenizer("A: Lily")["input_ids"], tokenizer.eos_token_id]
    assert [text.strip() for text in learned(encode.tokenizer, labels)] == ["Lily</s>"]
    ending = tiny_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", ending.eos_token_id)]
    )
    encode = encoder(None, kind="prompt", tokenizer=ending)
    ids, labels = encode({"prompt": "A:", "completion": " Lily"}).values()
    assert ending.decode(ids) == "A: Lily<eos>" and learned(encode.tokenizer, labels) == [" Lily<eos>"]
    text = encoder(None, kind="text", tokenizer=ending)
    assert ending.decode(text({"text": "One."})["input_ids"]) == "One.<eos>"


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}[{{ m['role'] }}] "
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def calls(**arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_tools_and_their_calls_are_learned_as_written(
    suffix: str, place: Path, recipe_of: Callable, tmp_path: Path
) -> None:
    """Cases 10 and 11: a table gives every row the keys of all rows, and a `tools` column is handed to the template."""
    rows = [
        {"messages": [said("user", "Paris?"), calls(city="Paris")], "tools": TOOLS},
        {"messages": [said("user", "One?"), calls(a=1)], "tools": None},
    ] * 4
    if suffix == "parquet":
        Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    else:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.jinja").write_text(WITH_TOOLS)
    recipe = recipe_of(dataset=tmp_path / f"rows.{suffix}", max_length=256, validation_fraction=0.5, packing=False)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WITH_TOOLS
    texts = {tokenizer.decode(row["input_ids"]) for part in prepared(recipe, tokenizer, 300) for row in part}
    apply = tokenizer.apply_chat_template
    assert texts == {apply(row["messages"], tools=row["tools"], tokenize=False) for row in rows[:2]}
    assert any('"arguments": {"a": 1}}' in text for text in texts) and any("weather" in text for text in texts)


def test_tools_may_be_json(stories: Path) -> None:
    encode = encoder(WITH_TOOLS)
    talk = [said("user", "Paris?"), calls(city="Paris")]
    as_text, as_rows = (encode({"messages": talk, "tools": tools}) for tools in (json.dumps(TOOLS), TOOLS))
    assert as_text == as_rows and "weather" in encode.tokenizer.decode(as_text["input_ids"])


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ("<|im_start|>{{ m['role'] }} {{ m['content'] }}<|eou|>", "<|eou|>"),
        ("<|im_start|>{% for p in m['content'] %}{{ p['text'] }}{% endfor %}<|eou|>", "<|eou|>"),
        ("<|im_start|>{{ m['content'] | lower }}<|eou|>", None),
        ("<s>{{ m['content'] }}\n\n</s>", "</s>"),
        ("<s>{{ m['content'] }}<s>", None),
    ],
)
def test_what_ends_an_answer_is_no_opener_and_no_blank(turn: str, expected: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens(["<|im_start|>", "<|eou|>", "\n\n"])
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    found, _ = stop_token(tokenizer)
    assert found == (None if expected is None else tokenizer.convert_tokens_to_ids(expected))


def test_tools_that_are_no_json_are_named() -> None:
    row = {"messages": [said("user", "Hi"), said("assistant", "Hello.")], "tools": "search, calc"}
    with pytest.raises(RecipeError, match="tools are 'search, calc', which is not JSON"):
        encoder(CHATML.read_text())(row)


def test_an_added_pad_token_without_an_embedding(stories: Path, recipe_of: Callable, tmp_path: Path) -> None:
    model = tmp_path / "padded"
    AutoModelForCausalLM.from_pretrained(stories).save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    rows = [{"text": "Once upon a time. " * (1 + number % 3)} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = run(recipe_of(model=model, dataset=tmp_path / "rows.jsonl", packing=False, max_steps=1))
    assert 0 < found["loss_after"] < 10
