"""runtime/lora/slots.py: factors fit a layer, or the unpruned layer it was cut from, and fill the rows of a slot."""

from __future__ import annotations

import numpy as np
import pytest

from diffpress.runtime.lora.slots import DOWN, UP, Factors, SlotLayer, Slots, fill_, lora_arrays

ENTRY = {
    "slots": 2,
    "rank": 3,
    "layers": {
        "whole": {"shape": [4, 5]},
        "cut": {"shape": [3, 4], "kept": {"0": "0-1 3", "1": "1 3-5"}, "unpruned": [4, 6]},
        "conv": {"shape": [4, 5, 3, 3]},
        "point": {"shape": [4, 5, 1, 1]},
    },
}
LAYERS = Slots.of(ENTRY).layers


def factors(out: int, width: int, rank: int = 2, *kernel: int) -> Factors:
    noise = np.random.default_rng(out + width)
    return Factors(noise.standard_normal((rank, width, *kernel)), noise.standard_normal((out, rank)))


def test_factors_of_the_unpruned_layer_are_cut_to_what_is_left() -> None:
    given = factors(4, 6)
    found = LAYERS["cut"].fitted(given)
    assert found is not None
    np.testing.assert_allclose(found.up @ found.down, (given.up @ given.down)[[0, 1, 3]][:, [1, 3, 4, 5]])
    same = factors(3, 4)
    own = LAYERS["cut"].fitted(same)
    assert own is not None and own.up is same.up and own.down is same.down


@pytest.mark.parametrize(
    ("layer", "given"),
    [
        ("whole", factors(4, 6)),
        ("whole", factors(5, 5)),
        ("whole", factors(4, 5, 2, 3, 3)),
        ("cut", factors(4, 4)),
        ("cut", factors(3, 6)),
        ("conv", factors(4, 5)),
        ("conv", factors(4, 5, 2, 1, 1)),
        ("whole", Factors(np.zeros((2, 5)), np.zeros((4, 3)))),
    ],
)
def test_other_widths_do_not_fit(layer: str, given: Factors) -> None:
    assert LAYERS[layer].fitted(given) is None


def test_a_linear_layer_and_a_1x1_convolution_take_the_factors_of_each_other() -> None:
    point, line = LAYERS["point"].fitted(factors(4, 5)), LAYERS["whole"].fitted(factors(4, 5, 2, 1, 1))
    assert point is not None and point.down.shape == (2, 5, 1, 1)
    assert line is not None and line.down.shape == (2, 5)


def test_filled_slots_compute_the_sum_of_all_loras_and_are_emptied_by_the_next() -> None:
    shapes = {f"{DOWN}whole": (5, 6), f"{UP}whole": (6, 4), f"{DOWN}conv": (6, 5, 3, 3), f"{UP}conv": (4, 6, 1, 1)}
    arrays = lora_arrays({**shapes, "sample": (1, 2)})
    assert arrays.keys() == shapes.keys()
    first = {"whole": factors(4, 5, 3), "conv": factors(4, 5, 2, 3, 3)}
    second = {"whole": factors(4, 5, 1)}
    fill_(arrays, 3, [first, second])
    added = sum(one["whole"].up @ one["whole"].down for one in (first, second))
    np.testing.assert_allclose((arrays[f"{DOWN}whole"] @ arrays[f"{UP}whole"]).T, added, rtol=1e-5)
    kernel = np.tensordot(arrays[f"{UP}conv"][..., 0, 0], arrays[f"{DOWN}conv"], 1)
    np.testing.assert_allclose(kernel, np.tensordot(first["conv"].up, first["conv"].down, 1), rtol=1e-5, atol=1e-6)
    once = {name: array.copy() for name, array in arrays.items()}
    fill_(arrays, 3, [second])
    assert not arrays[f"{UP}conv"].any() and not np.array_equal(arrays[f"{UP}whole"], once[f"{UP}whole"])
    fill_(arrays, 3, [first, second])
    assert all(np.array_equal(array, once[name]) for name, array in arrays.items())


def test_a_layer_without_pruning_is_its_own_unpruned_layer() -> None:
    assert LAYERS["whole"] == SlotLayer((4, 5), (4, 5))
