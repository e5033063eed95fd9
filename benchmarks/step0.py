"""Loss before any training of every initialisation, on a real checkpoint: `python -m benchmarks.step0 SOURCE TEXT`.

SOURCE is a dense checkpoint, TEXT a UTF-8 file of its domain. Writes benchmarks/results/step0.json and prints the
table of the README.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ecmoe.conversion import convert
from ecmoe.conversion.upcycling.initialisations import INITIALISATIONS

from .machine import save

VARIANTS: dict[str, dict[str, Any]] = {
    "blend": {},
    "shared": {},
    "copy": {},
    "split": {},
    "granular": {"granularity": 2},
    "granular, G = 4": {"granularity": 4},
    "noise": {},
    "noise, ratio 0.1": {"ratio": 0.1},
    "drop, ratio 0.1": {"ratio": 0.1},
    "drop": {},
    "mix": {"num_experts": 8},
    "copy, router centroid": {"router": "centroid"},
    "copy, layers last-half": {"layers": "last-half"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="dense checkpoint folder with one model.safetensors")
    parser.add_argument("text", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = {name: measure(name, options.source, options.text, Path(scratch)) for name in VARIANTS}
    path = save(
        "step0", {"source": "/".join(options.source.resolve().parts[-2:]), "text": options.text.name, "rows": rows}
    )
    print(table(rows))
    print(f"\n{path}")


def measure(name: str, source: Path, text: Path, scratch: Path) -> dict[str, Any]:
    init = name.partition(",")[0]
    kwargs = dict(VARIANTS[name])
    if init == "mix":
        kwargs["mix_with"] = [str(halfway(source, scratch / "other"))]
    record = convert(str(source), str(scratch / name), init=init, text=str(text), **kwargs)
    kept = ("loss_dense", "loss_converted", "loss_change", "kl_divergence", "greedy_same", "uncovered")
    return {
        "exact": INITIALISATIONS[init].exact,
        "parameters": record["parameters"],
        **{key: record["verification"][key] for key in kept},
        "largest_layer_error": max(record["verification"]["layer_errors"].values()),
    }


def halfway(source: Path, folder: Path) -> Path:
    """A second checkpoint to mix with, where only one real one is at hand: the FFNs shrunk by a tenth."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    changed = {name: tensor * 0.9 if ".mlp.down_proj." in name else tensor for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| initialisation | promised | loss, dense | loss at step 0 | divergence | active parameters |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, row in rows.items():
        lines.append(
            f"| {name} | {'exact' if row['exact'] else 'no'} | {row['loss_dense']:.4f} | "
            f"{row['loss_converted']:.4f} | {abs(row['kl_divergence']):.0e} | {row['parameters']['active']:,} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
