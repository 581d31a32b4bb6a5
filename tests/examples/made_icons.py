"""Icons for the tests of the scripts: squares and discs in two styles."""

from pathlib import Path

import numpy as np

NAMES = ("red square", "blue square", "green disc", "yellow disc", "black square", "white disc")


def save_icons(path: Path, size: int = 64) -> None:
    """Write 12 icons: six names in two styles, opaque in the middle and transparent at the frame."""
    rng = np.random.default_rng(0)
    rgba = np.zeros((2 * len(NAMES), size, size, 4), np.uint8)
    inner = slice(size // 4, 3 * size // 4)
    for icon in rgba:
        icon[inner, inner] = [*rng.integers(0, 256, 3), 255]
    styles = np.repeat(["flat", "shaded"], len(NAMES))
    np.savez(path, rgba=rgba, caption=np.tile(NAMES, 2), style=styles)
