"""Why the Hub gave nothing: what the three commands say of a name, without a network."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ecmoe import analysis, conversion
from ecmoe.hub import could_be_hub_id, why_not_from_hub


def answered(kind: type[Exception]) -> Exception:
    """As the Hub's client raises it, with several lines."""
    response = type("Response", (), {"headers": {}, "request": None})()
    made: Any = kind
    return made("404 Client Error.\n\nSomething Not Found for url: https://...", response=response)


def led_to(cause: Exception, error: Exception) -> Exception:
    try:
        raise error from cause
    except Exception as raised:
        return raised


UNREACHABLE = led_to(ConnectionError("Name or service not known"), LocalEntryNotFoundError("Got: ... an error\nlines"))
REASONS: dict[str, tuple[Exception, str]] = {
    "no repository": (answered(RepositoryNotFoundError), "it has no such repository, or a private one (log in"),
    "gated": (answered(GatedRepoError), "access to it must be asked for"),
    "no revision": (answered(RevisionNotFoundError), "it has no such revision"),
    "no network": (UNREACHABLE, "it is not in the cache, and the Hub cannot be reached (Name or service not known)"),
    "as Transformers says it": (
        led_to(answered(RepositoryNotFoundError), OSError("me/no is not a local folder and is not a valid model\n...")),
        "it has no such repository",
    ),
    "Transformers without a network": (
        led_to(UNREACHABLE, OSError("We couldn't connect to ...")),
        "the Hub cannot be reached (Name or service not known)",
    ),
    "anything else": (OSError("me/x does not appear to have a file named config.json.\nCheckout"), "me/x does not app"),
    "without a word": (OSError(), "OSError"),
}


@pytest.mark.parametrize("case", REASONS)
def test_each_reason_has_its_words(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    error, words = REASONS[case]
    said = why_not_from_hub(error)
    assert said.startswith(words) or words in said
    assert "\n" not in said


@pytest.mark.parametrize("name", ["gpt2", "me/gpt2", "me/gpt2@v1"])
def test_what_the_client_raises_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own errors and those of Transformers, not copies of them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = "it is not in the cache, and HF_HUB_OFFLINE=1 keeps the Hub out"
    with pytest.raises(conversion.ConversionError, match=f"source={name} is no local folder and could .*: {said}"):
        conversion.convert(name, "nowhere")
    with pytest.raises(conversion.ConversionError, match=f"source={name} is no local folder and could .*: {said}"):
        conversion.export(name, "nowhere")
    if "@" not in name:
        with pytest.raises(analysis.AnalysisError, match=f"checkpoint={name} is no local folder and .*: {said}"):
            analysis.evaluate(name, data=__file__.replace(".py", ".txt") and str(Path(__file__).parent))
        for load in (transformers.AutoTokenizer.from_pretrained, huggingface_hub.snapshot_download):
            with pytest.raises((OSError, OfflineModeIsEnabled)) as raised:
                load(name)
            assert why_not_from_hub(raised.value).startswith(said)
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "me/model@v2", "me/model@refs/pr/1"])
def test_names_of_the_hub(name: str) -> None:
    assert could_be_hub_id(name)


@pytest.mark.parametrize("name", ["/no", "./no", "~/no", "../no", "a/b/c", "a b", "", "no/"])
def test_paths(name: str) -> None:
    assert not could_be_hub_id(name)
