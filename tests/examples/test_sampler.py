"""examples/sampler: clients of sampler.onnx that import nothing of diffpress draw the runtime's images."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import diffpress as dp
from diffpress.compress.config import ExportConfig
from diffpress.export.targets.sampler.target import sampler_content
from diffpress.runtime.bundle import Bundle, load_bundle
from diffpress.runtime.network_inputs import class_conditioning
from diffpress.runtime.sampling_plan import make_plan
from tests.export.targets.sampler.unsealed import SHAPE, nonlinear_graph, unsealed_bundle
from tests.runtime.fused_specs import CLASSES, spec_of

FOLDER = Path(__file__).parents[2] / "examples" / "sampler"
CONFIG = ExportConfig(targets=("triton",), threads=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A class-conditional bundle with guidance, and its sampler."""
    spec = replace(spec_of("dpmpp_2m", "v", conditioning=CLASSES, guidance=2.0), sample_shape=SHAPE)
    made = unsealed_bundle(tmp_path_factory.mktemp("bundle"), nonlinear_graph(), spec)
    assert "parity_failures" not in sampler_content(made, CONFIG)
    return made


def run(*words: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(*words: object) -> None:
    run(sys.executable, FOLDER / "python_sampler.py", *words)


def runtime_images(bundle: Bundle, labels: list[int], seeds: list[int], guidance: float) -> np.ndarray:
    """Return images [N, height, width, C] in 0..1."""
    spec = bundle.spec.with_plan(replace(bundle.spec.plan, guidance=guidance))
    with dp.Pipeline(bundle, "onnxruntime", 1) as pipe:
        samples = np.concatenate(list(pipe.images(seeds, class_conditioning(spec, np.array(labels)), spec)))
    return (samples.transpose(0, 2, 3, 1) + 1) / 2


def test_the_clients_import_nothing_of_diffpress() -> None:
    for file in FOLDER.glob("*.py"):
        names = set[str]()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module))
        assert "numpy" in names and not any(name.startswith("diffpress") for name in names)


def test_python_draws_the_images_of_the_runtime_from_the_same_seeds(bundle: Bundle, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "images.png"
    words = ("--label", 2, "--seed", 7, "--count", 3, "--guidance", 3.5, "--raw", raw, "--out", out)
    python(bundle.path, *words)
    images = np.fromfile(raw, np.float32).reshape(3, 3, 4, 3)
    expected = runtime_images(bundle, [2, 2, 2], [7, 8, 9], 3.5)
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5)
    pixels = np.asarray(Image.open(out))
    assert np.array_equal(pixels, np.round(np.concatenate(list(images), axis=1) * 255))


def test_python_draws_a_prompt(sd_bundle: Path, tmp_path: Path) -> None:
    shared, folder = load_bundle(sd_bundle), tmp_path / "sd"
    shutil.copytree(sd_bundle, folder)
    plan = make_plan("ddim", 2, shared.spec.schedule, guidance=2.0, clip=False)
    bundle = replace(shared, path=folder, spec=shared.spec.with_plan(plan))
    assert "parity_failures" not in sampler_content(bundle, CONFIG)
    python(folder, "--prompt", "a cat", "--negative-prompt", "dog", "--seed", 5, "--raw", tmp_path / "raw")
    with dp.Pipeline(bundle, "onnxruntime", 1) as pipe:
        conditions = pipe.conditions(1, bundle.spec, prompts=["a cat"], negatives=["dog"])
        (samples,) = pipe.images([5], conditions, bundle.spec)
    images = np.fromfile(tmp_path / "raw", np.float32).reshape(1, 16, 16, 3)
    np.testing.assert_allclose(images, (samples.transpose(0, 2, 3, 1) + 1) / 2, rtol=0, atol=1e-3)


