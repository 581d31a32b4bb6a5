"""runtime/engines/openvino/float_angles.py: angles are not rounded to bfloat16, and the outputs stay the same."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
op = openvino.opset13

from diffpress.runtime.engines import load_engine  # noqa: E402
from diffpress.runtime.engines.openvino.float_angles import with_float_angles  # noqa: E402
from diffpress.runtime.engines.options import EngineOptions  # noqa: E402

FREQUENCIES = np.exp(-np.linspace(0.0, 9.0, 16, dtype=np.float32))
WEIGHT = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
T = np.array([999.0, 501.0, 3.0], np.float32)


def embedding() -> Any:
    """Return a model of the timestep embedding of a U-Net: t [B] -> out [B, 8]."""
    t = op.parameter([-1], np.float32)
    t.output(0).set_names({"timestep"})
    angles = op.multiply(op.unsqueeze(t, np.array([1])), FREQUENCIES.reshape(1, -1))
    out = op.relu(op.matmul(op.concat([op.cos(angles), op.sin(angles)], 1), WEIGHT, False, False))
    out.output(0).set_names({"out"})
    return openvino.Model([op.result(out)], [t], "embedding")


def test_the_angles_become_outputs_once_behind_the_models_own() -> None:
    model = embedding()
    with_float_angles(model)
    with_float_angles(model)
    assert len(model.outputs) == 3 and model.output(0).get_any_name() == "out"


def test_in_bf16_the_angles_are_those_of_float32_and_the_outputs_the_models_own(tmp_path: Path) -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")
    openvino.save_model(embedding(), tmp_path / "model.xml", compress_to_fp16=False)
    angles = T[:, None] * FREQUENCIES
    exact = np.maximum(np.concatenate([np.cos(angles), np.sin(angles)], 1) @ WEIGHT, 0.0)
    with closing(load_engine(tmp_path / "model.xml", "openvino", options=EngineOptions(precision="bf16"))) as engine:
        found = engine.run_all({"timestep": T})
    assert list(found) == ["out"]
    np.testing.assert_allclose(found["out"], exact, atol=0.05 * exact.max())
