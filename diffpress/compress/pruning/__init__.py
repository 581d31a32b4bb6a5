"""Structured pruning: importance, coupled groups, allocation of the ratio."""
