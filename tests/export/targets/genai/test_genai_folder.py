"""OpenVINO GenAI opens the folder of target `genai` and draws the images of our runtime from the same noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffpress as dp
from diffpress.cli.main import main
from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.sampler import noise_for
from tests.against_diffusers import with_short_plan
from tests.pipelines import tiny_pipeline

genai = pytest.importorskip("openvino_genai", reason="openvino-genai is not installed")
PROMPT, SEED = "a photo of a cat", 3


class SameNoise(genai.Generator):  # type: ignore[misc, name-defined]
    """Generator of GenAI that returns the noise of our runtime: the k-th draw is stream k of the seed."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0

    def randn_tensor(self, shape: Any) -> Any:
        import openvino as ov

        noise = noise_for([SEED], tuple(shape)[1:], stream=self.drawn)
        self.drawn += 1
        return ov.Tensor(np.ascontiguousarray(noise))


def exported(kind: str, folder: Path, **config: Any) -> Bundle:
    checkpoint = with_short_plan(dp.load(tiny_pipeline(kind, folder / "pipeline")), steps=3)
    return dp.export(checkpoint, folder / "bundle", targets=["genai"], threads=1, **config)


def images_of_both(bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """Return the images uint8 [H, W, 3] of GenAI and of our runtime."""
    arguments = json.loads((bundle.path / "genai" / "generate.json").read_text())
    pipe = genai.Text2ImagePipeline(str(bundle.path / "genai"), "CPU")
    theirs = np.array(pipe.generate(PROMPT, generator=SameNoise(), **arguments).data[0])
    with dp.Pipeline(bundle, engine="openvino", threads=1) as own:
        return theirs, np.asarray(own(PROMPT, seeds=[SEED])[0])


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other.astype(float)).mean()))


def test_genai_draws_the_same_image_and_the_export_is_reproducible(tmp_path: Path) -> None:
    bundle = exported("sd", tmp_path)
    theirs, ours = images_of_both(bundle)
    assert psnr_db(theirs, ours) > 40.0 and ours.std() > 10
    assert bundle.manifest["genai"]["scheduler"] == "DDIMScheduler"
    again = exported("sd", tmp_path / "again")
    assert again.manifest["files"] == bundle.manifest["files"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "sd3", "lcm"])
def test_genai_draws_the_same_image_for_every_pipeline(kind: str, tmp_path: Path) -> None:
    theirs, ours = images_of_both(exported(kind, tmp_path))
    assert psnr_db(theirs, ours) > 40.0 and ours.std() > 10


@pytest.mark.slow
def test_genai_draws_with_a_pruned_and_quantized_network(tmp_path: Path) -> None:
    checkpoint = with_short_plan(dp.load(tiny_pipeline("sd", tmp_path / "pipeline")), steps=3)
    stages = [dp.Prune(method="magnitude", ratio=0.25), QuantizeConfig(format="int8", samples=8)]
    small = dp.compress(checkpoint, stages, out=tmp_path / "work")
    assert isinstance(small, Checkpoint)
    bundle = dp.export(small, tmp_path / "bundle", targets=["genai"], threads=1, nearest_plan=True)
    plain = bundle.spec.with_plan(bundle.spec.plan.without_corrections)
    theirs, ours = images_of_both(Bundle(bundle.path, plain, bundle.manifest))
    assert psnr_db(theirs, ours) > 25.0  # our engine rewrites integer layers after it read the graph; GenAI does not


def test_models_without_a_pipeline_of_genai_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert main(["export", "calib_data/teacher", "--targets", "genai", "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "target genai: OpenVINO GenAI cannot open" in message and message.count("\n") == 1 and not out.exists()
