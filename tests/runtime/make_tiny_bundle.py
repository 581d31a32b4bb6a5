"""Make tests/runtime/tiny_bundle: the exact denoiser of three known images, as an ONNX graph of a few kilobytes.

The data of class k is Gaussian around one image m_k with standard deviation c, so the ideal x_0 is known in closed
form:

    x_0 = m_k + g (x - alpha m_k),  g = alpha c^2 / (alpha^2 c^2 + sigma^2),     v = (alpha x - x_0) / sigma

The graph looks up the weights of x and m_k in v by timestep, and m_k by label; the null label's m is their mean. Run
from the repository's root:  python -m tests.runtime.make_tiny_bundle
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from diffpress.runtime.bundle import seal
from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec

FOLDER = Path(__file__).parent / "tiny_bundle"
TIMESTEPS, SIZE, CLASSES, DEVIATION = 50, 8, 3, 0.05


def means() -> np.ndarray:
    """Return the images and their mean, float32 [4, 1, 8, 8]: a horizontal ramp, a vertical ramp, a checkerboard."""
    ramp = np.linspace(-0.8, 0.8, SIZE)
    across, down = np.meshgrid(ramp, ramp)
    checker = np.where(np.indices((SIZE, SIZE)).sum(axis=0) % 2 == 0, 0.7, -0.7)
    images = np.stack([across, down, checker])
    return np.concatenate([images, images.mean(axis=0, keepdims=True)])[:, None].astype(np.float32)


def spec() -> DenoiserSpec:
    schedule = betas_schedule("squaredcos_cap_v2", TIMESTEPS)
    plan = make_plan("dpmpp_2m", 8, schedule, spacing="trailing")
    return DenoiserSpec("v", schedule, (1, SIZE, SIZE), plan, Conditioning("class", CLASSES, null_label=CLASSES))


def graph() -> onnx.ModelProto:
    alphas, sigmas = np.array(spec().schedule.alphas), np.array(spec().schedule.sigmas)
    gain = alphas * DEVIATION**2 / (alphas**2 * DEVIATION**2 + sigmas**2)
    of_x = ((alphas - gain) / sigmas).astype(np.float32).reshape(-1, 1, 1, 1)
    of_mean = ((gain * alphas - 1.0) / sigmas).astype(np.float32).reshape(-1, 1, 1, 1)
    tables = {"of_x": of_x, "of_mean": of_mean, "means": means()}
    nodes = [
        helper.make_node("Gather", ["of_x", "timestep"], ["weight_x"]),
        helper.make_node("Gather", ["of_mean", "timestep"], ["weight_mean"]),
        helper.make_node("Gather", ["means", "class_labels"], ["mean"]),
        helper.make_node("Mul", ["weight_x", "sample"], ["part_x"]),
        helper.make_node("Mul", ["weight_mean", "mean"], ["part_mean"]),
        helper.make_node("Add", ["part_x", "part_mean"], ["out_sample"]),
    ]
    image: list[str | int | None] = ["batch", 1, SIZE, SIZE]
    inputs = [
        helper.make_tensor_value_info("sample", TensorProto.FLOAT, image),
        helper.make_tensor_value_info("timestep", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("class_labels", TensorProto.INT64, ["batch"]),
    ]
    outputs = [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, image)]
    constants = [numpy_helper.from_array(table, name) for name, table in tables.items()]
    tiny = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    return helper.make_model(tiny, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    model = graph()
    onnx.checker.check_model(model)
    (FOLDER / "denoiser.onnx").write_bytes(model.SerializeToString())
    content = {"name": "tiny", "spec": spec().to_json(), "graphs": {"denoiser": {"file": "denoiser.onnx"}}}
    manifest = seal(FOLDER, {**content, "engines": [], "history": [], "metrics": {}})
    print(f"{FOLDER}: {manifest['hash']}")  # noqa: T201


if __name__ == "__main__":
    main()
