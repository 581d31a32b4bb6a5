"""Fused sampling: the solver's steps compiled into the engine."""
