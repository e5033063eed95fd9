"""The report page: every number in it is the library's own, any text is only text, and bad input gets one line."""

import json
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from checkpoints import STORIES_MODEL, STORIES_TEXT, tiny_tokenizer, write_dense
from transformers import AutoModelForCausalLM, AutoTokenizer

from ecmoe.analysis import AnalysisError, report
from ecmoe.analysis.cli import main
from ecmoe.conversion import convert
from modeling_ecmoe import routing_report

TEXT = "The class of an object is its type.\n\nA naïve 🙂 set of objects, and a set of types."
# Each number has 6 significant digits in the page.
CLOSE = {"rel": 1e-5, "abs": 1e-9}


class Page(HTMLParser):
    """The start tags, and the contents of script and style elements."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.contents.append("")

    def handle_data(self, data: str) -> None:
        if self.contents:
            self.contents[-1] += data

    @property
    def numbers(self) -> dict[str, Any]:
        (found,) = (i for i, (_, attributes) in enumerate(self.tags) if attributes.get("id") == "routes")
        return json.loads(self.contents[found])


def write_model(folder: Path, make: Callable[..., Any], **fields: object) -> Path:
    make("Llama", **({"vocab_size": 300} | fields)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


MODELS = {
    "plain": {},
    "normalised, bounds": {"normalize_combine_weights": True, "min_experts_per_token": 1, "max_experts_per_token": 2},
    "sigmoid, shared": {
        "router_score_function": "sigmoid",
        "shared_expert_intermediate_size": 48,
        "shared_expert_weighting": "complement",
    },
    "one sparse layer": {"mlp_layer_types": ["dense", "sparse"]},
    "top-k by default": {"inference_routing": "expert_choice"},
}
TOKEN_CHOICE = {"routing": "token_choice", "inference_routing": "token_choice", "capacity_factor": 2}


@pytest.fixture(params=[*MODELS, "token choice", "stories260K"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A checkpoint and a text for it."""
    if request.param == "stories260K":
        if not (STORIES_MODEL.is_dir() and STORIES_TEXT.is_file()):
            pytest.skip("stories260K and its text are not beside the repository (ECMOE_TEST_DATA)")
        convert(str(STORIES_MODEL), str(tmp_path / "model"), init="blend", text=str(STORIES_TEXT))
        stories = STORIES_TEXT.read_text(encoding="utf-8").split("<|endoftext|>")
        return tmp_path / "model", "\n".join(stories[1500].strip().splitlines())
    if request.param == "token choice":
        return write_model(tmp_path / "model", request.getfixturevalue("make_model"), **TOKEN_CHOICE), TEXT
    make = request.getfixturevalue("make_routed_model")
    return write_model(tmp_path / "model", make, **MODELS[request.param]), TEXT


