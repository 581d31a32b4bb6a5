"""compress/quantization/config.py: one nested config per method, and what earlier versions wrote flat."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from diffpress.compress.quantization.config import MOVED, QuantizeConfig
from diffpress.runtime.errors import InvalidInputError


def changed(settings: dict[str, Any]) -> dict[str, Any]:
    return QuantizeConfig(**settings).model_dump(exclude_defaults=True)


def test_true_is_a_method_with_its_defaults_and_false_is_off() -> None:
    on = QuantizeConfig(format="w4a8", awq=True, gptq=True, qat=True)
    assert on == QuantizeConfig(format="w4a8", awq={}, gptq={}, qat={}) and on.qat and on.qat.steps == 200
    off = QuantizeConfig(smoothquant=False, awq=False, svdquant=False, gptq=False, qat=False)
    assert off == QuantizeConfig() and off.qat is None


def test_a_plain_name_is_the_method_of_calibration() -> None:
    assert QuantizeConfig(calibration="mse") == QuantizeConfig(calibration={"method": "mse"})


@pytest.mark.parametrize(
    ("flat", "nested"),
    [
        ({"mode": "qat", "steps": 3, "warmup": 0}, {"qat": {"steps": 3, "warmup": 0}}),
        ({"mode": "ptq", "rounding": "nearest", "smooth": 0.0, "svdquant_rank": 0}, {}),
        ({"smooth": 0.4, "svdquant_rank": 8}, {"smoothquant": {"alpha": 0.4}, "svdquant": {"rank": 8}}),
        ({"calibration": "mse", "percentile": 99.0}, {"calibration": {"method": "mse", "percentile": 99.0}}),
        ({"rounding": "gptq", "rounding_samples": 8}, {"gptq": {"samples": 8}}),
        ({"rounding": "adaround"}, {"gptq": {}}),
        ({"format": "int4", "awq": True, "rounding_samples": 8}, {"format": "int4", "awq": {"samples": 8}}),
        (
            {"format": "w4a8", "awq": True, "rounding": "gptq", "rounding_samples": 8},
            {"format": "w4a8", "awq": {"samples": 8}, "gptq": {"samples": 8}},
        ),
        (
            {"bounds": {"min_sqnr_db": 3.0}, "target": "openvino"},
            {"bounds": {"min_sqnr_db": 3.0, "engine": "openvino"}},
        ),
    ],
    ids=str,
)
def test_flat_settings_of_earlier_versions_mean_the_same_and_warn(
    flat: dict[str, Any], nested: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="diffpress"):
        assert changed(flat) == nested
    assert len(caplog.messages) == len(set(flat) & set(MOVED)) > 0
    assert all("works until diffpress 0.4" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"steps": 50}, r"steps belongs to qat, which is off; set qat\.steps"),
        ({"mode": "ptq", "steps": 50}, r"steps belongs to qat, which is off; set qat\.steps"),
        ({"mode": "qta"}, "mode belongs to qat"),
        ({"rounding_samples": 8}, r"rounding_samples belongs to gptq, which is off; set gptq\.samples"),
        ({"target": "openvino"}, r"set bounds\.engine"),
        ({"percentile": 0}, r"calibration\.percentile: .* greater than 50"),
        ({"qat": 200, "steps": 100}, "qat"),
        ({"bounds": 5, "target": "openvino"}, "bounds"),
    ],
    ids=str,
)
def test_a_flat_setting_that_cannot_be_moved_is_refused_in_one_line(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        QuantizeConfig(**flat)
    assert "\n" not in str(caught.value)


def test_an_unknown_setting_of_a_method_is_refused_with_its_place() -> None:
    with pytest.raises(InvalidInputError, match=r"qat\.stepz'; did you mean 'steps'"):
        QuantizeConfig(qat={"stepz": 50})
