"""What the names of parameters and modules say, whatever a family calls its layers."""

import re

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)(?=\.|$)")


def layer_number(name: str) -> int | None:
    """The layer that something belongs to: 3 of "model.layers.3.mlp" and of "transformer.h.3.mlp"; None of none."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def from_layer_number(name: str) -> str:
    """The name from its layer's number on, which is the same in a base model and in one with a head; of what is in no
    layer the whole name."""
    found = _LAYER.search(name)
    return name if found is None else name[found.start(1) :]
