"""One module per denoiser family; the table of them is in compress/models/adapter.py."""
