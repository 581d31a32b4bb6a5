"""ControlNets end to end: diffpress' images against those of diffusers for the same folders, images and noise.

If torch runs the networks, only the order of float32 additions differs: 90 dB PSNR is far above what a wrong formula
reaches. If an engine runs them, the bound is 40 dB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from PIL import Image  # noqa: E402

from diffpress.compress.sources.load import load_checkpoint  # noqa: E402
from diffpress.runtime.image_inputs.control import ControlRequest  # noqa: E402
from tests import image_inputs  # noqa: E402
from tests.against_diffusers import psnr_db, sampled_in_torch, with_short_plan  # noqa: E402
from tests.controlnets import (  # noqa: E402
    controlled_by_diffusers,
    controlled_pipeline,
    in_torch,
    request,
    tiny_controlnet,
)
from tests.pipelines import sd_inpaint  # noqa: E402

Folders = Callable[[str, int], Path]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def controlnet(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Folder of a tiny ControlNet for a kind of pipeline, made once per kind and seed; do not modify."""
    made: dict[tuple[str, int], Path] = {}

    def folder(kind: str, seed: int = 0) -> Path:
        if (kind, seed) not in made:
            path = tmp_path_factory.mktemp(f"{kind}-controlnet") / str(seed)
            made[kind, seed] = tiny_controlnet(tiny_folder(kind), path, seed)
        return made[kind, seed]

    return folder


# --- in torch --------------------------------------------------------------------------------------------------


CASES = [
    ("sd", 1, {}),
    ("sd", 1, {"scale": 0.6, "start": 0.2, "end": 0.7}),
    ("sd", 2, {"scale": [0.8, 0.3], "start": [0.0, 0.4], "end": [0.5, 1.0]}),
    ("sd2-v", 1, {"scale": 1.5}),
    ("sdxl", 1, {"end": 0.6}),
    ("lcm", 1, {"start": 0.3}),
]


@pytest.mark.parametrize(("kind", "networks", "numbers"), CASES)
def test_control_reproduces_diffusers(
    kind: str, networks: int, numbers: dict[str, Any], tiny_folder: Callable[..., Path], controlnet: Folders
) -> None:
    checkpoint = with_short_plan(load_checkpoint(tiny_folder(kind)), 5)
    folders, wanted = [controlnet(kind, seed) for seed in range(networks)], request(checkpoint, networks, **numbers)
    ours = sampled_in_torch(checkpoint, control=in_torch(checkpoint, folders, wanted))
    assert psnr_db(ours, controlled_by_diffusers(tiny_folder(kind), checkpoint, folders, wanted)) >= 90
    assert psnr_db(ours, sampled_in_torch(checkpoint)) < 45, "the ControlNet changes nothing"


def test_the_image_matters(tiny_folder: Callable[..., Path], controlnet: Folders) -> None:
    checkpoint = with_short_plan(load_checkpoint(tiny_folder("sd")), 5)
    first, both = request(checkpoint), request(checkpoint, 2)
    other = ControlRequest(both.images[1:])
    images = [sampled_in_torch(checkpoint, control=in_torch(checkpoint, [controlnet("sd")], r)) for r in (first, other)]
    assert psnr_db(*images) < 50


@pytest.mark.parametrize(("kind", "masked"), [("sd", False), ("sd", True), ("sd-inpaint", True)])
def test_control_of_image_to_image_and_inpainting_reproduces_diffusers(
    kind: str, masked: bool, tiny_folder: Callable[..., Path], controlnet: Folders
) -> None:
    folder = tiny_folder("sd") if kind == "sd" else tiny_folder(sd_inpaint, kind)
    checkpoint = with_short_plan(load_checkpoint(folder), 6)
    images = image_inputs.request(checkpoint.spec.image_size, 0.7, masked)
    # 4 of 6 steps are run: the window is a share of these
    wanted = request(checkpoint, scale=0.8, start=0.3, end=0.8)
    ours = image_inputs.sampled_in_torch(checkpoint, images, in_torch(checkpoint, [controlnet("sd")], wanted))
    options = {
        "pipe": controlled_pipeline(folder, [controlnet("sd")], "Inpaint" if masked else "Img2Img"),
        "control_image": [Image.fromarray(pixels) for pixels in wanted.given[0].pixels],
        "controlnet_conditioning_scale": 0.8,
        "control_guidance_start": 0.3,
        "control_guidance_end": 0.8,
    }
    assert psnr_db(ours, image_inputs.sampled_by_diffusers(folder, checkpoint, images, **options)) >= 90
    assert psnr_db(ours, image_inputs.sampled_in_torch(checkpoint, images)) < 45, "the ControlNet changes nothing"
