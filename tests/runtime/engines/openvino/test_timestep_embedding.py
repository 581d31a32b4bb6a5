"""runtime/engines/openvino/timestep_embedding.py: angles are not rounded to bfloat16, and the outputs stay the same."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
op = openvino.opset13

from diffpress.runtime.engines import load_engine  # noqa: E402
from diffpress.runtime.engines.openvino.timestep_embedding import keep_timestep_embedding_float_  # noqa: E402
from diffpress.runtime.engines.options import EngineOptions  # noqa: E402

FREQUENCIES = np.exp(-np.linspace(0.0, 9.0, 16, dtype=np.float32))
WEIGHT = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
T = np.array([999.0, 501.0, 3.0], np.float32)
X = np.linspace(-1.0, 1.0, 24, dtype=np.float32).reshape(3, 8)


def network() -> Any:
    """Return sin(sample) + the embedding of t, which is broadcast to the samples' batch, as a U-Net does."""
    t, sample = op.parameter([-1], np.float32), op.parameter([-1, 8], np.float32)
    t.output(0).set_names({"timestep"})
    sample.output(0).set_names({"sample"})
    batch = op.gather(op.shape_of(sample), np.array([0]), np.int64(0))
    angles = op.multiply(op.unsqueeze(op.broadcast(t, batch), np.array([1])), FREQUENCIES.reshape(1, -1))
    embedded = op.matmul(op.concat([op.cos(angles), op.sin(angles)], 1), WEIGHT, False, False)
    out = op.relu(op.add(op.matmul(op.sin(sample), np.eye(8, dtype=np.float32), False, False), embedded))
    out.output(0).set_names({"out"})
    return openvino.Model([op.result(out)], [sample, t], "network")


def test_the_sinusoids_of_the_timestep_alone_become_outputs_once_behind_the_models_own() -> None:
    model = network()
    keep_timestep_embedding_float_(model)
    keep_timestep_embedding_float_(model)
    assert len(model.outputs) == 3 and model.output(0).get_any_name() == "out"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_embedding_is_that_of_float32_and_the_outputs_are_the_models_own(precision: str, tmp_path: Path) -> None:
    if precision == "bf16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")
    openvino.save_model(network(), tmp_path / "model.xml", compress_to_fp16=False)
    angles = T[:, None] * FREQUENCIES
    exact = np.maximum(np.sin(X) + np.concatenate([np.cos(angles), np.sin(angles)], 1) @ WEIGHT, 0.0)
    options = EngineOptions(precision=precision)
    with closing(load_engine(tmp_path / "model.xml", "openvino", options=options)) as engine:
        found = engine.run_all({"sample": X, "timestep": T})
        compiled = next(iter(engine._compiled.values())).model  # type: ignore[attr-defined]
    assert list(found) == ["out"] and len(compiled.outputs) == (3 if precision == "bf16" else 1)
    np.testing.assert_allclose(found["out"], exact, atol=0.03 * exact.max())
