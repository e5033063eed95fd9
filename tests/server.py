"""A small inference server that drives a checkpoint as the Transformers back-ends of vLLM 0.33.0 and SGLang 0.5.23 do.

It builds the base model through AutoModel without weights, replaces each module `experts` whose parameters are all
3-D by a kernel of its own, registers an attention function, loads tensors by their names, and sends the tokens of all
requests as one row that only position_ids divide. Shapes: T tokens, D hidden size, K slots of a token.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "stand_in_server"


class FusedExperts(nn.Module):
    """In place of `experts`: the same number of slots for every token, and nothing but silu."""

    def __init__(self, experts: nn.Module, num_slots: int) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(experts.gate_up_proj.data)
        self.w2_weight = nn.Parameter(experts.down_proj.data)
        self.num_slots, self.calls = num_slots, 0

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden_states [T, D], topk_ids [T, K], topk_weights [T, K] -> [T, D]."""
        assert hidden_states.dim() == 2
        assert topk_ids.shape == topk_weights.shape == (len(hidden_states), self.num_slots)
        topk_ids, topk_weights = topk_ids.to(torch.int32), topk_weights.to(torch.float32)
        assert topk_ids.min() >= 0 and topk_ids.max() < len(self.w13_weight)
        self.calls += 1
        gate_TKI, up_TKI = torch.einsum("td,tkid->tki", hidden_states, self.w13_weight[topk_ids]).chunk(2, -1)
        rows_TKD = torch.einsum("tki,tkdi->tkd", nn.functional.silu(gate_TKI) * up_TKI, self.w2_weight[topk_ids])
        return (rows_TKD * topk_weights[..., None]).sum(1).to(hidden_states.dtype)


class Requests:
    """The keys and values of each request and layer, and which tokens of the row at hand are whose."""

    def __init__(self) -> None:
        self.cache: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.row: list[tuple[str, int]] = []
        self.calls = 0


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    forward_batch: Requests | None = None,
    attention_instances: dict[int, str] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query, key, value [1, heads, T, head size] -> [T, heads * head size]; the server's keywords have come here."""
    assert attention_mask is None and forward_batch is not None and attention_instances is not None
    assert attention_instances[module.layer_idx] == "attention"
    forward_batch.calls += 1
    outputs, first = [], 0
    for name, length in forward_batch.row:
        own = slice(first, first + length)
        held = forward_batch.cache.get((name, module.layer_idx))
        keys, values = key[0, :, own], value[0, :, own]
        if held is not None:
            keys, values = torch.cat([held[0], keys], dim=1), torch.cat([held[1], values], dim=1)
        forward_batch.cache[name, module.layer_idx] = keys, values
        groups = query.shape[1] // keys.shape[0]
        visible = torch.ones(length, keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - length)
        if sliding_window is not None:
            visible = visible.triu(keys.shape[1] - length - sliding_window + 1)
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                query[0, :, own],
                keys.repeat_interleave(groups, 0),
                values.repeat_interleave(groups, 0),
                attn_mask=visible,
                scale=scaling,
            )
        )
        first += length
    return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1), None


class Server:
    """One loaded checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
        config = AutoConfig.from_pretrained(folder)
        config._attn_implementation = ATTENTION
        with torch.device("meta"):
            self.model = AutoModel.from_config(config, dtype=config.dtype).eval()
        self.kernels: list[FusedExperts] = []
        self._replace(self.model, config.num_experts_per_tok)
        self.model.to_empty(device="cpu")
        with torch.no_grad():  # what no checkpoint holds
            computed = dict(type(self.model.rotary_emb)(config).named_buffers())
            for name, buffer in self.model.rotary_emb.named_buffers():
                buffer.copy_(computed[name])
        self._load(load_file(folder / "model.safetensors"))
        self.requests = Requests()
        self.positions: dict[str, int] = {}

    def _replace(self, module: nn.Module, num_slots: int) -> None:
        for name, child in module.named_children():
            parameters = list(child.parameters())
            if name == "experts" and parameters and all(parameter.dim() == 3 for parameter in parameters):
                kernel = FusedExperts(child, num_slots)
                setattr(module, name, kernel)
                self.kernels.append(kernel)
            else:
                self._replace(child, num_slots)

    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Every persistent tensor of the model must be found, under the names of the checkpoint."""
        renamed = {"experts.gate_up_proj": "experts.w13_weight", "experts.down_proj": "experts.w2_weight"}
        found = {}
        for name, tensor in tensors.items():
            for old, new in renamed.items():
                name = name.replace(old, new)
            found[name.removeprefix("model.")] = tensor
        self.head = found.pop("lm_head.weight", found["embed_tokens.weight"])
        own = self.model.state_dict()
        assert own.keys() == found.keys()
        for name, tensor in own.items():
            tensor.copy_(found[name])

    @torch.no_grad()
    def step(self, tokens: dict[str, list[int]]) -> dict[str, Tensor]:
        """One pass over the new tokens of any requests, new ones and known ones: hidden states [length, D] of each."""
        self.requests.row = [(name, len(ids)) for name, ids in tokens.items()]
        starts = {name: self.positions.get(name, 0) for name in tokens}
        positions = [torch.arange(len(ids)) + starts[name] for name, ids in tokens.items()]
        self.positions |= {name: starts[name] + len(ids) for name, ids in tokens.items()}
        outputs = self.model(
            input_ids=torch.tensor([[token for ids in tokens.values() for token in ids]]),
            inputs_embeds=None,
            use_cache=False,
            position_ids=torch.cat(positions)[None],
            return_dict=False,
            forward_batch=self.requests,
            attention_instances=dict.fromkeys(range(len(self.model.layers)), "attention"),
        )
        parts = outputs[0][0].split([len(ids) for ids in tokens.values()])
        return dict(zip(tokens, parts, strict=True))
