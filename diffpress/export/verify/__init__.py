"""Checks of an exported graph: parity with torch, executed precision, latency."""
