"""POST /v1/sample and /v1/images/generations: the images are those of a Pipeline, whatever they are batched with."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from diffpress.runtime.pipeline import Pipeline
from diffpress.serve.settings import Batching, Limits
from tests.serve.conftest import arrays, decoded, events, make_service

STATE_TOLERANCE = 1e-4  # of a network whose kernels depend on the batch size


def pixels(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def sample(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/sample", json=body)


def test_images_are_those_of_a_pipeline_with_the_same_seed(client: TestClient, tiny_pipeline: Pipeline) -> None:
    body = {"seed": 5, "n": 3, "labels": 1, "steps": 6, "guidance": 2.0, "solver": "unipc_2"}
    expected = tiny_pipeline(labels=1, seeds=range(5, 8), steps=6, guidance=2.0, solver="unipc_2")
    found = sample(client, **body)
    assert [image["seed"] for image in found.json()["images"]] == [5, 6, 7]
    for image, pil in zip(found.json()["images"], expected, strict=True):
        np.testing.assert_array_equal(pixels(image["data"]), np.asarray(pil))
    again = sample(client, **body).json()
    assert again["images"] == found.json()["images"]


def test_images_do_not_depend_on_what_they_are_batched_with(
    tiny: Path, client_of: Callable[..., TestClient], tiny_pipeline: Pipeline
) -> None:
    client = client_of(make_service(tiny, batching=Batching(8, 50.0, 64)))
    bodies: list[dict[str, Any]] = [
        {"seed": seed, "labels": seed % 3, "n": 1 + seed % 2, "format": "npy"} for seed in range(20)
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        responses = list(pool.map(lambda body: sample(client, **body), bodies))
    for body, response in zip(bodies, responses, strict=True):
        seeds = range(body["seed"], body["seed"] + body["n"])
        conditions = tiny_pipeline.conditions(len(seeds), labels=[body["labels"]] * len(seeds))
        (expected,) = tiny_pipeline.images(seeds, conditions)
        np.testing.assert_array_equal(np.stack(arrays(response)), expected)  # elementwise graph: bit-equal
    batches = [size for response in responses for size in response.json()["timing"]["batches"]]
    assert max(batches) == 8 and set(batches) <= {1, 2, 4, 8}


def test_prompts_of_several_clients_share_a_batch_and_keep_their_images(
    sd_bundle: Path, client_of: Callable[..., TestClient]
) -> None:
    client = client_of(make_service(sd_bundle, batching=Batching(4, 200.0, 64)))
    bodies: list[dict[str, Any]] = [
        {"prompt": "a red cat", "seed": 1},
        {"prompt": "a dog", "seed": 2},
        {"prompt": ["a photo of a cat", "a"], "seeds": [9, 3]},
    ]
    shared = {"steps": 3, "guidance": 4.0, "negative_prompt": "red", "format": "npy"}
    with ThreadPoolExecutor(3) as pool:
        responses = list(pool.map(lambda body: sample(client, **body, **shared), bodies))
    assert {size for response in responses for size in response.json()["timing"]["batches"]} == {4}
    found = np.stack([array for response in responses for array in arrays(response)])
    with Pipeline(sd_bundle, "onnxruntime", threads=1) as pipe:
        spec = client_spec(pipe, steps=3, guidance=4.0)
        prompts = ["a red cat", "a dog", "a photo of a cat", "a"]
        each = []
        for prompt, seed in zip(prompts, (1, 2, 9, 3), strict=True):
            conditions = pipe.conditions(1, spec, prompts=[prompt], negatives=["red"])
            each += list(pipe.images([seed], conditions, spec))
    np.testing.assert_allclose(found, np.concatenate(each), rtol=0, atol=STATE_TOLERANCE)
    assert np.abs(found[0] - found[1]).max() > 100 * STATE_TOLERANCE, "prompts and seeds matter"


def client_spec(pipe: Pipeline, steps: int, guidance: float) -> Any:
    from diffpress.runtime.requested_plan import requested_spec

    return requested_spec(pipe.spec, steps, guidance=guidance)


def test_another_size_is_followed_and_a_truncated_prompt_is_told(
    sd_bundle: Path, client_of: Callable[..., TestClient]
) -> None:
    client = client_of(make_service(sd_bundle, limits=Limits(side=32)))
    body = {"prompt": "a cat " * 20, "seed": 1, "steps": 1, "height": 16, "width": 32}
    found = sample(client, **body).json()
    assert pixels(found["images"][0]["data"]).shape == (16, 32, 3)
    (warning,) = found["warnings"]
    assert "text_encoder reads 16 tokens and left out 'a cat a cat" in warning
    assert "multiples of" in sample(client, **{**body, "height": 17}).json()["error"]["message"]
    assert "width 48: must lie in 1..32" in sample(client, **{**body, "width": 48}).json()["error"]["message"]
    assert "give a prompt" in sample(client).json()["error"]["message"]
    plain = sample(client, prompt="a", negative_prompt="b", guidance=1.0).json()["error"]["message"]
    assert "a negative prompt needs guidance above 1" in plain


def test_a_stream_has_every_step_of_every_image_with_previews(client: TestClient, tiny_pipeline: Pipeline) -> None:
    found = events(sample(client, seed=4, n=2, labels=2, steps=5, stream=True, format="npy").text)
    steps = [data for name, data in found if name == "step"]
    assert sorted((data["index"], data["step"]) for data in steps) == [(i, k) for i in (0, 1) for k in range(1, 6)]
    assert all(data["steps"] == 5 and pixels(data["preview"]).shape == (8, 8) for data in steps)
    images = {data["index"]: decoded(data["data"]) for name, data in found if name == "image"}
    seen: list[np.ndarray] = []
    tiny_pipeline(labels=2, seeds=[4, 5], steps=5, callback=lambda step: seen.append(step.x))
    np.testing.assert_array_equal(np.stack([images[0], images[1]]), seen[-1])
    name, summary = found[-1]
    assert name == "done" and summary["plan"]["solver"] == "dpmpp_2m" and summary["timing"]["batches"] == [2, 2]


def test_previews_are_as_many_as_were_asked_for(client: TestClient) -> None:
    for every, expected in ((0, 0), (2, 2), (3, 1), (5, 1)):
        found = events(sample(client, steps=5, stream=True, previews=every).text)
        assert sum(name == "step" and data["preview"] is not None for name, data in found) == expected
        assert sum(name == "step" for name, _ in found) == 5


def test_openai_shaped_requests_get_openai_shaped_images(client: TestClient, tiny_pipeline: Pipeline) -> None:
    body = {"prompt": "", "model": "default", "n": 2, "size": "8x8", "response_format": "b64_json", "seed": 11}
    found = client.post("/v1/images/generations", json={**body, "labels": [2, 0]}).json()
    assert found["size"] == "8x8" and found["created"] > 1e9 and found["model"] == "tiny_bundle"
    for entry, pil in zip(found["data"], tiny_pipeline(labels=[2, 0], seeds=[11, 12]), strict=True):
        np.testing.assert_array_equal(pixels(entry["b64_json"]), np.asarray(pil))


def test_jpeg_and_webp_are_what_they_are_called(client: TestClient) -> None:
    for form in ("jpeg", "webp"):
        data = sample(client, format=form).json()["images"][0]["data"]
        assert Image.open(io.BytesIO(base64.b64decode(data))).format == form.upper()


def test_samples_that_are_no_pictures_are_arrays(tmp_path: Path, client_of: Callable[..., TestClient]) -> None:
    client = client_of(make_service(points_bundle(tmp_path)))
    found = sample(client, n=2, seed=0)
    assert [array.shape for array in arrays(found)] == [(2,), (2,)]
    assert "are no pictures; use npy" in sample(client, format="png").json()["error"]["message"]
    openai = client.post("/v1/images/generations", json={"prompt": ""})
    assert openai.status_code == 400 and "are no pictures" in openai.json()["error"]["message"]
    assert len(events(sample(client, stream=True, steps=3).text)) == 5  # steps without previews, image, done


def points_bundle(folder: Path) -> Path:
    """Write a bundle of an unconditional model of points in the plane, whose noise prediction is the sample."""
    import onnx
    from onnx import TensorProto, helper

    from diffpress.runtime.bundle import seal
    from diffpress.runtime.noise_schedule import betas_schedule
    from diffpress.runtime.sampling_plan import make_plan
    from diffpress.runtime.spec import DenoiserSpec

    schedule = betas_schedule("squaredcos_cap_v2", 20)
    spec = DenoiserSpec("epsilon", schedule, (2,), make_plan("ddim", 4, schedule, clip=False))
    batch: list[str | int | None] = ["batch", 2]
    times = helper.make_node("Cast", ["timestep"], ["unused"], to=TensorProto.FLOAT)
    node = helper.make_node("Identity", ["sample"], ["out_sample"])
    graph = helper.make_graph(
        [times, node],
        "points",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, batch),
            helper.make_tensor_value_info("timestep", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, batch)],
    )
    bundle = folder / "points"
    bundle.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, bundle / "denoiser.onnx")
    content = {"spec": spec.to_json(), "graphs": {"denoiser": {"file": "denoiser.onnx"}}, "engines": []}
    seal(bundle, {**content, "requires": ["sample_rank"]})
    return bundle


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/images/variations"])
def test_routes_that_need_an_image_are_refused_with_the_reason(client: TestClient, path: str) -> None:
    response = client.post(path, files={"image": b"x"})
    assert response.status_code == 404 and "takes no input images" in response.json()["error"]["message"]
