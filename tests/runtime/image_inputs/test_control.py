"""runtime/image_inputs/control.py and control_networks.py: what may be given, when a network controls, and sums."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.control import (
    ControlImage,
    ControlRequest,
    by_network,
    check_control,
    check_control_size,
    control_pixels,
    read_control_request,
    residual_names,
)
from diffpress.runtime.image_inputs.control_networks import make_control
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec

POSE = np.full((4, 6, 3), (255, 0, 51), np.uint8)


def read(*images: Any, **numbers: Any) -> ControlRequest:
    found = read_control_request(images, prefix="--", **numbers)
    assert found is not None
    return found


def bundle(**networks: int) -> Any:
    """Return a bundle with control networks that read images of so many channels."""
    entries = {name: {"inputs": {"control_image": {"shape": ["batch", n, 1, 1]}}} for name, n in networks.items()}
    graphs = {"denoiser": {"control_networks": list(networks)} if networks else {}, **entries}
    return Bundle(Path("bundle"), None, {"graphs": graphs})  # type: ignore[arg-type]


# --- requests --------------------------------------------------------------------------------------------------


def test_a_file_and_an_array_are_the_same_image(tmp_path: Path) -> None:
    Image.fromarray(POSE).save(tmp_path / "pose.png")
    for image in (POSE, tmp_path / "pose.png", [POSE]):
        assert np.array_equal(read(image).given[0].pixels, POSE[None])


def test_numbers_are_for_all_networks_or_for_each() -> None:
    def numbers(request: ControlRequest) -> list[tuple[float, float, float]]:
        return [(image.scale, image.start, image.end) for image in request.given]

    assert numbers(read(POSE)) == [(1.0, 0.0, 1.0)]
    assert numbers(read(POSE, POSE, scale=0.5, end=0.7)) == [(0.5, 0.0, 0.7)] * 2
    assert numbers(read(POSE, POSE, scale=[0.5, 2], start=[0.1, 0.0])) == [(0.5, 0.1, 1.0), (2.0, 0.0, 1.0)]


def test_a_network_is_left_out_with_none() -> None:
    found = read(None, POSE, scale=[1.0, 0.5])
    assert found.images[0] is None and [image.scale for image in found.given] == [0.5]
    assert read_control_request([]) is None and read_control_request([None]) is None


def test_images_of_a_call_are_assigned_to_the_networks_of_the_bundle() -> None:
    assert by_network(None, 1) == []
    assert by_network([POSE, POSE], 1) == [[POSE, POSE]]  # one for each sample
    assert by_network([POSE, None], 2) == [POSE, None]
    assert by_network("pose.png", 2) == ["pose.png"]


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0, 0.6), (0.2, 0.7), (0.34, 0.67), (0.0, 0.05)])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_network_controls_in_the_evaluations_of_diffusers(steps: int, start: float, end: float) -> None:
    # the line of StableDiffusionControlNetPipeline
    keep = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
    assert ControlImage(POSE[None], 0.5, start, end).scales(steps) == [0.5 * share for share in keep]


def test_another_image_scale_or_window_has_other_facts() -> None:
    requests = [read(POSE), read(POSE // 2), read(POSE, scale=0.5), read(POSE, start=0.1), read(POSE, end=0.9)]
    requests += [read(None, POSE), read(POSE, POSE)]
    assert len({tuple(request.facts().items()) for request in requests}) == len(requests)


REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "scale alone": ((), {"scale": 0.5}, ("--control-scale", "--control-image")),
    "end alone": ((None,), {"end": 0.5}, ("--control-end", "--control-image")),
    "scale NaN": ((POSE,), {"scale": float("nan")}, ("--control-scale nan", "finite")),
    "scale infinite": ((POSE, POSE), {"scale": [1.0, float("inf")]}, ("--control-scale inf", "finite")),
    "scale in words": ((POSE,), {"scale": ["much"]}, ("--control-scale much", "finite")),
    "three scales for two images": ((POSE, POSE), {"scale": [1.0, 1.0, 1.0]}, ("--control-scale", "3", "2")),
    "start at the end": ((POSE,), {"start": 0.5, "end": 0.5}, ("--control-start 0.5", "--control-end 0.5", "below")),
    "start after the end": ((POSE,), {"start": 0.7, "end": 0.5}, ("--control-start 0.7", "below")),
    "negative start": ((POSE,), {"start": -0.1}, ("--control-start -0.1", "at least 0")),
    "end above 1": ((POSE,), {"end": 1.1}, ("--control-end 1.1", "at most 1")),
    "missing file": (("nowhere.png",), {}, ("--control-image nowhere.png", "cannot be read")),
    "palette": ((Image.fromarray(POSE).convert("P"),), {}, ("--control-image", "'P'", "RGB")),
    "two sizes": ((POSE, POSE[:2]), {}, ("--control-image", "4x6", "2x6")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_in_one_line(name: str) -> None:
    images, numbers, words = REFUSED[name]
    with pytest.raises(InvalidInputError) as caught:
        read(*images, **numbers)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_images_without_a_network_are_refused() -> None:
    check_control(None, bundle())
    check_control(read(POSE, POSE), bundle(controlnet=3, controlnet_2=3))
    check_control(read(POSE[:, :, :1]), bundle(controlnet=3))  # grey
    with pytest.raises(InvalidInputError, match=r"--control-image: bundle has no control network; .*--controlnet"):
        check_control(read(POSE), bundle())
    with pytest.raises(InvalidInputError, match=r"2 images for 1 control networks \(controlnet\)"):
        check_control(read(POSE, POSE), bundle(controlnet=3))
    with pytest.raises(InvalidInputError, match="has 4 channels, controlnet reads 3"):
        check_control(read(np.zeros((4, 6, 4), np.uint8)), bundle(controlnet=3))


def test_an_image_of_another_size_is_refused() -> None:
    schedule = betas_schedule("linear", 10, 1e-3, 1e-2)
    spec = DenoiserSpec("v", schedule, (4, 2, 3), make_plan("ddim", 2, schedule), latent_factor=2)
    check_control_size(read(POSE), spec)
    with pytest.raises(InvalidInputError, match=r"--control-image: is 6x4, the result is 4x6"):
        check_control_size(read(POSE.transpose(1, 0, 2)), spec)


# --- networks --------------------------------------------------------------------------------------------------


def test_pixels_are_between_0_and_1_and_grey_is_repeated() -> None:
    found = control_pixels(ControlImage(POSE[None]), 3, 2, "control_image")
    assert found.shape == (2, 3, 4, 6) and found.dtype == np.float32
    assert found[1, :, 0, 0].tolist() == [1.0, 0.0, np.float32(0.2)]
    grey = control_pixels(ControlImage(POSE[None, :, :, 2:]), 3, 1, "control_image")
    assert np.array_equal(grey, np.full((1, 3, 4, 6), 0.2, np.float32))
    with pytest.raises(InvalidInputError, match="control_image: 2 given for 3 samples"):
        control_pixels(ControlImage(np.stack([POSE, POSE])), 3, 3, "control_image")


class Recorder:
    """A network that records its inputs; a control network returns `value` times the mean of its image."""

    inputs = {"sample": np.dtype(np.float32), "control_image": np.dtype(np.float32)}

    def __init__(self, value: float = 0.0) -> None:
        self.value, self.seen = value, list[dict[str, np.ndarray]]()

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self.seen.append(inputs)
        return inputs["sample"]

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.run(inputs)
        means = inputs["control_image"].mean(axis=(1, 2, 3), keepdims=True)
        return {name: np.float32(self.value) * means for name in residual_names(2)}


def test_residuals_are_scaled_and_summed_and_plain_evaluations_are_those_without_control() -> None:
    images = [np.full((2, 4, 6, 3), (255, 51)[k], np.uint8) for k in range(2)]
    images[0][1] = 0  # the second sample's
    wanted = read(*images, scale=[0.5, 2.0], start=[0.0, 0.5], end=[0.75, 0.75])
    plain, controlled, networks = Recorder(), Recorder(), [Recorder(1.0), Recorder(10.0)]
    control = make_control(wanted, controlled, networks, [3, 3], 2)
    network = control.attached(SimpleNamespace(inputs=plain.inputs, run=plain.run), 4)
    x = np.arange(4, dtype=np.float32).reshape(4, 1)  # both halves of guidance
    for _ in range(4):
        assert network.run({"sample": x}) is x
    assert [len(one.seen) for one in (plain, controlled, *networks)] == [1, 3, 3, 1]  # nothing in the last evaluation
    assert list(controlled.seen[0]) == [
        "sample",
        "down_block_residual_0",
        "down_block_residual_1",
        "mid_block_residual",
    ]
    first, _, third = (seen["mid_block_residual"].ravel() for seen in controlled.seen)
    assert np.allclose(first, [0.5, 0.0, 0.5, 0.0])
    assert np.allclose(third, [0.5 + 2 * 10 * 0.2, 2 * 10 * 0.2] * 2)


def test_a_part_keeps_the_images_of_its_samples() -> None:
    images = np.stack([POSE, POSE // 5])
    control = make_control(read(images), Recorder(), [Recorder()], [3], 2)
    part = control.part(np.array([1]))
    assert np.array_equal(part.images[0], control.images[0][1:])
