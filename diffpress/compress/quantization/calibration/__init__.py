"""Activation and weight statistics collected while the model samples, and the scales read from them."""
