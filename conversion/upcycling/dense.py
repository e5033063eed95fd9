"""The FFN of a dense family in the terms of every initialisation: gate_proj, up_proj, down_proj, whatever they are
called in its files; and why a family cannot be converted."""

from dataclasses import dataclass
from typing import Any

import modeling_ecmoe


@dataclass(frozen=True)
class Part:
    """One matrix of the dense FFN, or its bias, as rows of a tensor.

    tensor: the tensor's name in its layer, such as "mlp.gate_up_proj.weight".
    shared: what the same of the shared expert is called, such as "gate_up_proj.weight".
    matrix: "gate_proj", "up_proj" or "down_proj".
    is_bias: its bias.
    first_row, num_rows: where it lies in the tensor.
    is_transposed: the tensor holds the matrix as [in, out].
    """

    tensor: str
    shared: str
    matrix: str
    is_bias: bool
    first_row: int
    num_rows: int
    is_transposed: bool = False

    @property
    def neuron_axis(self) -> int | None:
        """The axis along which the FFN's neurons lie; None for the bias of down_proj, which has none."""
        if self.matrix != "down_proj":
            return 0
        return None if self.is_bias else 1


def ffn_parts(config: Any) -> list[Part]:
    """The parts of a family's dense FFN: gate before up before down, weights before biases.

    config: of the expert-choice family, which says what the dense one calls them.
    """
    ffn, width = config.dense_ffn, config.intermediate_size
    place = f"{ffn.place}." if ffn.place else ""

    def part(name: str, matrix: str, kind: str, first_row: int, num_rows: int) -> Part:
        shared = f"{name if ffn.has_class else matrix}.{kind}"
        is_transposed = ffn.is_transposed and kind == "weight"
        return Part(f"{place}{name}.{kind}", shared, matrix, kind == "bias", first_row, num_rows, is_transposed)

    into = ["gate_proj", "up_proj"] if ffn.has_gate else ["up_proj"]
    is_fused = len(ffn.into) < len(into)
    parts = []
    for kind in ("weight", "bias") if config.ffn_has_bias else ("weight",):
        for number, matrix in enumerate(into):
            name = ffn.into[0] if is_fused else ffn.into[number]
            parts.append(part(name, matrix, kind, number * width if is_fused else 0, width))
        parts.append(part(ffn.out, "down_proj", kind, 0, config.hidden_size))
    return parts


def ffn_width(dense_config: Any) -> int:
    """The width of a dense family's FFN, whatever its config calls it; where it says nothing, four times the hidden
    size, as GPT-2's."""
    width: int | None = getattr(dense_config, field_of(dense_config.model_type, "intermediate_size"), None)
    return width or 4 * int(dense_config.hidden_size)


def field_of(model_type: str, field: str) -> str:
    """What a dense family's config calls a field, such as "hidden_act"."""
    return str(modeling_ecmoe.config_class(model_type).attribute_map.get(field, field))


def parts_of_stack(config: Any, stacked: str) -> list[Part]:
    """What a stacked parameter of the experts is made of, in order, such as gate and up of "gate_up_proj"."""
    is_bias = stacked.endswith("_bias")
    is_down = stacked.startswith("down_proj")
    return [p for p in ffn_parts(config) if p.is_bias == is_bias and (p.matrix == "down_proj") == is_down]


_REASONS = {
    "biogpt": "its FFN drops activations between its two matrices, which experts do not",
    "bloom": "its FFN adds the residual itself",
    "gemma3": "it reads images too; convert a text model (gemma3_text)",
    "gemma3n": "its layers run on several streams at once, with an FFN sparse by itself",
    "gpt_oss": "its experts have biases and clamped activations, and its attention has sinks",
    "mamba": "it has no FFN",
    "mamba2": "it has no FFN",
    "mpt": "its FFN adds the residual itself",
    "rwkv": "its FFN looks at the token before",
    "xglm": "its FFN drops activations between its two matrices, which experts do not",
}
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def why_not(config: dict[str, Any]) -> str | None:
    """Why a config.json's family cannot be expressed, where that is known; None otherwise."""
    reason = _REASONS.get(str(config.get("model_type")))
    if reason:
        return reason
    if any(isinstance(config.get(field), int) and config[field] > 1 for field in _EXPERT_FIELDS):
        return "a mixture of experts that no family here computes the rest of"
    if config.get("is_encoder_decoder"):
        return "it is an encoder and a decoder; only decoders can be converted"
    if "vision_config" in config or "audio_config" in config:
        return "it reads more than text; convert a text model"
    return None
