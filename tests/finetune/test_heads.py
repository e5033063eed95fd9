"""TRL computes losses beside the model's own head: they are the head's, for every family, dense and expert choice."""

from typing import Any

import pytest
import torch
from families import EVERY_FAMILY, fill_zeros
from trl.trainer.utils import add_fused_lm_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_fused_head_gives_the_loss_of_the_family_s_own(
    family: str, dtype: torch.dtype, make_routed_model: Any
) -> None:
    """Scaled and capped logits among them."""
    model = make_routed_model(family).to(dtype).eval()
    fill_zeros(model)
    ids = torch.randint(3, model.config.vocab_size, (3, 17))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    labels = labels.masked_fill(mask == 0, -100)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        add_fused_lm_head(model)
        found = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(
        found.loss.float(), expected.float(), atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0
    )
    assert found.label_mask.sum() == (labels[:, 1:] != -100).sum()
