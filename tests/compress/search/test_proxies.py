"""compress/search/proxies.py: the latency table, its keys, and estimates from measured trials."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.search.proxies import (
    Cost,
    LatencyTable,
    compared_samples,
    error_db,
    estimated_ratio,
    latency_key,
)
from diffpress.runtime.errors import InvalidInputError


def test_a_cost_is_measured_once_and_read_from_the_file_afterwards(tmp_path: Path) -> None:
    calls = []

    def measure() -> Cost:
        calls.append(1)
        return Cost(0.5, 1.25)

    for _ in range(3):
        assert LatencyTable(tmp_path / "t.json", "openvino", "teacher").cost("k", measure) == Cost(0.5, 1.25)
    assert len(calls) == 1


@pytest.mark.parametrize(("engine", "teacher"), [("onnxruntime", "a"), ("openvino", "b")])
def test_a_table_of_another_engine_or_teacher_is_refused(tmp_path: Path, engine: str, teacher: str) -> None:
    LatencyTable(tmp_path / "t.json", "openvino", "a").cost("k", lambda: Cost(1.0, 1.0))
    with pytest.raises(InvalidInputError, match="was measured with another"):
        LatencyTable(tmp_path / "t.json", engine, teacher)


def test_the_key_depends_on_shapes_and_formats_and_not_on_weights(
    unet: Checkpoint, pruned: Checkpoint, quantized: Checkpoint
) -> None:
    model = unet.clone_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert latency_key(unet.evolve(model=model), "fp32") == latency_key(unet, "fp32")
    keys = {latency_key(one, "fp32") for one in (unet, pruned, quantized)} | {latency_key(unet, "fp16")}
    assert len(keys) == 4


def test_a_layer_that_returns_to_float_changes_the_key(quantized: Checkpoint) -> None:
    assert quantized.quantization is not None
    fewer = quantized.evolve(quantization=quantized.quantization.without(quantized.quantization.layers[:1]))
    assert latency_key(fewer, "fp32") != latency_key(quantized, "fp32")


def test_the_estimate_interpolates_and_never_falls_with_the_error() -> None:
    measured = [(-20.0, 1.0), (-10.0, 3.0), (-15.0, 2.0), (-5.0, 2.5)]
    assert estimated_ratio(-17.5, measured) == pytest.approx(1.5)
    assert estimated_ratio(-5.0, measured) == pytest.approx(3.0)
    assert (estimated_ratio(-90.0, measured), estimated_ratio(9.0, measured)) == (1.0, 3.0)


def test_the_error_of_the_teacher_itself_is_the_least_and_grows_with_fewer_channels(
    unet: Checkpoint, pruned: Checkpoint
) -> None:
    teacher = compared_samples(unet)
    assert error_db(teacher, teacher) == -200.0
    found = compared_samples(pruned)
    expected = [10 * np.log10(((a - b) ** 2).sum() / (a**2).sum()) for a, b in zip(teacher, found, strict=True)]
    assert error_db(teacher, found) == pytest.approx(np.mean(expected), abs=1e-3)
