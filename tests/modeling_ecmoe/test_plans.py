"""Every family under Transformers' parallel plans, on two gloo ranks: what the whole model computes, gradients too."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import CORE, FAMILIES, MIXED, MODEL_TYPES, NO_STAGES, NO_TENSOR_PLAN

pytest.importorskip("transformers.distributed.expert_parallel", reason="Transformers before 5.23")

import modeling_ecmoe
from benchmarks.parallel import on_ranks

from .plan_process import PLANS, compare, pipeline_refusal

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

OTHERS = pytest.param([name for name in FAMILIES | MIXED if name not in CORE], marks=pytest.mark.families)


@pytest.mark.parametrize("families", [CORE, OTHERS], ids=["core", "others"])
@pytest.mark.parametrize("plan", PLANS)
def test_parallel_plans(
    families: list[str], plan: str, make_routed_model: Callable, make_config: Callable, tmp_path: Path
) -> None:
    if plan == "pipeline":
        staged = [name for name in families if name not in NO_STAGES]
        families = [name for name in staged if modeling_ecmoe.model_class(MODEL_TYPES[name]).supports_pipeline]
    if "tensor" in plan:
        families = [name for name in families if name not in NO_TENSOR_PLAN]
    for name in families:
        shared = {"shared_expert_intermediate_size": 24, "shared_expert_weighting": "complement"}
        make_routed_model(name, **shared).save_pretrained(tmp_path / name)
    for name, found in on_ranks(2, compare, [tmp_path / name for name in families], plan).items():
        assert max(found["apart"].values()) < 2e-5, (name, found)
        assert found["greedy_same"], name
        is_whole = plan == "tensor" and make_config(name).ffn_has_bias  # which its styles would add once per rank
        assert found["held"] == (1 if is_whole else 0.5), name


@pytest.mark.parametrize("name", ["Granite", "GPTNeoX"])
def test_what_a_pipeline_would_get_wrong_is_refused(name: str, make_routed_model: Callable, tmp_path: Path) -> None:
    make_routed_model(name).save_pretrained(tmp_path)
    assert "pp_size=2: Transformers' pipeline computes something else" in on_ranks(2, pipeline_refusal, tmp_path)
