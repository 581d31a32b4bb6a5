"""compress/search/settings.py: units of time, and one line for values that make no sense."""

from __future__ import annotations

import pytest

from diffpress.compress.search.settings import Bounds, make_settings, parse_duration
from diffpress.runtime.errors import InvalidInputError


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("60m", 3600.0), ("1.5h", 5400.0), (" 2m", 120.0), ("0.5s", 0.5)]
)
def test_a_duration_has_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["60", "60min", "1d", "m", "-5m", "0m", "1e3s", "", "60 m"])
def test_a_duration_without_a_known_unit_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InvalidInputError, match="give a number with a unit: s, m or h") as caught:
        parse_duration(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_latency_ratio": 0.0}, "search.max_latency_ratio"),
        ({"max_size_mib": -1.0}, "search.max_size_mib"),
        ({"max_frechet_ratio": "many"}, "search.max_frechet_ratio"),
        ({"seed": -1}, "search.seed"),
        ({"samples": 2}, "search.samples"),
        ({"engine": "tensorrt"}, "search.engine"),
        ({"train_steps": 0}, "search.train_steps"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        make_settings(**({"engine": "onnxruntime", "train_steps": 9} | values))
    assert "\n" not in str(caught.value)


def test_excesses_are_fractions_of_the_bounds_that_are_set() -> None:
    bounds = Bounds(max_latency_ratio=0.1, max_size_mib=4.0)
    assert bounds.excesses(0.2, 9.0, 3.0) == pytest.approx({"max_latency_ratio": 1.0, "max_size_mib": -0.25})
    assert Bounds(max_frechet_ratio=1.1).excesses(1.0, None, 1.0) == {}
