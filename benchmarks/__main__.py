"""`python -m benchmarks NAME [options]` runs benchmarks/NAME.py."""

import importlib
import sys
from pathlib import Path

_HELPERS = {"__init__", "__main__", "harness", "machine", "peers"}


def main() -> None:
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _HELPERS)
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(f"usage: python -m benchmarks {{{','.join(names)}}} [options]")
    name = sys.argv.pop(1)
    importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
