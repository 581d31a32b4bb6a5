"""export/search/finish.py and compress/search/summary.py: the front, the table, and what comes nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffpress.compress.search.picture import write_picture
from diffpress.compress.search.settings import Bounds, SearchSettings
from diffpress.compress.search.study import Result, Trial
from diffpress.compress.search.summary import nearest_line, table
from diffpress.export.search.finish import FRONT_LIMIT, front_of

CHOICES = {"prune": "none", "distill": "none", "format": "int8"}


class Searcher:
    """What `front_of` reads of a search."""

    def __init__(self, selection: object | None) -> None:
        self.selection = selection


def trial(number: int, latency: float, ratio: float | None, excess: float = -0.5, failure: str = "") -> Trial:
    quality = 1.0 if ratio is None else ratio
    return Trial(number, CHOICES, Result(latency, 2.0, (-9.0,), 9.0, ratio, quality, {"b": excess}, 1.0, failure))


def member(name: str, latency: float, ratio: float, **excesses: float) -> dict[str, Any]:
    return {
        "name": name,
        "choices": "int8",
        "latency_ratio": latency,
        "frechet_ratio": ratio,
        "size_mib": 3.0,
        "meets_bounds": all(value <= 0 for value in excesses.values()),
        "excesses": excesses,
        "parity_failures": [],
    }


def test_only_trials_that_were_scored_are_on_the_front_with_features() -> None:
    trials = [
        trial(0, 0.5, 1.0),
        trial(1, 0.2, None),
        trial(2, 0.3, 1.5),
        trial(3, 0.6, 1.2),
        trial(4, 0, 0, failure="x"),
    ]
    assert [one.number for one in front_of(Searcher(object()), trials)] == [2, 0]  # type: ignore[arg-type]
    assert [one.number for one in front_of(Searcher(None), trials)] == [1]  # type: ignore[arg-type]


def test_at_most_a_few_are_exported_and_the_ends_are_among_them() -> None:
    trials = [trial(n, 1.0 - n / 20, 1.0 + n / 20) for n in range(15)]
    found = [one.number for one in front_of(Searcher(object()), trials)]  # type: ignore[arg-type]
    assert len(found) == FRONT_LIMIT and found[0] == 14 and found[-1] == 0


def test_the_table_marks_the_chosen_one() -> None:
    lines = table([member("trial-001", 0.1, 1.05), member("trial-002", 0.2, 1.0, a=0.1)], "trial-001").splitlines()
    assert "trial-001 *" in lines[1] and "10.0x" in lines[1] and "kept" in lines[1]
    assert "*" not in lines[2] and "exceeded" in lines[2]


def test_one_line_names_what_comes_nearest_and_the_bound_that_it_exceeds() -> None:
    bounds = Bounds(max_latency_ratio=0.1, max_frechet_ratio=1.1)
    far = member("far", 0.3, 1.0, max_latency_ratio=2.0, max_frechet_ratio=-0.1)
    near = member("near", 0.12, 1.0, max_latency_ratio=0.2, max_frechet_ratio=-0.1)
    line = nearest_line([far, near], bounds)
    assert line == "nothing meets the bounds; near comes nearest: latency_ratio is 0.120, max_latency_ratio is 0.1"


@pytest.mark.parametrize("scored", [True, False])
def test_the_picture_is_drawn_with_and_without_features(tmp_path: Path, scored: bool) -> None:
    members = [member("trial-000", 0.5, 1.0) | {"frechet_ratio": 1.0 if scored else None}]
    facts = {"front": members, "chosen": "trial-000", "engine": "openvino"}
    bounds = SearchSettings(engine="openvino", train_steps=1).bounds.model_copy(update={"max_latency_ratio": 0.4})
    write_picture(
        tmp_path / "s.png", facts | {"bounds": bounds.model_dump()}, [trial(0, 0.5, 1.0), trial(1, 0.9, 30.0)]
    )
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size == (864, 552) and len(set(picture.convert("L").tobytes())) > 20
