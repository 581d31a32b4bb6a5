"""The exported page in headless Chromium: its pixels are those of the Python runtime."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.evaluation.metrics import mean_sqnr_db
from diffpress.export.graph.model import Graph
from diffpress.export.targets.web.onnxruntime_web import PACKAGE, VERSION
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.sampler import noise_for
from tests.browser import ISOLATED, Browser, chromium, served
from tests.export.oracle import exported

pytestmark = pytest.mark.slow
MAX_ABS, SQNR_DB = 1e-3, 40.0
WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")

# a request and noise in base64 -> pixels in base64, and their shape
SAMPLE = """async (request, noise) => {
    const { openSampler } = await import("./sampler.js");
    const engine = new URLSearchParams(location.search).get("engine") ?? undefined;
    globalThis.sampler ??= await openSampler({ engine });
    const bytes = Uint8Array.from(atob(noise), (letter) => letter.charCodeAt(0));
    if (noise) request.noise = new Float32Array(bytes.buffer);
    const { pixels, height, width, channels } = await sampler.sample(request);
    const text = Array.from(new Uint8Array(pixels.buffer), (byte) => String.fromCharCode(byte)).join("");
    return { data: btoa(text), shape: [height, width, channels] };
}"""
UNNAMED = """[...document.querySelectorAll("input, textarea, button")]
    .filter((field) => !field.labels?.length && !field.textContent.trim()).length"""


@pytest.fixture(scope="session")
def web_runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The npm package."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    chromium()
    folder = tmp_path_factory.mktemp("npm")
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", f"{PACKAGE}@{VERSION}"]
    subprocess.run(install, cwd=folder, check=True)
    return folder / "node_modules" / PACKAGE


@pytest.fixture(scope="session")
def bundle(unet: Checkpoint, unet_graph: Graph, web_runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("web") / "bundle"
    return exported(unet, folder, ["web"], float_graph=unet_graph, web_runtime=str(web_runtime), threads=1)


@contextmanager
def opened(bundle: Bundle, folder: Path, query: str = "", *flags: str, **headers: str) -> Iterator[Browser]:
    """Open the page of a bundle, and wait until the model is loaded."""
    with served(bundle.path / "web", headers) as url, Browser(folder / "profile", *flags) as browser:
        browser.open(url + query)
        browser.until("/Ready|not loaded/.test(document.getElementById('status').textContent)")
        yield browser
        assert all(request.startswith(url) for request in browser.requests())


def sampled(browser: Browser, **request: Any) -> np.ndarray:
    """Return the image of a request to sampler.js, float32 [H, W, C]; `noise` is an array."""
    noise = request.pop("noise", None)
    given = "" if noise is None else base64.b64encode(np.asarray(noise, np.float32).tobytes()).decode("ascii")
    found = browser.evaluate(f"({SAMPLE})({json.dumps(request)}, {json.dumps(given)})")
    return np.frombuffer(base64.b64decode(found["data"]), np.float32).reshape(found["shape"])


def expected(bundle: Bundle, seed: int, **arguments: Any) -> np.ndarray:
    """Return the image that the Python runtime makes of the same request, float32 [H, W, C] in 0..1."""
    with Pipeline(bundle, "onnxruntime", threads=1) as pipe:
        conditions = pipe.conditions(1, **arguments)
        (image,) = next(pipe.images([seed], conditions))
    low, high = bundle.spec.data_range
    unit: np.ndarray = np.clip((image - low) / (high - low), 0.0, 1.0).transpose(1, 2, 0)
    return unit


def shown(browser: Browser) -> list[np.ndarray]:
    """Return the pixels of the images on the page, uint8 [H, W, C]."""
    sources = browser.evaluate("[...document.querySelectorAll('#images img')].map((image) => image.src)")
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))) for source in sources]


def submit(browser: Browser, **fields: object) -> None:
    """Fill the form and send it, with the keyboard's Enter in its last field."""
    for name, value in fields.items():
        browser.evaluate(f"document.forms[0].elements[{json.dumps(name)}].value = {json.dumps(str(value))}")
    browser.evaluate("document.forms[0].elements.seed.focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
    browser.until("/Finished|failed/.test(document.getElementById('status').textContent)")


def test_injected_noise_gives_the_pixels_of_python(bundle: Bundle, tmp_path: Path) -> None:
    with opened(bundle, tmp_path) as browser:
        assert "WASM, 1 thread," in browser.text()
        for seed, label in ((0, 0), (5, 2)):
            noise = noise_for([seed], bundle.spec.sample_shape)
            found = sampled(browser, noise=noise, label=label)
            assert found.std() > 0.05
            np.testing.assert_allclose(found, expected(bundle, seed, labels=[label]), atol=MAX_ABS)
            np.testing.assert_allclose(sampled(browser, seed=seed, label=label), found, atol=MAX_ABS)
        assert browser.problems() == []


def test_the_form_samples_what_python_samples_from_the_same_seeds(bundle: Bundle, tmp_path: Path) -> None:
    with opened(bundle, tmp_path) as browser:
        submit(browser, n=3, seed=7)
        found, problems = shown(browser), browser.problems()
        assert browser.evaluate("document.getElementById('status').textContent").startswith("Finished, ")
        names = browser.evaluate("[...document.querySelectorAll('#images img')].map((image) => image.alt)")
        assert browser.evaluate(UNNAMED) == 0
    with Pipeline(bundle, "onnxruntime", threads=1) as pipe:
        images = [np.asarray(image.convert("RGB")) for image in pipe(seeds=[7, 8, 9])]
    assert names == ["Class 0, seed 7", "Class 1, seed 8", "Class 2, seed 9"] and problems == []
    for pixels, image in zip(found, images, strict=True):
        assert np.abs(pixels[..., :3].astype(int) - image).max() <= 1 and (pixels[..., 3] == 255).all()


def test_stop_ends_sampling_and_the_page_is_ready_again(bundle: Bundle, tmp_path: Path) -> None:
    with opened(bundle, tmp_path) as browser:
        browser.evaluate("document.forms[0].elements.n.value = 64, document.querySelector('button').click()")
        browser.until("document.querySelectorAll('#images img').length > 0")
        browser.evaluate("document.getElementById('stop').click()")
        browser.until("document.getElementById('status').textContent === 'Ready'")
        assert 0 < len(shown(browser)) < 64 and browser.problems() == []
        submit(browser, n=1, seed=3, label=1)
        assert len(shown(browser)) == 1


def test_a_cross_origin_isolated_page_uses_threads(bundle: Bundle, tmp_path: Path) -> None:
    with opened(bundle, tmp_path, **ISOLATED) as browser:
        assert browser.evaluate("self.crossOriginIsolated")
        assert browser.evaluate("navigator.hardwareConcurrency") == 1 or "threads," in browser.text()
        found = sampled(browser, seed=3, label=1)
        np.testing.assert_allclose(found, expected(bundle, 3, labels=[1]), atol=MAX_ABS)
        assert browser.problems() == []


def test_webgpu_gives_the_pixels_of_python(bundle: Bundle, tmp_path: Path) -> None:
    with opened(bundle, tmp_path, "?engine=webgpu", *WEBGPU) as browser:
        if not browser.evaluate("navigator.gpu?.requestAdapter().then(Boolean) ?? false"):
            pytest.skip("Chromium has no WebGPU adapter here, not even in software")
        assert "WebGPU" in browser.text()
        np.testing.assert_allclose(sampled(browser, seed=3, label=1), expected(bundle, 3, labels=[1]), atol=MAX_ABS)


def test_int8_pixels_are_close_to_those_of_python(
    unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization], web_runtime: Path, tmp_path: Path
) -> None:
    quantized = unet.evolve(quantization=scales(unet, outputs=True))
    bundle = exported(
        quantized, tmp_path / "int8", ["web"], float_graph=unet_graph, web_runtime=str(web_runtime), threads=1
    )
    assert bundle.manifest["graphs"]["denoiser"]["precision"] == "int8"
    with opened(bundle, tmp_path) as browser:
        found = np.stack([sampled(browser, seed=seed, label=1) for seed in range(3)])
    images = np.stack([expected(bundle, seed, labels=[1]) for seed in range(3)])
    assert mean_sqnr_db(images, found) >= SQNR_DB


