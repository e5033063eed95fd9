"""Packed documents do not see each other, whatever computes attention: its arguments, and the losses they give."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import modeling_flash_attention_utils as flash

import ecmoe.finetune.train
from ecmoe.finetune import RecipeError
from ecmoe.finetune.train import make_trainer

pytestmark = pytest.mark.usefixtures("quick_end")
# How rows become batches: documents end to end, packed by TRL, one beside the other, all as one row.
BATCHES: dict[str, dict[str, Any]] = {
    "wrapped": {"packing": True},
    "bfd": {"packing": True, "packing_strategy": "bfd_split"},
    "padded": {"packing": False, "too_long": "truncate"},
    "one row": {"packing": False, "padding_free": True, "max_length": None},
}
FLASH = ["flash_attention_2", "flash_attention_3"]


class FakeFlash:
    """FlashAttention's two functions by torch's own attention, and what they were called with."""

    def __init__(self) -> None:
        self.boundaries: list[list[int]] = []
        self.rows: list[int] = []

    def dense(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.rows.append(len(q))
        return attend(q, k, v, options["softmax_scale"])

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, **options: Any) -> Tensor:
        self.boundaries.append(cu_seqlens_q.tolist())
        assert options["max_seqlen_q"] == cu_seqlens_q.diff().max()
        parts = [slice(*ends) for ends in pairwise(cu_seqlens_q.tolist())]
        scale = options["softmax_scale"]
        return torch.cat([attend(q[None, part], k[None, part], v[None, part], scale)[0] for part in parts])


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, S, heads, head_dim], causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FakeFlash]:
    """Makes the models that recipes load compute attention in that way."""
    fake = FakeFlash()

    def imports(*_: Any, **__: Any) -> tuple:
        return fake_dense, fake_varlen, None, flash._pad_input, flash._unpad_input

    # Transformers reads off the signatures which arguments they take.
    def fake_dense(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0, softmax_scale: Any = None, causal: Any = None
    ):
        return fake.dense(q, k, v, softmax_scale=softmax_scale)

    def fake_varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0, softmax_scale: Any = None, causal: Any = None,
    ):  # fmt: skip
        return fake.varlen(q, k, v, cu_seqlens_q, max_seqlen_q=max_seqlen_q, softmax_scale=softmax_scale)

    def choose(implementation: str) -> FakeFlash:
        load = ecmoe.finetune.train.load_model
        monkeypatch.setattr(flash, "_lazy_imports", imports)
        monkeypatch.setattr(flash, "_loaded_implementation", None)

        def loaded(recipe: Any) -> Any:
            model = load(recipe)
            model.config._attn_implementation = implementation
            return model

        monkeypatch.setattr(ecmoe.finetune.train, "load_model", loaded)
        return fake

    return choose


@pytest.fixture(scope="module")
def sentences(place: Path) -> Path:
    """Short documents of unlike length."""
    rows = [{"text": f"Number {n}: " + "a word " * (1 + n * 7 % 11)} for n in range(60)]
    (place / "sentences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place / "sentences.jsonl"


def by_document(trainer: Any) -> float:
    """The held-out loss of each document by itself."""
    total, learned = 0.0, 0
    model = trainer.model.eval()
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        for row in trainer.eval_dataset:
            for ids in torch.tensor(row["input_ids"]).split(row.get("seq_lengths") or [len(row["input_ids"])]):
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
                total += nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
                learned += len(ids) - 1
    return total / learned


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", *FLASH])
def test_documents_do_not_see_each_other(
    implementation: str, batches: str, sentences: Path, recipe_of: Callable, use: Callable
) -> None:
    if implementation == "flex_attention" and batches in ("bfd", "one row"):
        pytest.skip("torch 2.13's compiler makes no code for flex attention of changing lengths on a CPU")
    fake = use(implementation)
    trainer = make_trainer(recipe_of(dataset=sentences, max_steps=1, **BATCHES[batches]))
    batch = next(iter(trainer.get_train_dataloader()))
    is_flat = "flash" in implementation or batches in ("bfd", "one row")
    if batches != "padded":
        assert "attention_mask" not in batch and (len(batch["input_ids"]) == 1) == is_flat
    found = trainer.evaluate()["eval_loss"]
    if "flash" in implementation:
        assert fake.boundaries and not fake.rows  # the path that knows documents, and no other
        if batches != "padded":
            lengths = [n for row in trainer.eval_dataset for n in row.get("seq_lengths") or [len(row["input_ids"])]]
            assert sum(ends[-1] for ends in fake.boundaries) % sum(lengths) == 0
            seen = {end - start for ends in fake.boundaries for start, end in pairwise(ends)}
            assert seen == set(lengths)
    assert found == pytest.approx(by_document(trainer), abs=1e-5)
    trainer.train()


@pytest.mark.parametrize("implementation", FLASH)
def test_packed_rows_side_by_side_are_refused(
    implementation: str, sentences: Path, recipe_of: Callable, use: Callable
) -> None:
    """Transformers' path for FlashAttention tells documents apart in one row alone."""
    trainer = make_trainer(recipe_of(dataset=sentences, max_steps=1))
    use(implementation)
    trainer.model.config._attn_implementation = implementation
    with pytest.raises(RecipeError, match=f"{implementation} sees no documents in a batch of . packed rows"):
        trainer.train()
    with pytest.raises(RecipeError, match="packed rows; put them into one row, as TRL's padding_free=True does"):
        trainer.evaluate()
