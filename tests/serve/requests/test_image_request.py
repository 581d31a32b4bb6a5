"""Bodies of /v1/sample: what they mean, and what is refused with the name of the field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.bundle import load_bundle, seal
from diffpress.runtime.conditioning import Conditioning, TensorInput
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.requested_plan import requested_spec
from diffpress.runtime.sampler import MAX_SEED
from diffpress.serve.models import Model, Source
from diffpress.serve.requests.image_request import RANDOM_SEEDS, ImageRequest, image_request
from diffpress.serve.settings import Limits

Request = Callable[..., ImageRequest]
TINY_SPEC = load_bundle(Path(__file__).parents[2] / "runtime" / "tiny_bundle").spec


@pytest.fixture
def request_of(tiny: Path) -> Request:
    model = Model(Source(tiny), EngineOptions(), 8)
    return lambda limits=Limits(), **body: image_request(body, model, limits)  # noqa: B008


def test_what_is_left_out_follows_the_bundle(request_of: Request) -> None:
    found = request_of()
    assert found.model == "tiny_bundle" and found.spec == TINY_SPEC and found.labels == (0,)
    assert len(found) == 1 and 0 <= found.seeds[0] < RANDOM_SEEDS and found.format == "png" and not found.stream
    assert request_of().seeds != found.seeds  # random


def test_image_i_starts_from_seed_plus_i_and_takes_the_classes_in_turn(request_of: Request) -> None:
    found = request_of(n=4, seed=7)
    assert found.seeds == (7, 8, 9, 10) and found.labels == (0, 1, 2, 0)
    assert request_of(seeds=[5, 2], labels=[2, 1]).labels == (2, 1)
    assert request_of(labels=[2, 2, 1]).labels == (2, 2, 1)
    assert request_of(seeds=MAX_SEED).seeds == (MAX_SEED,)


def test_the_plan_is_the_one_that_the_runtime_makes(request_of: Request) -> None:
    found = request_of(steps=5, solver="unipc_2", spacing="karras", guidance=2.5).spec
    assert found == requested_spec(TINY_SPEC, 5, "unipc_2", "karras", 2.5)


def test_further_entries_of_the_plan_are_followed(request_of: Request) -> None:
    plan = request_of(solver="ddim", plan={"timesteps": [40, 20, 3], "eta": 0.5, "clip": False}).spec.plan
    assert plan.timesteps == (40.0, 20.0, 3.0) and plan.eta == 0.5 and not plan.clip and plan.solver == "ddim"
    rescaled = request_of(guidance=3.0, plan={"guidance_rescale": 0.7, "guidance_interval": [0.1, None]}).spec.plan
    assert rescaled.guidance_rescale == 0.7 and rescaled.guidance_interval == (0.1, None)
    assert request_of(plan={"threshold": {"ratio": 0.9}}).spec.plan.threshold is not None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"step": 3}, "unknown field 'step': did you mean 'steps'"),
        ({"path": "/etc/passwd"}, "unknown field 'path'"),
        ({"steps": 0}, "steps 0: must lie in 1..200"),
        ({"steps": 201}, "steps 201: must lie in 1..200"),
        ({"steps": 51}, "51 steps"),
        ({"steps": "4"}, "steps: expected an integer, found text"),
        ({"steps": True}, "steps: expected an integer, found true or false"),
        ({"steps": 4.0}, "steps: expected an integer, found a number"),
        ({"solver": "dpmpp"}, "unknown solver 'dpmpp'"),
        ({"spacing": "even"}, "unknown timestep spacing 'even'"),
        ({"guidance": 101}, "guidance 101: must lie in -100..100"),
        ({"guidance": [2]}, "guidance: expected a number, found a list"),
        ({"n": 17}, "n 17: must lie in 1..16"),
        ({"labels": [0] * 17}, "labels: 17 values; 1 to 16 are accepted"),
        ({"labels": 3}, "labels 3: must lie in 0..2"),
        ({"labels": [0, 1], "n": 3}, "labels: 2 given for 3 images"),
        ({"seed": -1}, "seed -1: must lie in"),
        ({"seed": MAX_SEED, "n": 2}, "must lie in 0.."),
        ({"seeds": [1, 2], "n": 3}, "seeds: has one seed for each image; leave out seed and n"),
        ({"seeds": [1], "seed": 3}, "leave out seed and n"),
        ({"seeds": []}, "seeds: 0 values"),
        ({"prompt": "a"}, "prompt: the model is not conditioned on text; give labels of 0..2"),
        ({"conditioning": {"x": [1]}}, "conditioning: the model is not conditioned on tensors"),
        ({"height": 16, "width": 16}, "size 16x16: this bundle's graph makes 8x8 images only"),
        ({"height": 8}, "height and width: give both or none"),
        ({"height": 4096, "width": 8}, "height 4096: must lie in 1..2048"),
        ({"format": "gif"}, "format 'gif': choose from png, jpeg, webp, npy"),
        ({"previews": 1}, "previews: only a streamed request has them"),
        ({"stream": "yes"}, "stream: expected true or false"),
        ({"deadline_ms": 0}, "deadline_ms 0: must lie in"),
        ({"plan": []}, "plan: expected a JSON object"),
        ({"plan": {"solver": "ddim"}}, "plan: unknown entry 'solver'"),
        ({"plan": {"timesteps": [3, 20]}}, "strictly descending"),
        ({"plan": {"timesteps": "321"}}, "plan.timesteps: is of the wrong type"),
        ({"plan": {"timesteps": [50]}}, "timestep 50 lies beyond the last one, 49"),
        ({"plan": {"timesteps": [20.5]}}, "this network takes integer timesteps"),
        ({"plan": {"timesteps": [20]}, "steps": 1}, "give timesteps, or steps and spacing, not both"),
        ({"plan": {"eta": 2}}, "eta 2.0 must lie in"),
        ({"plan": {"stride": 10**400}}, "plan"),
        ({"plan": {"threshold": {"ratio": "x"}}}, "plan"),
    ],
)
def test_a_wrong_body_is_refused_in_one_line(request_of: Request, body: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        request_of(**body)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_more_timesteps_than_the_limit_are_refused(request_of: Request) -> None:
    with pytest.raises(InvalidInputError, match=r"plan.timesteps: 3 steps; at most 2 are made"):
        request_of(Limits(steps=2), plan={"timesteps": [3, 2, 1]})


def test_only_requests_of_one_plan_and_kind_share_a_key(request_of: Request) -> None:
    key = request_of(seed=1, labels=0).key
    assert request_of(seed=2, labels=1, format="npy", steps=8).key == key
    others = [request_of(steps=3), request_of(guidance=2.0), request_of(stream=True), request_of(plan={"clip": False})]
    assert len({key, *(other.key for other in others)}) == 5


def test_guidance_of_a_model_without_conditions_is_refused_before_it_runs(tiny: Path, tmp_path: Path) -> None:
    model = changed_tiny(tiny, tmp_path, Conditioning())
    with pytest.raises(InvalidInputError, match="the model is not conditional; use guidance 1"):
        image_request({"guidance": 2.0}, model, Limits())


def test_tensors_get_one_row_per_image(tiny: Path, tmp_path: Path) -> None:
    inputs = {"state": TensorInput((2,)), "task": TensorInput((), "int64")}
    model = changed_tiny(tiny, tmp_path, Conditioning("tensors", tensors=inputs))
    found = image_request({"conditioning": {"state": [[1, 2], [3, 4.5]], "task": 7}}, model, Limits())
    assert len(found) == 2
    np.testing.assert_array_equal(found.tensors["state"], np.array([[1, 2], [3, 4.5]], np.float32))
    np.testing.assert_array_equal(found.tensors["task"], np.array([7, 7]))
    for state in ([[1, 2], [3]], [[1, "x"]], [[1, 10**400]], [[1, 1e300]], {"a": 1}, [1, 2, 3], None):
        with pytest.raises(InvalidInputError, match="conditioning"):
            image_request({"conditioning": {"state": state, "task": 7}}, model, Limits())
    with pytest.raises(InvalidInputError, match="conditioned on tensors"):
        image_request({}, model, Limits())


def changed_tiny(tiny: Path, folder: Path, conditioning: Conditioning) -> Model:
    """Return the tiny bundle with another conditioning in its spec; its graph is not opened."""
    bundle = folder / "changed"
    bundle.mkdir()
    (bundle / "denoiser.onnx").write_bytes((tiny / "denoiser.onnx").read_bytes())
    spec = replace(TINY_SPEC, conditioning=conditioning)
    content = {"spec": spec.to_json(), "graphs": {"denoiser": {"file": "denoiser.onnx"}}, "engines": []}
    seal(bundle, content | {"requires": ["tensor_conditioning"] if conditioning.tensors else []})
    return Model(Source(bundle), EngineOptions(), 8)