def test_a_prompt_gives_the_pixels_of_python(
    tiny_folder: Callable[..., Path], web_runtime: Path, tmp_path: Path
) -> None:
    from diffpress.api import export

    bundle = export(tiny_folder("sd"), tmp_path / "sd", targets=["web"], web_runtime=web_runtime, threads=1)
    with opened(bundle, tmp_path) as browser:
        text = browser.text()
        assert "Negative prompt" in text and "Guidance" in text and "Class" not in text
        found = sampled(browser, seed=2, prompt="a red house", negative="fog")
        target = expected(bundle, 2, prompts=["a red house"], negatives=["fog"])
        np.testing.assert_allclose(found, target, atol=MAX_ABS)
        plain = sampled(browser, seed=2, prompt="a red house")
        np.testing.assert_allclose(plain, expected(bundle, 2, prompts=["a red house"]), atol=MAX_ABS)
        assert np.abs(plain - found).max() > MAX_ABS


def test_an_incomplete_folder_is_an_error_on_the_page(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / "web" / "sampler.onnx").rename(tmp_path / "sampler.onnx")
    try:
        with opened(bundle, tmp_path) as browser:
            assert "sampler.onnx: status 404; serve the whole folder" in browser.text()
            assert browser.evaluate("document.querySelector('button[type=submit]').disabled")
    finally:
        (tmp_path / "sampler.onnx").rename(bundle.path / "web" / "sampler.onnx")
