"""One file per denoiser family; `ADAPTERS` in compress/models/adapter.py lists them."""