def observe(model: Any, ids: torch.Tensor) -> tuple[dict[int, dict[str, torch.Tensor]], float]:
    """Per layer what goes into the FFN and comes out of it and the router's scores; and the loss."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):
            seen[number] = {}
            layer.mlp.register_forward_hook(
                lambda _, args, output, place=seen[number]: place.update(x=args[0][0], y=output[0])
            )
            layer.mlp.gate.register_forward_hook(
                lambda _, __, output, place=seen[number]: place.update(scores=output[1], threshold=output[2])
            )
    with torch.no_grad():
        return seen, model(ids, labels=ids).loss.item()


def test_every_number_is_the_models_own(case: tuple[Path, str], tmp_path: Path) -> None:
    """Scores, thresholds, routes and loss by hooks on a second pass; load and coverage by `routing_report`; and the
    output of every FFN by hand from the gates in the page."""
    checkpoint, text = case
    report(str(checkpoint), str(tmp_path / "page.html"), text=text)
    page = Page(tmp_path / "page.html").numbers
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    config = model.config
    if config.inference_routing == "expert_choice":  # the page is always causal
        config.inference_routing = "threshold"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert page["ids"] == ids[0].tolist()
    assert "".join(page["texts"]) == text
    layers = list(routing_report(model, [{"input_ids": ids}])["layers"].values())
    seen, loss = observe(model, ids)
    assert page["loss"] == pytest.approx(loss, **CLOSE)
    assert [layer["layer"] for layer in page["layers"]] == list(seen)
    for found, wanted in zip(page["layers"], layers, strict=True):
        assert found["load"] == pytest.approx(wanted["load"], **CLOSE)
        assert found["uncovered"] == pytest.approx(wanted["uncovered"], **CLOSE)
        assert found["fan_out"] == pytest.approx(wanted["experts_per_token"], **CLOSE)
        here = seen[found["layer"]]
        numpy.testing.assert_allclose(found["scores"], here["scores"].numpy(), rtol=1e-5)
        if config.routing == "token_choice":
            assert found["threshold"] is None
        else:
            assert found["threshold"] == pytest.approx(here["threshold"].tolist(), **CLOSE)
        check_routes(found, here["scores"], here["threshold"], config)
        check_output(found, model.model.layers[found["layer"]].mlp, here["x"], here["y"])
        check_histogram(found)
        check_favourites(found, page["ids"], page["names"])


def check_routes(found: dict[str, Any], scores: torch.Tensor, threshold: torch.Tensor, config: Any) -> None:
    """Who took a token, by sorting a row at a time."""
    for row, taken in zip(scores.tolist(), found["chosen"], strict=True):
        by_score = sorted(range(len(row)), key=lambda e: -row[e])
        if config.routing == "token_choice":
            assert taken == sorted(by_score[: config.capacity_factor])
            continue
        margins = [score - limit for score, limit in zip(row, threshold.tolist(), strict=True)]
        best = sorted(range(len(row)), key=lambda e: -margins[e])[: config.max_experts_per_token]
        expected = {e for e in best if margins[e] > 0} | set(best[: config.min_experts_per_token])
        assert taken == sorted(expected)


def check_output(found: dict[str, Any], mlp: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """The gates are the weights that the block used: with them its output follows."""
    gates = torch.zeros(len(x), mlp.config.num_experts)
    for t, (taken, values) in enumerate(zip(found["chosen"], found["gates"], strict=True)):
        gates[t, taken] = torch.tensor(values)
    expected = torch.zeros_like(y)
    with torch.no_grad():
        for e, (up, down) in enumerate(zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True)):
            gate, value = (x @ up.T).chunk(2, dim=-1)
            expected += gates[:, e, None] * ((torch.nn.functional.silu(gate) * value) @ down.T)
        if mlp.shared_expert is not None:
            expected += (1 - gates.sum(1))[:, None] * mlp.shared_expert(x)
    torch.testing.assert_close(expected, y, rtol=1e-4, atol=1e-4)


def check_histogram(found: dict[str, Any]) -> None:
    scores, histogram = numpy.array(found["scores"]), found["histogram"]
    for column, counts in zip(scores.T, histogram["counts"], strict=True):
        expected, _ = numpy.histogram(column, len(counts), (histogram["low"], histogram["high"]))
        assert counts == expected.tolist()
        assert sum(counts) == len(column)
    everything = [*scores.flatten().tolist(), *(found["threshold"] or [])]
    assert (histogram["low"], histogram["high"]) == (min(everything), max(everything))


def check_favourites(found: dict[str, Any], ids: list[int], names: list[str]) -> None:
    for expert, favourites in enumerate(found["favourites"]):
        means = {}
        for token in set(ids):
            scores = [
                found["scores"][t][expert] for t, i in enumerate(ids) if i == token and expert in found["chosen"][t]
            ]
            if scores:
                means[names[ids.index(token)]] = (sum(scores) / len(scores), len(scores), ids.count(token))
        for entry in favourites:
            mean, taken, times = means.pop(entry["name"])
            assert entry["score"] == pytest.approx(mean, rel=1e-5)
            assert (entry["taken"], entry["times"]) == (taken, times)
        lowest = min((entry["score"] for entry in favourites), default=0)
        assert len(favourites) == 8 or not means
        assert all(mean <= lowest + 1e-6 for mean, _, _ in means.values())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, make_routed_model: Callable[..., Any]) -> Path:
    return write_model(tmp_path_factory.mktemp("report") / "small", make_routed_model)


def test_a_text_stays_text(tmp_path: Path, make_routed_model: Callable[..., Any]) -> None:
    """Nothing in a text ends the element that it lies in, and a placeholder of the template is no placeholder.

    The dangerous strings are tokens: one per character they would be harmless, with quotes between them.
    """
    checkpoint = write_model(tmp_path / "model", make_routed_model, vocab_size=310)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.add_tokens(["</script><b>", "<!-- <script>", "{{style}}", "&amp;"]) == 4
    tokenizer.save_pretrained(checkpoint)
    text = "x </script><b>&amp;<!-- <script> {{style}} \u2028 ]]> \\u003c \"'`"
    report(str(checkpoint), str(tmp_path / "page.html"), text=text)
    page = Page(tmp_path / "page.html")
    assert "".join(page.numbers["texts"]) == text
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "b" not in [tag for tag, _ in page.tags]
    assert "</script><b>" in page.numbers["texts"]
    assert page.numbers["checkpoint"] == "model"  # and not where it lies


def test_layers_of_another_name(tmp_path: Path, make_routed_model: Callable[..., Any]) -> None:
    """GPT-2's are h.0, h.1."""
    make_routed_model("GPT2", vocab_size=300).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    report(str(tmp_path / "model"), str(tmp_path / "page.html"), text=TEXT)
    assert [layer["layer"] for layer in Page(tmp_path / "page.html").numbers["layers"]] == [0, 1]


