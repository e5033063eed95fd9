"""The text that thresholds are measured on: several kinds, the chat template, other text to verify on, and what is
said of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_tokenizer, write_dense
from transformers import AutoModelForCausalLM, AutoTokenizer

import ecmoe.progress
from ecmoe.conversion import ConversionError, convert, texts
from ecmoe.conversion.checkpoints.folder import Checkpoint
from ecmoe.conversion.cli import main
from ecmoe.conversion.sample import SHARES, sample_documents
from ecmoe.conversion.upcycling import convert as converting
from ecmoe.conversion.upcycling.verify import far_kinds, load_warning
from modeling_ecmoe import calibrate_thresholds, sparse_blocks

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "dense"
    write_dense(folder, "Llama", max_position_embeddings=256)
    return folder


@pytest.fixture(scope="module")
def converted(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("converted") / "out"
    return out, convert(str(dense), str(out), num_experts=4)


def read(dense: Path, text: Path | None = None) -> texts.Texts:
    source = Checkpoint(str(dense), None, False)
    return texts.read_texts(source, source.config(), None if text is None else str(text), 0)


def test_each_kind_has_its_share(dense: Path) -> None:
    """A tokenizer of 300 tokens makes more of them than any kind needs."""
    found = read(dense)
    assert found.calibration.shape == (64, 256) and found.num_verification_tokens == 4_096
    assert found.tokens.keys() == found.verification.keys() == SHARES.keys()
    for kind, share in SHARES.items():
        assert found.tokens[kind] == pytest.approx(16_384 * share / 80, abs=256)
        assert len(found.verification[kind]) == pytest.approx(16 * share / 80, abs=1)
    decoded = found.tokenizer.batch_decode(found.calibration)
    pools = ["".join(decoded[start : start + 16]) for start in range(0, 64, 16)]
    assert all(len(set(pools[0]) & set(pool)) > 50 for pool in pools)
    code = [sum(text.count("def ") + text.count("self.") for text in decoded[i : i + 16]) for i in range(0, 64, 16)]
    assert min(code) > 0  # kinds are mixed within every pool


def test_what_one_kind_lacks_the_others_make_up(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "CALIBRATION_TOKENS", 65_536)
    found = read(dense)
    assert found.calibration.numel() == sum(found.tokens.values()) == 65_536
    assert found.tokens["languages"] < 65_536 * SHARES["languages"] / 80
    assert found.tokens["documentation"] > 65_536 * SHARES["documentation"] / 80


def test_no_document_is_on_both_sides(dense: Path) -> None:
    found = read(dense)
    seen = "".join(found.tokenizer.batch_decode(found.calibration))
    for kind, windows in found.verification.items():
        held_out = "".join(found.tokenizer.batch_decode(windows))
        for start in range(0, len(held_out) - 60, 60):
            assert held_out[start : start + 60] not in seen, kind


def test_the_written_kinds_are_there_and_well_formed() -> None:
    documents = sample_documents()
    assert all(len(documents[kind]) > 10 for kind in SHARES)
    for messages in documents["chat"]:
        roles = [message["role"] for message in messages]
        assert roles == (["system"] if roles[0] == "system" else []) + ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"] == message["content"].strip() != "" for message in messages)
    flat = [json.dumps(document) for found in documents.values() for document in found]
    assert len(set(flat)) == len(flat)


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, "{{ raise_exception('never') }}", None])
def test_conversations_go_through_the_chat_template(tmp_path: Path, template: str | None) -> None:
    write_dense(tmp_path, "Llama")
    for path in tmp_path.glob("chat_template*"):
        path.unlink()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    chat = "".join(AutoTokenizer.from_pretrained(tmp_path).batch_decode(read(tmp_path).verification["chat"]))
    if template in (CHATML, NO_SYSTEM):
        assert "<|user|>" in chat and "<|end|><|assistant|>" in chat and "User:" not in chat
        assert chat.count("<|system|>") == 0 or template == CHATML
    else:
        assert "User: " in chat and "\n\nAssistant: " in chat and "<|" not in chat


def test_rows_of_a_file_may_hold_conversations(dense: Path, tmp_path: Path) -> None:
    """One kind then, and no table of kinds."""
    messages = [{"role": "user", "content": "Say it. " * 30}, {"role": "assistant", "content": "It. " * 30}]
    rows = [{"messages": messages}, {"text": "plain " * 100}] * 20
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read(dense, tmp_path / "chats.jsonl")
    assert found.tokens.keys() == found.verification.keys() == {"text"}
    words = "".join(found.tokenizer.batch_decode(found.calibration))
    assert "Say it. " * 30 + "It. " in words and "plain plain" in words and "{" not in words


def test_a_row_ends_where_its_line_does(tmp_path: Path) -> None:
    """Other line separators may stand inside its text; lines and rows without text are passed over."""
    held = ["one\u2028two", "three\x85four", "five\u2029", None, " "]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in held]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\r\n".join([*rows, "  ", ""]), encoding="utf-8")
    assert texts.read_documents(tmp_path / "rows.jsonl") == ["one\u2028two", "three\x85four", "five"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{"story": "x"}', "line 2 has neither text nor messages with role and content"),
        ('{"messages": [{"content": "x"}]}', "line 1 has neither text nor messages"),
        ('{"text": ', "line 1 is no JSON"),
        ("[]", "line 1 has neither text nor messages"),
        ("", "is empty"),
    ],
)
def test_bad_rows_get_one_line(dense: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ConversionError, match=message):
        read(dense, tmp_path / "rows.jsonl")


def test_the_record_the_card_and_the_config_say_how_each_kind_fares(converted: tuple[Path, dict]) -> None:
    out, record = converted
    kinds = record["verification"]["kinds"]
    assert kinds.keys() == SHARES.keys()
    whole = record["verification"]
    assert sum(found["tokens"] for found in kinds.values()) == whole["tokens"] == 4_096
    for name in ("loss_dense", "loss_converted", "kl_divergence", "experts_per_token"):
        mean = sum(found[name] * found["tokens"] for found in kinds.values()) / whole["tokens"]
        assert mean == pytest.approx(whole[name], abs=1e-9), name
    assert min(found["load_min"] for found in kinds.values()) <= whole["load_min"]
    assert max(found["load_max"] for found in kinds.values()) >= whole["load_max"]
    assert sum(record["calibration_tokens_of_kinds"].values()) == record["calibration_tokens"] == 16_384
    card = (out / "README.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", card, re.MULTILINE))
    for kind, found in kinds.items():
        loads = f"{found['load_min']:.2f} | {found['load_max']:.2f} | {found['experts_per_token']:.2f}"
        assert rows[kind] == f"{found['tokens']:,} | {found['loss_converted']:.4f} | {loads}"
    named = json.loads((out / "config.json").read_text())["thresholds_from"]
    assert named == f"16,384 tokens of {texts.OWN_TEXT} ({', '.join(SHARES)})"
    assert f"Thresholds from: {named}." in card
    assert AutoModelForCausalLM.from_pretrained(out).config.thresholds_from == named


def test_loading_says_at_the_level_of_information(
    converted: tuple[Path, dict], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    AutoModelForCausalLM.from_pretrained(converted[0])
    assert "Thresholds from: 16,384 tokens of the package's sample" in caplog.text


def test_the_screen_shows_three_kinds_and_more(
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(texts, "CALIBRATION_TOKENS", 512)
    main([str(dense), str(tmp_path / "out"), "--num-experts=4"])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "ecmoe_conversion.json").read_text())
    kinds = record["verification"]["kinds"]
    assert len(kinds) == 6
    for kind, found in kinds.items():
        (row,) = [line for line in printed.splitlines() if re.match(rf"\W+{kind} ", line)]
        figures = f"{found['tokens']:,}", f"{found['loss_converted']:.4f}", f"{found['load_max']:.2f}"
        assert all(figure in row for figure in figures)
    warning = load_warning(record, str(tmp_path / "out"))
    assert warning is not None and warning in caplog.text  # 512 tokens are too few
    assert (
        far_kinds(record) and f"On {', '.join(far_kinds(record))} alone some experts are outside 0.5 to 2.0" in printed
    )


def test_the_warning_says_what_to_do() -> None:
    near = {"load_min": 0.5, "load_max": 2.0, "tokens": 512}

    def record(verification: dict[str, Any] | None) -> dict[str, Any]:
        return {"verification": verification, "num_experts": 8, "capacity_factor": 1, "routing": "expert_choice"}

    assert load_warning(record(None), "out") is None
    assert load_warning(record(near), "out") is None
    for part in ({"load_min": 0.49}, {"load_max": 2.01}):
        warning = load_warning(record(near | part), "out")
        assert warning is not None and "ecmoe-inspect calibrate out --text FILE" in warning
        assert f"{(near | part)['load_min']:.2f} to {(near | part)['load_max']:.2f} of their share" in warning


def test_kinds_are_named_where_they_are_long_enough_to_tell() -> None:
    near, far = {"load_min": 0.5, "load_max": 2.0, "tokens": 512}, {"load_min": 0.05, "load_max": 6.5, "tokens": 512}
    record = {"num_experts": 8, "capacity_factor": 1, "verification": None, "routing": "expert_choice"}
    assert far_kinds(record) == []
    assert far_kinds(record | {"verification": near}) == []
    kinds = {"chat": near, "prose": far, "code": far | {"tokens": 511}}  # 64 tokens of an expert
    assert far_kinds(record | {"verification": near | {"kinds": kinds}}) == ["prose"]


@pytest.mark.parametrize("init", ["shared", "blend"])
def test_thresholds_of_the_shared_experts_alone_are_those_of_the_whole(
    dense: Path, tmp_path: Path, init: str, few_tokens: None
) -> None:
    """Where the dense FFN is all that the block computes, half the products give the same thresholds."""
    convert(str(dense), str(tmp_path / "out"), num_experts=4, init=init)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    quick = {name: block.gate.threshold.clone() for name, block in sparse_blocks(model).items()}
    calibrate_thresholds(model, [{"input_ids": batch} for batch in read(dense).calibration.split(texts.BATCH)])
    for name, block in sparse_blocks(model).items():
        torch.testing.assert_close(block.gate.threshold, quick[name], rtol=0, atol=0 if init == "shared" else 1e-6)


def test_initialisations_without_the_whole_ffn_are_calibrated_as_they_are(
    dense: Path, tmp_path: Path, few_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> None:
        raise AssertionError("its experts count")

    monkeypatch.setattr(converting, "_shared_experts_alone", refuse)
    for init in ("copy", "split", "noise"):
        convert(str(dense), str(tmp_path / init), num_experts=4, init=init)


def test_every_step_shows_itself_where_output_is_no_terminal(
    dense: Path, tmp_path: Path, few_tokens: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ecmoe.progress, "SECONDS_PER_LINE", 0)
    main([str(dense), str(tmp_path / "out"), "--num-experts=4"])
    said = capfd.readouterr().err
    for step in ("Calibrating", "Verifying", "Greedy text"):
        assert re.search(rf"^{step}.*\d+/\d+ ", said, re.MULTILINE), said
