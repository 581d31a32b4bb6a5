"""compress/sources/record.py: a checkpoint saved before format 2 loads and computes what it computed then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffpress.compress.checkpoint import FORMAT, RECORD, save_checkpoint
from diffpress.compress.evaluation.subject import open_network
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampler import generate

FIXTURES = Path(__file__).parents[2] / "fixtures" / "format_1"


def samples(folder: Path) -> np.ndarray:
    network, spec = open_network(str(folder), None, 1)
    return generate(network, spec, seeds=range(4), labels=np.array([0, 1, 2, 0]))


def test_a_format_1_checkpoint_computes_what_it_computed_then() -> None:
    then = np.load(FIXTURES / "checkpoint_samples.npy")
    np.testing.assert_allclose(samples(FIXTURES / "checkpoint"), then, atol=1e-3)


def test_a_format_1_checkpoint_is_saved_as_format_2_and_computes_the_same(tmp_path: Path) -> None:
    old = load_checkpoint(FIXTURES / "checkpoint")
    assert json.loads((FIXTURES / "checkpoint" / RECORD).read_text())["format"] == 1
    assert old.quantization is not None and old.quantization.svdquant and old.spec.plan.output_corrections
    save_checkpoint(old, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / RECORD).read_text())["format"] == FORMAT == 2
    assert load_checkpoint(tmp_path / "saved").hash == old.hash
    assert np.array_equal(samples(FIXTURES / "checkpoint"), samples(tmp_path / "saved"))


@pytest.mark.parametrize("number", [0, 3, "2"])
def test_other_formats_are_refused_with_those_that_can_be_read(number: object, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(FIXTURES / "checkpoint", tmp_path / "checkpoint"))
    record = json.loads((copy / RECORD).read_text()) | {"format": number}
    (copy / RECORD).write_text(json.dumps(record))
    with pytest.raises(InvalidInputError, match="this diffpress reads 1 and 2"):
        load_checkpoint(copy)
