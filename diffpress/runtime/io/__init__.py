"""Files: atomic writes, typed JSON fields, images."""
