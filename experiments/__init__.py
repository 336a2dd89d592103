"""Comparisons of methods over tasks and seeds; `python -m experiments.run --help`."""
