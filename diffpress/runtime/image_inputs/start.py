"""Where sampling from images starts, and what a mask keeps of them.

    x  = alpha clean + sigma noise                                  at the level of the first step
    x' = mask x' + (1 - mask) (alpha' clean + sigma' noise)         after each step, at the level where the next starts

The noise is that of a sample without an image. After the last step the kept part is `clean` itself. `clean` is made of
pixels, or of latents mean + std z that the encoder of an autoencoder gives, with noise z of the sample's seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.noise_schedule import CLEAN, NoiseLevel

# streams of the encoder's noise, for the image and for the masked image; those of the sampler count up from 0
ENCODER_STREAM, MASKED_STREAM = 2**64 - 1, 2**64 - 2

NoiseOf = Callable[[int], np.ndarray]  # stream -> unit noise, float32 [N, ...]


def _rows(array: np.ndarray | None, members: slice | np.ndarray) -> np.ndarray | None:
    return None if array is None else array[members]


@dataclass(frozen=True)
class MaskedImage:
    """Input `masked_image` of a network for inpainting, for N samples (see runtime/conditioning.py).

    Attributes:
        clean: Latents of the image whose repainted pixels are grey, float32 [N, c, h, w]; see ImageStart.
        std: Their standard deviation, or None.
        mask: 1 where the image is repainted, of the cells [N, 1, h, w] or of the pixels of each cell [N, f f, h, w].
    """

    clean: np.ndarray
    std: np.ndarray | None
    mask: np.ndarray

    def part(self, members: slice | np.ndarray) -> MaskedImage:
        """Return the input of these samples alone."""
        return MaskedImage(self.clean[members], _rows(self.std, members), self.mask[members])

    def network_input(self, noise_of: NoiseOf) -> np.ndarray:
        """Return the array that the network reads, float32 [N, channels, h, w]."""
        latents = self.clean if self.std is None else self.clean + self.std * noise_of(MASKED_STREAM)
        return np.concatenate([self.mask, latents] if self.mask.shape[1] == 1 else [latents, self.mask], axis=1)


@dataclass(frozen=True)
class ImageStart:
    """Start of N samples from images.

    Attributes:
        clean: The images as samples of the denoiser, float32 [N, ...]; the mean, if the encoder gives a distribution.
        std: Standard deviation of that distribution, float32 [N, ...]; None if there is none or `clean` is drawn.
        first: Index of the first step of the plan that is run.
        mask: 1 where the image is repainted and 0 where it is kept, float32 [N, 1, h, w]; None repaints everything.
        from_noise: Start from noise alone: a mask with strength 1.
        pixels: Pixels that replace the finished images where `keep` is true, float32 [N, C, H, W]; None replaces none.
        keep: bool [N, 1, H, W].
        masked: What a network for inpainting reads; its `mask` above is None, because it keeps the image itself.
    """

    clean: np.ndarray
    std: np.ndarray | None
    first: int
    mask: np.ndarray | None = None
    from_noise: bool = False
    pixels: np.ndarray | None = None
    keep: np.ndarray | None = None
    masked: MaskedImage | None = None

    def __len__(self) -> int:
        return len(self.clean)

    def part(self, members: slice | np.ndarray) -> ImageStart:
        """Return the start of these samples alone."""
        return replace(
            self,
            clean=self.clean[members],
            std=_rows(self.std, members),
            mask=_rows(self.mask, members),
            pixels=_rows(self.pixels, members),
            keep=_rows(self.keep, members),
            masked=None if self.masked is None else self.masked.part(members),
        )

    def conditioned(self, conditions: ConditioningInputs, noise_of: NoiseOf) -> ConditioningInputs:
        """Return the conditioning with what a network for inpainting reads."""
        return conditions if self.masked is None else conditions.with_masked_image(self.masked.network_input(noise_of))

    def drawn(self, noise_of: NoiseOf) -> ImageStart:
        """Return the start with `clean` drawn from its distribution."""
        if self.std is None:
            return self
        return replace(self, clean=self.clean + self.std * noise_of(ENCODER_STREAM), std=None)

    def noised(self, noise: np.ndarray, level: NoiseLevel) -> np.ndarray:
        """Return the images at a noise level, float32 [N, ...]."""
        result: np.ndarray = np.float32(level.alpha) * self.clean + np.float32(level.sigma) * noise
        return result

    def repainted(self, x: np.ndarray, noise: np.ndarray, level: NoiseLevel | None) -> np.ndarray:
        """Return the sample with the kept part replaced by the image at a level; None is after the last step."""
        if self.mask is None:
            return x
        result: np.ndarray = self.mask * x + (1.0 - self.mask) * self.noised(noise, level or CLEAN)
        return result

    def overlaid(self, images: np.ndarray) -> np.ndarray:
        """Return finished images [N, C, H, W] with the pixels of the image where they are to be kept."""
        if self.pixels is None:
            return images
        assert self.keep is not None
        return np.where(self.keep, self.pixels, images)
