"""The schedule stage: which solver and timesteps a model is sampled with, and the search for them."""
