"""Chat templates of the large families, as they come: what is learned, and what a template cannot write is refused."""

from typing import Any

import pytest
import trl.chat_template_utils as of_trl
from checkpoints import tiny_tokenizer
from runs import ROOT, learned
from transformers import AutoTokenizer, PythonBackend

from ecmoe.finetune import RecipeError
from ecmoe.finetune.encode import Encoder

CHATML = (ROOT / "recipes" / "chatml.jinja").read_text(encoding="utf-8")
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TALK = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Well, thank you."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Even better."},
]
CALLING = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "sunny"},
    {"role": "assistant", "content": "Sun."},
]
# What begins an answer of a template, and what ends it; and whether it writes tools.
TEMPLATES: dict[str, tuple[str, str, bool]] = {
    "qwen3": ("<think>\n\n</think>\n\n", "<|im_end|>\n", True),
    "qwen3_instruct_2507": ("", "<|im_end|>\n", True),
    "qwen2_5": ("\n", "<|im_end|>\n", True),
    "llama3": ("", "<|eot_id|>", False),
    "llama3_1": ("", "<|eot_id|>", True),
    "llama3_2": ("", "<|eot_id|>", True),
    "gemma3": ("", "<end_of_turn>\n", False),
}


def encoder(template: str | dict[str, str], tokenizer: Any = None) -> Encoder:
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, "messages", 10**6)


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_that_the_assistant_says_is_learned(name: str) -> None:
    begin, end, writes_tools = TEMPLATES[name]
    encode = encoder(getattr(of_trl, f"{name}_chat_template"))
    found = learned(encode.tokenizer, encode({"messages": TALK})["labels"])
    assert found == [f"{begin}Well, thank you.{end}", f"{begin}Even better.{end}"]
    if not writes_tools:
        return
    row = encode({"messages": CALLING, "tools": TOOLS})
    call, answer = learned(encode.tokenizer, row["labels"])
    assert answer == f"{begin}Sun.{end}" and '"Paris"' in call and call.endswith(end)
    assert "The weather." in encode.tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize("name", ["llama3", "phi3", "lfm2", "gemma3"])
def test_tools_that_a_template_does_not_write_are_refused(name: str) -> None:
    encode = encoder(getattr(of_trl, f"{name}_chat_template"))
    with pytest.raises(RecipeError, match=r"leaves out (a row's tools|the assistant's tool_calls)|refuses"):
        encode({"messages": CALLING, "tools": TOOLS})
    with pytest.raises(RecipeError, match=r"leaves out the assistant's tool_calls|refuses"):
        encode({"messages": CALLING})


def test_answers_that_a_template_passes_over_are_refused() -> None:
    """SmolVLM's prints the parts of a content and nothing of a plain text."""
    encode = encoder(of_trl.smolvlm_chat_template)
    with pytest.raises(RecipeError, match=r"leaves out the assistant's answer, Well, thank you\."):
        encode({"messages": TALK})
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TALK]
    found = learned(encode.tokenizer, encode({"messages": parts})["labels"])
    assert [text.strip() for text in found] == ["Well, thank you.<end_of_utterance>", "Even better.<end_of_utterance>"]


MARKED = (
    "{% for m in messages %}[{{ m['role'] }}] {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)
PLAIN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def test_one_of_several_templates() -> None:
    """A tokenizer may have a template for tools beside the default one; the marks of the one that is used count."""
    encode = encoder({"default": MARKED, "tool_use": "{{ tools | tojson }}" + MARKED})
    for tools in (None, TOOLS):
        row = encode({"messages": TALK, "tools": tools})
        assert learned(encode.tokenizer, row["labels"]) == ["Well, thank you.", "Even better."]
        assert ("The weather." in encode.tokenizer.decode(row["input_ids"])) == (tools is not None)


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "plain"])
@pytest.mark.parametrize("answer", ["\n\nYes.", "  Yes.", "\tYes.", "Yes.  "])
def test_an_answer_that_begins_or_ends_with_blanks(answer: str, template: str) -> None:
    """Its first token may have begun before it: it is learned with that."""
    tokenizer = tiny_tokenizer()
    talk = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": answer}]
    encode = encoder(template + "{% if add_generation_prompt %}[assistant] {% endif %}", tokenizer)
    (found,) = learned(tokenizer, encode({"messages": talk})["labels"])
    assert found.strip() == "Yes." and found.endswith(answer if template == MARKED else answer + "\n")


class Bytes(PythonBackend):
    """A tokenizer of Python alone, which knows no places in a text."""

    vocab_size = 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(byte): byte for byte in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return bytes(map(ord, tokens)).decode()


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "plain"])
def test_a_tokenizer_without_places(template: str) -> None:
    tokenizer = Bytes()
    encode = encoder(template + "{% if add_generation_prompt %}[assistant] {% endif %}", tokenizer)
    end = "" if template == MARKED else "\n"
    found = learned(tokenizer, encode({"messages": TALK})["labels"])
    assert found == ["Well, thank you." + end, "Even better." + end]


def test_llama_2_writes_a_blank_before_an_answer(stories: Any) -> None:
    """Which belongs to the answer's first token: it would never be learned otherwise."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    llama_2 = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
        "{% generation %} {{ m['content'] }} </s>{% endgeneration %}{% endif %}{% endfor %}"
    )
    for template in (llama_2, llama_2.replace("{% generation %} ", " {% generation %}")):
        encode = encoder(template, tokenizer)
        found = learned(tokenizer, encode({"messages": TALK[:2]})["labels"])
        assert [text.strip() for text in found] == ["Well, thank you. </s>"]


@pytest.mark.parametrize("template", [CHATML, MARKED, PLAIN], ids=["chatml", "marked", "plain"])
def test_parts_and_nothing_as_content(template: str) -> None:
    """A template that takes text alone would write the list as Python does, and null as None."""
    encode = encoder(template + "{% if add_generation_prompt %}[assistant] {% endif %}" * (template == PLAIN))
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in TALK]
    assert encode({"messages": parts}) == encode({"messages": TALK})
    nothing = [{"role": "user", "content": None}, *TALK[1:]]
    assert "None" not in encode.tokenizer.decode(encode({"messages": nothing})["input_ids"])
    picture = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, *TALK[1:]]
    with pytest.raises(RecipeError, match=r"takes text alone, and a message has other parts: .*a\.png"):
        encode({"messages": picture})


ROWS = {
    "the completion": ["Even better."],
    "the assistant": ["Well, thank you.", "Even better."],
}


@pytest.mark.parametrize("what", ROWS)
def test_prompts_and_completions_of_messages(what: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKED
    row = {"prompt": TALK[:3], "completion": TALK[3:]}
    encode = Encoder(tokenizer, "prompt", 10**6, learned=what)
    assert learned(tokenizer, encode(row)["labels"]) == ROWS[what]
    with pytest.raises(RecipeError, match="text as one of prompt and completion, messages as the other"):
        encode({"prompt": "Well?", "completion": TALK[3:]})
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="the tokenizer has no chat template and the dataset holds conversations"):
        Encoder(tokenizer, "prompt", 10**6)(row)
