"""`python -m benchmarks NAME [options]` runs benchmarks/NAME.py, or the package of that name."""

import importlib
import sys
from pathlib import Path

_HELPERS = {"__init__", "__main__", "harness", "machine", "peers"}


def main() -> None:
    here = Path(__file__).parent
    found = [*here.glob("*.py"), *(path.parent for path in here.glob("*/__init__.py"))]
    names = sorted(path.stem.replace("_", "-") for path in found if path.stem not in _HELPERS)
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(f"usage: python -m benchmarks {{{','.join(names)}}} [options]")
    name = sys.argv.pop(1)
    importlib.import_module(f"benchmarks.{name.replace('-', '_')}").main()


if __name__ == "__main__":
    main()
