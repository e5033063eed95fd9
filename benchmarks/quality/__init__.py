"""What expert choice buys, measured causally: `python -m benchmarks quality [--quick]`.

Every finished run is a file of its own in benchmarks/results/quality; the same command goes on with those that are
missing, and draws tables and plots of what is there. `--quick` is its core at half of the steps.
"""


def main() -> None:
    from .command import main as run  # parts of it are used where a bare image has not what the rest asks for

    run()
