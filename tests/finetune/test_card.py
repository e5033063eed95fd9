"""The card of a fine-tuned folder, the whole model beside adapters, and what is printed of a few held-out rows."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from ecmoe.finetune import RecipeError, run
from ecmoe.finetune.card import doubt, figure
from ecmoe.finetune.cli import main
from ecmoe.hub import why_no_checkpoint

FEW = {"max_steps": 2, "max_eval_sequences": 4, "learning_rate": 1e-2}
pytestmark = pytest.mark.usefixtures("quick_end")


@pytest.mark.parametrize("way", ["full", "lora", "merged", "dense"])
def test_the_card_says_what_was_done_and_measured(way: str, place: Path, recipe_of: Callable) -> None:
    model = place / ("dense" if way == "dense" else "ecmoe")
    (model / "README.md").write_text("---\nbase_model: someone/small\nlicense: apache-2.0\n---\n# It\n")
    more = {"lora": {"r": 2}, "merge": way == "merged"} if way in ("lora", "merged") else {}
    recipe = recipe_of(model=model, **FEW, **more, save_strategy="steps", save_steps=1)
    results, out = run(recipe), Path(recipe.output_dir)
    folder = out / "merged" if way == "merged" else out
    card = ModelCard.load(folder / "README.md")
    card.validate  # noqa: B018  (asks the Hub)
    assert (card.data.base_model, card.data.license) == ("someone/small", "apache-2.0")
    assert card.data.library_name == ("peft" if way == "lora" else "transformers")
    assert card.data.pipeline_tag == "text-generation" and card.data.datasets is None
    assert ("ecmoe" in card.data.tags) == (way != "dense") and ("lora" in card.data.tags) == (way == "lora")
    assert getattr(card.data, "base_model_relation", None) == ("adapter" if way == "lora" else None)
    for text in (
        f"| {figure(results['loss_before'], results['loss_before_stderr'])} | ",
        f"| {figure(results['loss_after'], results['loss_after_stderr'])} |",
        f"{results['held_out_tokens']:,} learned tokens",
        f"| tokens, without padding | {results['tokens']:,} |",
        "| learning_rate | 0.01 |",
        "| packing | True |",
        "| max_length | 64 |",
        "`text.txt`",
        f"torch {torch.__version__}",
        "AutoPeftModelForCausalLM" if way == "lora" else "AutoModelForCausalLM",
    ):
        assert text in card.text, text
    assert ("load of an expert" in card.text) == (way != "dense")
    assert str(place) not in card.content and "{{" not in card.content and "None" not in card.text
    if way == "full":
        assert not list(out.glob("checkpoint-*/README.md"))


def test_merging(recipe_of: Callable, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole model beside its adapters computes what they do; without it the run's last line says how to merge."""
    recipe = recipe_of(**FEW, lora={"r": 2}, merge=True)
    run(recipe)
    out = Path(recipe.output_dir)
    ids = AutoTokenizer.from_pretrained(out / "merged")("Some words.", return_tensors="pt").input_ids
    whole, adapted = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (out / "merged", out))
    assert not any("lora" in name for name, _ in whole.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-4)
        other = AutoModelForCausalLM.from_pretrained(place / "ecmoe").eval()(ids).logits
    assert (whole(ids).logits - other).abs().max() > 1e-3
    capsys.readouterr()
    words = [f"{name}={json.dumps(value)}" for name, value in FEW.items()]
    command = [str(place / "recipe.yaml"), f"model={place / 'ecmoe'}", f"output_dir={out}-2", "lora={r: 2}", *words]
    main(command)
    printed = capsys.readouterr().out
    assert "Adapters and finetune_results" in printed
    line = printed.partition("merge=true writes the whole model too; so does ")[2].splitlines()[0]
    assert line in str(why_no_checkpoint(f"{out}-2"))  # what the other commands say of these adapters
    _, option, code = shlex.split(line)
    assert option == "-c"
    exec(code, {})
    again = AutoTokenizer.from_pretrained(f"{out}-2-merged")("Some words.", return_tensors="pt").input_ids
    assert torch.equal(again, ids)
    merged = AutoModelForCausalLM.from_pretrained(f"{out}-2-merged")
    assert type(merged) is type(whole) and merged.config.thresholds_from is None
    with torch.no_grad():
        adapted = AutoModelForCausalLM.from_pretrained(f"{out}-2").eval()(ids).logits
        torch.testing.assert_close(merged.eval()(ids).logits, adapted, atol=1e-5, rtol=1e-4)
    assert "4 held-out rows" in printed and "±" in printed
    with pytest.raises(RecipeError, match=r"merge=[Tt]rue is for adapters \(lora\)"):
        recipe_of(**FEW, merge=True)


def test_a_word_where_few_rows_decide() -> None:
    sure = {"loss_change": -0.5, "loss_change_stderr": 0.01, "held_out_rows": 200}
    assert doubt(sure) == ""
    assert doubt(sure | {"loss_change_stderr": 0.3}).startswith(
        "The change is within two standard errors: 200 held-out"
    )
    assert doubt(sure | {"held_out_rows": 8}).startswith("8 held-out rows are few")
    assert doubt({"held_out_rows": 1}).startswith("1 held-out row is few")
