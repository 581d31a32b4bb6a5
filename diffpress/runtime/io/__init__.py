"""File input and output: atomic writes, typed JSON fields, images."""
