"""Shared fixtures: the families as tiny random models on the CPU."""

from collections.abc import Callable, Iterator

import pytest
import torch
from deprecations import no_deprecations  # noqa: F401  (autouse)
from families import EVERY_FAMILY, fill_zeros, tiny_fields
from transformers import PreTrainedConfig, PreTrainedModel

import modeling_ecmoe

TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "capacity_factor": 1.5,
}

MakeConfig = Callable[..., PreTrainedConfig]
MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """One thread, a fixed seed, and memory of torch.empty filled with NaN so that reading it shows."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=EVERY_FAMILY)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def build_config(family: str, **fields: object) -> PreTrainedConfig:
    """A tiny config; its capacity factor moves between the bounds on the experts of a token when they are given."""
    merged = TINY | tiny_fields(family, fields) | fields
    least, most = merged.get("min_experts_per_token", 0), merged.get("max_experts_per_token")
    if "capacity_factor" not in fields and most in (1, 2, 3):
        merged["capacity_factor"] = min(TINY["capacity_factor"], most)
    if "capacity_factor" not in fields and least in (2, 3):
        merged["capacity_factor"] = least
    return getattr(modeling_ecmoe, f"EcMoe{family}Config")(**merged)


def build_model(family: str, head: str = "ForCausalLM", seed: int = 0, **fields: object) -> PreTrainedModel:
    """A random model in eval mode; `head` is the end of the class name."""
    torch.manual_seed(seed)
    model = getattr(modeling_ecmoe, f"EcMoe{family}{head}")(build_config(family, **fields)).eval()
    fill_zeros(model)
    return model


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    return build_config


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    return build_model


@pytest.fixture(scope="session")
def make_routed_model() -> MakeModel:
    """A random model whose routers are decided and whose thresholds are calibrated on random tokens."""

    def make(family: str, **fields: object) -> PreTrainedModel:
        model = build_model(family, **fields)
        with torch.no_grad():
            for block in modeling_ecmoe.sparse_blocks(model).values():
                block.gate.weight.mul_(5)
        modeling_ecmoe.calibrate_thresholds(model, [{"input_ids": random_tokens(8, 64, seed=9)}])
        return model

    return make


def random_tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """[batch, length] token ids without the special ones."""
    return torch.randint(3, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., torch.Tensor]:
    return random_tokens
