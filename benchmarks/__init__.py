"""Measurements, each a command: `python -m benchmarks.NAME`. Results are JSON in benchmarks/results."""
