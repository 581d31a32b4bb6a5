"""compress/search/front.py against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffpress.compress.search.front import constrained_front, dominates, front, is_promising, spread_out


def beaten(one: tuple[float, ...], points: list[tuple[float, ...]]) -> bool:
    """Whether some point is at most `one` everywhere and not equal to it: the definition, in numpy."""
    return any(bool((np.array(p) <= one).all()) and p != one for p in points)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_has_the_points_that_no_other_one_beats(seed: int) -> None:
    drawn = np.random.default_rng(seed).integers(0, 5, (30, 3)).astype(float)
    points = list(dict.fromkeys(map(tuple, drawn.tolist())))
    assert front(points, points) == [point for point in points if not beaten(point, points)]


def test_equal_points_are_on_the_front_once() -> None:
    assert front(["a", "b", "c"], [(1.0, 2.0), (1.0, 2.0), (2.0, 1.0)]) == ["a", "c"]


def test_equal_values_do_not_dominate_each_other() -> None:
    assert not dominates((1.0, 1.0), (1.0, 1.0))
    assert dominates((1.0, 1.0), (1.0, 2.0)) and not dominates((1.0, 2.0), (2.0, 1.0))


def test_items_that_exceed_a_bound_are_not_on_the_front_while_others_keep_it() -> None:
    values = [(0.1, 9.0), (0.5, 1.0), (0.6, 2.0)]
    assert constrained_front(["fast", "good", "worse"], values, [{"b": 0.5}, {"b": -0.1}, {"b": 0.0}]) == ["good"]


def test_without_any_that_keeps_the_bounds_the_nearest_item_is_returned() -> None:
    found = constrained_front(["far", "near"], [(0.1, 1.0), (0.2, 2.0)], [{"a": 0.5, "b": -9.0}, {"a": 0.2, "b": 0.1}])
    assert found == ["near"]


def test_a_trial_is_promising_if_no_trial_within_the_bounds_dominates_it() -> None:
    others, excesses = [(0.1, -20.0), (0.3, -30.0)], [1.0, 0.0]
    assert is_promising((0.2, -10.0), others, 0.0, excesses)  # the one that dominates it exceeds the bounds
    assert not is_promising((0.4, -10.0), others, 0.0, excesses)


def test_a_trial_that_exceeds_the_bounds_is_promising_only_while_it_comes_nearest() -> None:
    assert is_promising((0.2, -10.0), [(0.3, -9.0)], 0.5, [0.7])
    assert not is_promising((0.2, -10.0), [(0.3, -9.0)], 0.5, [0.5])
    assert not is_promising((0.2, -10.0), [(0.3, -9.0)], 0.5, [0.0])


@pytest.mark.parametrize(("count", "most"), list(itertools.product((1, 2, 6, 7, 20), (1, 2, 6))))
def test_spreading_out_keeps_the_ends(count: int, most: int) -> None:
    items = list(range(count))
    found = spread_out(items, [-float(item) for item in items], most)
    assert len(found) == len(set(found)) == min(count, most)
    assert found[0] == items[-1] and (most == 1 or found[-1] == items[0])
