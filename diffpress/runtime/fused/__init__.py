"""Fused sampling: the sampling loop compiled into the engine."""
