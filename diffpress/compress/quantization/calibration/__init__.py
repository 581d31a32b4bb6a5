"""Activation statistics collected while the model samples, and the scales of activations and weights."""
