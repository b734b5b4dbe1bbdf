"""Benchmarks: what the client costs, as ratios to other loops in the same run. ``python -m tests.bench --help``."""