# --- Node ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node() -> str:
    """Return the program, if it and the example's package are installed."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("node is not installed")
    if not (FOLDER / "node" / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip("onnxruntime-node is missing: run 'npm install --ignore-scripts' in examples/sampler/node")
    return found


def test_node_draws_the_pixels_of_python(node: str, bundle: Bundle, tmp_path: Path) -> None:
    both = ("--label", 1, "--count", 2, "--guidance", 3.5)
    python(bundle.path, *both, "--seed", 7, "--save-noise", tmp_path / "noise", "--raw", tmp_path / "python")
    written = ("--raw", tmp_path / "node", "--out", tmp_path / "node.ppm")
    run(node, "sampler.mjs", bundle.path, *both, "--noise", tmp_path / "noise", *written, cwd=FOLDER / "node")
    ours, theirs = (np.fromfile(tmp_path / name, np.float32) for name in ("python", "node"))
    assert len(ours) == 2 * 3 * 4 * 3
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-3)
    picture = np.asarray(Image.open(tmp_path / "node.ppm"))
    assert np.abs(picture.reshape(-1) - theirs * 255.0).max() <= 0.5 + 1e-3


def test_nodes_own_noise_is_standard_normal_and_depends_on_the_seed(node: str, bundle: Bundle, tmp_path: Path) -> None:
    for seed, name in ((1, "first"), (1, "again"), (2, "other")):
        words = ("--seed", seed, "--count", 4, "--raw", tmp_path / name)
        run(node, "sampler.mjs", bundle.path, *words, cwd=FOLDER / "node")
    first, again, other = (np.fromfile(tmp_path / name, np.float32) for name in ("first", "again", "other"))
    assert np.array_equal(first, again) and np.abs(first - other).max() > 0.1


# --- Triton ----------------------------------------------------------------------------------------------------


def test_the_triton_client_sends_what_the_config_asks_for(bundle: Bundle, tmp_path: Path) -> None:
    """A server of Triton's protocol, with ONNX Runtime behind it, stands for Triton, which is not run here."""
    grpc = pytest.importorskip("grpc", reason="needs tritonclient[grpc]")
    pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = _serve(server, bundle.path / "triton" / "sampler")
    server.start()
    try:
        words = ("--label", 1, "--seed", 7, "--count", 2, "--url", f"127.0.0.1:{port}", "--raw", tmp_path / "raw")
        run(sys.executable, FOLDER / "triton_client.py", bundle.path, *words)
    finally:
        server.stop(None)
    images = np.fromfile(tmp_path / "raw", np.float32).reshape(2, 3, 4, 3)
    np.testing.assert_allclose(images, runtime_images(bundle, [1, 1], [7, 8], 2.0), rtol=0, atol=1e-5)


def _serve(server: Any, model: Path) -> int:
    """Add Triton's inference service to a server: tensors are checked and reshaped as config.pbtxt says."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

    config = text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    dtypes = {"FP32": np.float32, "INT64": np.int64}

    class Service(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
        def ModelInfer(self, request: Any, context: Any) -> Any:
            assert request.model_name == config.name and len(request.inputs) == len(config.input)
            feed = {}
            for given, raw in zip(request.inputs, request.raw_input_contents, strict=True):
                (declared,) = (tensor for tensor in config.input if tensor.name == given.name)
                assert f"TYPE_{given.datatype}" == model_config_pb2.DataType.Name(declared.data_type)
                assert len(given.shape) == len(declared.dims)
                assert all(size in (-1, found) for size, found in zip(declared.dims, given.shape, strict=True))
                shape = declared.reshape.shape if declared.HasField("reshape") else given.shape
                feed[given.name] = np.frombuffer(raw, dtypes[given.datatype]).reshape(tuple(shape))
            (images,) = session.run(["images"], feed)
            output = service_pb2.ModelInferResponse.InferOutputTensor(
                name="images", datatype="FP32", shape=images.shape
            )
            return service_pb2.ModelInferResponse(outputs=[output], raw_output_contents=[images.tobytes()])

    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), server)
    return int(server.add_insecure_port("127.0.0.1:0"))
