"""Benchmarks: latency and memory of bundles, measured in one run."""