def test_the_page_loads_nothing(small: Path, tmp_path: Path) -> None:
    report(str(small), str(tmp_path / "page.html"), text=TEXT)
    page = Page(tmp_path / "page.html")
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action", "data"} & attributes.keys(), tag
        assert (attributes.get("href") or "#").startswith(("#", "data:")), tag
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    # The one address is the name of SVG's namespace.
    assert set(re.findall(r"https?://[^\"'\s]*", source)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|\beval\(|innerHTML|fetch\(|XMLHttpRequest|import\(", source)
    (policy,) = (a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none';")


def test_a_single_token(small: Path, tmp_path: Path) -> None:
    result = report(str(small), str(tmp_path / "page.html"), text="a")
    assert len(result["ids"]) == 1 and result["loss"] is None


def test_from_a_file_and_over_an_old_page(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    (tmp_path / "page.html").write_text("old")
    main(["report", str(small), "--text-file", str(tmp_path / "text"), "--output", str(tmp_path / "page.html")])
    assert "".join(Page(tmp_path / "page.html").numbers["texts"]) == TEXT
    assert "2 layers" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "text"]


REFUSALS = {
    "--text=": "text is empty",
    "--text= \n": "text is empty",
    "--text=\udcff\udcfe": "text holds bytes that are no text",
    "--text=" + "word " * 200: "the model's context is max_position_embeddings=128",
    "--text-file=empty": "text_file=empty is empty",
    "--text-file=junk": "text_file=junk is no UTF-8 text (byte 0)",
    "--text-file=nul": "text_file=nul holds bytes that are no text",
    "--text-file=rows.jsonl": "text_file=rows.jsonl holds rows, and a page shows one text; give a row's as text,",
    "--text-file=missing": "text_file=missing does not exist",
    "--text-file=.": "text_file=. cannot be read",
    "--text-file=/dev/zero": "has more than 4 MiB",
    "": "give the text itself or a text_file",
}


@pytest.mark.parametrize("option", REFUSALS)
def test_refused_texts(
    small: Path, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("empty", b""),
        ("rows.jsonl", b'{"text": "a"}\n'),
        ("junk", b"\xff\xd8\xff\xe0" * 9),
        ("nul", b"a\0b"),
    ):
        Path(name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(small), "--output", "page.html", *([option] if option else [])])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert REFUSALS[option] in line
    assert not Path("page.html").exists()


def test_a_text_that_is_too_long_is_cut_as_the_message_says(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command it names makes a file that fits, and hardly less than that."""
    monkeypatch.chdir(tmp_path)
    Path("long.txt").write_text("Väter, Mütter & Söhne. " * 40, encoding="utf-8")
    with pytest.raises(AnalysisError) as refusal:
        report(str(small), "page.html", text_file="long.txt")
    said = str(refusal.value)
    subprocess.run(["bash", "-c", said.partition("characters fit: ")[2]], check=True)
    part = Path("part.txt").read_text(encoding="utf-8")
    assert f"; its first {len(part)} characters fit: head -c " in said and part.split()[-1] in "Väter, Mütter & Söhne."
    assert 128 - 12 <= len(report(str(small), "page.html", text_file="part.txt")["ids"]) <= 128
    with pytest.raises(AnalysisError, match=rf"its first {len(part)} characters fit$"):
        report(str(small), "page.html", text=Path("long.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("page.txt", "must end in .html"),
        ("page", "must end in .html"),
        ("missing/page.html", "cannot be written"),
        ("folder.html", "cannot be written"),
        ("file/page.html", "cannot be written"),
        ("/proc/page.html", "cannot be written"),
    ],
)
def test_refused_outputs(
    small: Path,
    output: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.html").mkdir()
    Path("file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["report", str(small), "--text", TEXT, "--output", output])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html"]


def test_refused_checkpoints(tmp_path: Path, make_model: Callable[..., Any]) -> None:
    write_dense(tmp_path / "dense", "Llama")
    with pytest.raises(AnalysisError, match="is a llama model without experts"):
        report(str(tmp_path / "dense"), str(tmp_path / "page.html"), text=TEXT)
    write_model(tmp_path / "no_sparse", make_model, mlp_layer_types=["dense", "dense"])
    with pytest.raises(AnalysisError, match="has no expert-choice layer"):
        report(str(tmp_path / "no_sparse"), str(tmp_path / "page.html"), text=TEXT)
    broken = make_model("Llama", vocab_size=300)
    broken.model.layers[1].mlp.gate.weight.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(AnalysisError, match=r"scores of model\.layers\.1\.mlp are not finite"):
        report(str(tmp_path / "broken"), str(tmp_path / "page.html"), text=TEXT)
    assert not (tmp_path / "page.html").exists()


def test_a_failed_write_leaves_the_old_page(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.html").write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(AnalysisError, match="No space left on device"):
        report(str(small), str(tmp_path / "page.html"), text=TEXT)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.html", "old")]
