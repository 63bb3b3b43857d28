"""Measurements of marlin: ``python -m benchmarks --help``."""
