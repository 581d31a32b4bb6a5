"""The shared training loop, its losses, data, distribution over processes, and resume."""
