"""The `schedule` stage: choose the solver and the timesteps of a model, optionally by a search."""
