"""The FFN of a dense family in the terms of every initialisation: gate_proj, up_proj, down_proj, whatever they are
called in its files."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """One matrix of the dense FFN, or its bias, as rows of a tensor.

    tensor: the tensor's name after `mlp.`, such as "gate_up_proj.weight".
    matrix: "gate_proj", "up_proj" or "down_proj".
    is_bias: its bias.
    first_row, num_rows: where it lies in the tensor.
    """

    tensor: str
    matrix: str
    is_bias: bool
    first_row: int
    num_rows: int

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
    into = ["gate_proj", "up_proj"] if ffn.has_gate else ["up_proj"]
    is_fused = len(ffn.into) < len(into)
    parts = []
    for kind in ("weight", "bias") if config.ffn_has_bias else ("weight",):
        for number, matrix in enumerate(into):
            name = ffn.into[0] if is_fused else ffn.into[number]
            parts.append(Part(f"{name}.{kind}", matrix, kind == "bias", number * width if is_fused else 0, width))
        parts.append(Part(f"{ffn.out}.{kind}", "down_proj", kind == "bias", 0, config.hidden_size))
    return parts


def parts_of_stack(config: Any, layer: int, stacked: str) -> list[Part]:
    """What a stacked parameter of the experts is made of, in order, such as gate and up of "gate_up_proj"."""
    is_bias = stacked.endswith("_bias")
    is_down = stacked.startswith("down_proj")
    return [p for p in ffn_parts(config, layer) if p.is_bias == is_bias and (p.matrix == "down_proj") == is_down]
