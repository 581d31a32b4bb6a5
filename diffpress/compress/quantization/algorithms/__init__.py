"""Optional algorithms of the quantize stage, one per file."""
