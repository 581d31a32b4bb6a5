"""OpenVINO engine (CPU)."""
