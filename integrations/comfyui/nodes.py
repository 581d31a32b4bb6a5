"""Two nodes: a bundle's folder -> an open pipeline; a pipeline and what to sample -> IMAGE.

ComfyUI's contract: a class with INPUT_TYPES, RETURN_TYPES, FUNCTION and CATEGORY. IMAGE is a torch tensor float32
[B, H, W, C] in 0..1. An exception's message is shown at the node that raised it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import diffpress as dp
from diffpress.runtime.bundle import find_bundle
from diffpress.runtime.engines import ENGINES
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampler import MAX_SEED

if TYPE_CHECKING:
    import torch
    from PIL import Image

PIPELINE = "DIFFPRESS_PIPELINE"
CATEGORY = "diffpress"
MODELS = "diffpress"  # folder in ComfyUI's models/ that relative paths start from
AUTO = "auto"
OWN_STEPS, OWN_GUIDANCE, CLASSES_IN_TURN = 0, -1.0, -1  # values of widgets, which cannot be left empty


class LoadBundle:
    """Open a bundle. ComfyUI keeps the pipeline until an input or the bundle changes."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Opens a diffpress bundle."
    RETURN_TYPES = (PIPELINE,)
    RETURN_NAMES = ("pipeline",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        """Return the inputs of the node."""
        where = f"folder of a bundle or of a compress run; relative paths start in ComfyUI's models/{MODELS}"
        return {
            "required": {
                "bundle": ("STRING", {"default": "", "tooltip": where}),
                "engine": ([AUTO, *ENGINES], {"tooltip": f"{AUTO}: the first that can run here"}),
                "threads": ("INT", {"default": 0, "min": 0, "max": 1024, "tooltip": "processor threads; 0: all"}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, bundle: str) -> bool | str:  # noqa: N802 (ComfyUI's name)
        """Return True, or why nothing is queued."""
        try:
            bundle_folder(bundle)
        except InvalidInputError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, bundle: str, **_: object) -> str:  # noqa: N802 (ComfyUI's name)
        """Return the bundle's hash: after another export the node runs again."""
        return dp.load_bundle(bundle_folder(bundle)).hash

    def load(self, bundle: str, engine: str, threads: int) -> tuple[dp.Pipeline]:
        """Open the bundle; raises DiffpressError."""
        chosen = None if engine == AUTO else engine
        return (dp.Pipeline(bundle_folder(bundle), chosen, threads or None, keep_open=True),)


class SampleBundle:
    """Sample images from a bundle. What does not fit the model is refused, as in `diffpress sample`."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Samples images from a diffpress bundle."
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        """Return the inputs of the node."""
        own = "the bundle's own"
        text = {"multiline": True, "default": ""}
        last = {"min": CLASSES_IN_TURN, "max": 2**31 - 1}
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "prompt": ("STRING", {**text, "tooltip": "for models conditioned on text"}),
                "negative": ("STRING", {**text, "tooltip": "what the images should not show; needs guidance"}),
                "label": ("INT", {"default": CLASSES_IN_TURN, **last, "tooltip": "class; -1: the classes in turn"}),
                "steps": ("INT", {"default": OWN_STEPS, "min": 0, "max": 1000, "tooltip": f"0: {own}"}),
                "guidance": (
                    "FLOAT",
                    {"default": OWN_GUIDANCE, "min": -1.0, "max": 100.0, "step": 0.1, "tooltip": f"below 0: {own}"},
                ),
                "seed": (
                    "INT",
                    {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True, "tooltip": "of image 0"},
                ),
                "batch": ("INT", {"default": 1, "min": 1, "max": 4096, "tooltip": "images, of seed, seed + 1, ..."}),
            }
        }

    def sample(
        self,
        pipeline: dp.Pipeline,
        prompt: str,
        negative: str,
        label: int,
        steps: int,
        guidance: float,
        seed: int,
        batch: int,
    ) -> tuple[torch.Tensor]:
        """Return the images of `seed`, `seed` + 1, ...: float32 [batch, H, W, C] in 0..1; raises DiffpressError."""
        import torch

        kind = pipeline.spec.conditioning.kind
        images = pipeline(
            prompt if prompt or kind == "text" else None,  # an empty prompt is a prompt
            negative_prompt=negative or None,
            labels=None if label == CLASSES_IN_TURN else label,
            steps=None if steps == OWN_STEPS else steps,
            guidance=None if guidance < 0 else guidance,
            seeds=range(seed, seed + batch),
        )
        if isinstance(images, np.ndarray):
            raise InvalidInputError(f"{pipeline.bundle.path}: its samples are no pictures; use diffpress sample")
        return (torch.from_numpy(np.stack([as_floats(image) for image in images])),)


def bundle_folder(text: str) -> Path:
    """Return the folder that a user named.

    Raises:
        InvalidInputError: It is no bundle.
    """
    folder = find_bundle(models_folder() / text.strip()) if text.strip() else None
    if folder is None:
        raise InvalidInputError(
            f"bundle '{text}': not a bundle; give the folder of one, absolute or in {models_folder()} (make one with "
            "'diffpress export' or 'diffpress compress')"
        )
    return folder


def models_folder() -> Path:
    """Return where relative paths start: models/diffpress of ComfyUI; outside of it the working directory."""
    try:
        import folder_paths
    except ModuleNotFoundError:
        return Path.cwd()
    return Path(folder_paths.models_dir) / MODELS


def as_floats(image: Image.Image) -> np.ndarray:
    """Return an image as float32 [H, W, 3 or 4] in 0..1, as ComfyUI's own loader does."""
    pixels = image if image.mode in ("RGB", "RGBA") else image.convert("RGB")
    return np.asarray(pixels, np.float32) / np.float32(255.0)
