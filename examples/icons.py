"""Captioned icons: transparent drawings composed over a plain colour, so that captions are compositional.

A training image is icon i over colour c with the caption `<style> <name> on <colour>`, such as `flat red apple on
blue`. With N icons and eight colours there are 8 N combinations, numbered 8 i + c. HELD_OUT of them, each of another
name, are kept out of training: the prompts that a model is evaluated on ask for a known icon over a known colour in a
combination that it has not seen.
"""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COLOURS = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "red": (214, 64, 69),
    "green": (76, 175, 80),
    "blue": (66, 133, 244),
    "yellow": (253, 216, 53),
    "pink": (244, 143, 177),
    "gray": (158, 158, 158),
}
HELD_OUT = 200
SPLIT_SEED = 20


@dataclass(frozen=True)
class Icons:
    """N icons.

    Attributes:
        rgba: uint8 [N, H, W, 4].
        names: What each shows, str [N].
        styles: How each is drawn, str [N].
    """

    rgba: np.ndarray
    names: np.ndarray
    styles: np.ndarray

    @property
    def combinations(self) -> int:
        """Number of combinations of an icon and a colour."""
        return len(self.rgba) * len(COLOURS)

    @property
    def sha256(self) -> str:
        """Hash of all drawings and captions."""
        return hashlib.sha256(self.rgba.tobytes() + "\n".join(self.captions()).encode()).hexdigest()

    def captions(self) -> list[str]:
        """Return the caption of every combination, in order."""
        icons = zip(self.styles, self.names, strict=True)
        return [f"{style} {name} on {colour}" for style, name in icons for colour in COLOURS]

    def images(self, combinations: np.ndarray) -> np.ndarray:
        """Compose the combinations [B] as uint8 [B, 3, H, W]."""
        icon, colour = np.divmod(combinations, len(COLOURS))
        background = np.array(list(COLOURS.values()), np.float32)[colour][:, None, None, :]
        rgba = self.rgba[icon].astype(np.float32)
        alpha = rgba[..., 3:] / 255
        composed = rgba[..., :3] * alpha + background * (1 - alpha)
        return np.ascontiguousarray(composed.round().astype(np.uint8).transpose(0, 3, 1, 2))

    def held_out(self) -> np.ndarray:
        """Return the combinations kept out of training, int64 [HELD_OUT], each of another name; fewer if N is small."""
        rng = np.random.default_rng(SPLIT_SEED)
        names = np.unique(self.names)
        count = min(HELD_OUT, len(names) // 4)
        chosen = rng.choice(names, count, replace=False)
        icon = np.array([rng.choice(np.flatnonzero(self.names == name)) for name in chosen], np.int64)
        return icon * len(COLOURS) + rng.integers(0, len(COLOURS), count)

    def training(self) -> np.ndarray:
        """Return all combinations that are not held out, int64, in order."""
        return np.setdiff1d(np.arange(self.combinations), self.held_out())


def load_icons(path: Path) -> Icons:
    """Read `rgba` uint8 [N, H, W, 4], `caption` and `style` str [N] from an npz file.

    Raises:
        SystemExit: The file is not readable or has other arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            icons = Icons(file["rgba"], file["caption"], file["style"])
    except (OSError, KeyError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path}: not an npz file with rgba, caption and style: {error}") from error
    count = len(icons.rgba)
    if icons.rgba.dtype != np.uint8 or icons.rgba.ndim != 4 or icons.rgba.shape[3] != 4 or count == 0:
        found = f"{icons.rgba.dtype} {list(icons.rgba.shape)}"
        raise SystemExit(f"{path}: rgba must be uint8 [N, H, W, 4], found {found}")
    if icons.names.shape != (count,) or icons.styles.shape != (count,):
        raise SystemExit(f"{path}: needs {count} captions and styles, one for each icon")
    return icons


def background_colours(images: np.ndarray) -> np.ndarray:
    """Return the index into COLOURS of each background of uint8 [B, 3, H, W]: that nearest to the frame's median.

    The frame is the outermost pixel on all sides.
    """
    rows, columns = images[:, :, (0, -1), :], images[:, :, :, (0, -1)]
    frame = np.concatenate([rows.reshape(*images.shape[:2], -1), columns.reshape(*images.shape[:2], -1)], axis=2)
    median = np.median(frame.astype(np.float32), axis=2)
    palette = np.array(list(COLOURS.values()), np.float32)
    return np.square(median[:, None] - palette).sum(axis=2).argmin(axis=1)
