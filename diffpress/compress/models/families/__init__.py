"""Adapters, one module per denoiser family; `ADAPTERS` in compress/models/adapter.py lists them."""
