"""Structured pruning: channel importance, coupled groups, allocation of the pruning ratio."""
