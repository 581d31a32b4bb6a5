"""Latency and memory of bundles, measured in one run."""
