"""The page in a browser: headless Chromium from npm, used with the keyboard alone."""

from __future__ import annotations

import base64
import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffpress.runtime.pipeline import Pipeline
from tests.serve.test_server import Server, serve  # noqa: F401

CHROMIUM = ("@sparticuz/chromium@153.0.0", "puppeteer-core@25.16.0")
SCRIPT = Path(__file__).with_name("page.mjs")


@pytest.mark.slow
def test_the_page_samples_two_bundles_side_by_side(
    tiny: Path,
    tmp_path: Path,
    serve: Callable[..., Server],  # noqa: F811
) -> None:
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", *CHROMIUM]
    subprocess.run(install, cwd=tmp_path, check=True)
    server = serve(f"first={tiny}", f"second={tiny}")
    fields = {"second": "second", "n": "2", "seed": "3", "steps": "5", "label": "1"}
    command = ["node", SCRIPT, tmp_path, server.url, tmp_path / "page.png", json.dumps(fields)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["error"] and found["problems"] == []
    assert found["status"].startswith("Finished, seed 3. first: ") and found["titles"] == ["first", "second"]
    assert all("5 steps of dpmpp_2m" in facts and "ms per image" in facts for facts in found["facts"])
    with Pipeline(tiny, "onnxruntime", threads=1) as pipe:
        expected = [np.asarray(image) for image in pipe(labels=1, seeds=[3, 4], steps=5)]
    assert len(found["images"]) == 4
    for index, image in enumerate(found["images"]):
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), expected[index % 2])
        assert image["alt"].endswith(f"seed {3 + index % 2}")
    assert found["shown"] > 4, "previews were shown before the images"
    own = [url for url in found["requests"] if not url.startswith("data:")]
    assert len(own) == 4 and all(url.startswith(server.url) for url in own)
    assert set(fields) <= set(found["reached"]) and found["reached"][-1] == "Sample"
    assert len(found["names"]) > 9 and all(found["names"])
    assert (tmp_path / "page.png").stat().st_size > 1000
