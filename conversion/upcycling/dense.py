"""The FFN of a dense family in the terms of every initialisation: gate_proj, up_proj, down_proj, whatever they are
called in its files."""

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


def ffn_parts(config: Any, layer: int) -> list[Part]:
    """The parts of a layer's dense FFN: gate before up before down, weights before biases.

    config: of the expert-choice family, which says what the dense one calls them.
    """
    ffn, width = config.dense_ffn, config.ffn_width_multiple(layer) * config.intermediate_size
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
    """The width of a dense family's FFN, whatever its config calls it."""
    return int(modeling_ecmoe.config_class(dense_config.model_type).dense_width(dense_config))


def field_of(model_type: str, field: str) -> str:
    """What a dense family's config calls a field, such as "hidden_act"."""
    return str(modeling_ecmoe.config_class(model_type).attribute_map.get(field, field))


def parts_of_stack(config: Any, layer: int, stacked: str) -> list[Part]:
    """What a stacked parameter of the experts is made of, in order, such as gate and up of "gate_up_proj"."""
    is_bias = stacked.endswith("_bias")
    is_down = stacked.startswith("down_proj")
    return [p for p in ffn_parts(config, layer) if p.is_bias == is_bias and (p.matrix == "down_proj") == is_down]
