"""compress/sources/record.py: older checkpoints load and compute what they computed then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.compress.checkpoint import FORMAT, RECORD, Checkpoint, Record, save_checkpoint
from diffpress.compress.evaluation.open_subject import open_subject
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampler import generate

FIXTURES = Path(__file__).parents[2] / "fixtures" / "format_1"


def samples(folder: Path) -> np.ndarray:
    subject = open_subject(str(folder))
    network, spec = subject.network, subject.spec
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


def rewrite(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / RECORD).read_text())
    edit(record)
    (folder / RECORD).write_text(json.dumps(record))


def test_a_guidance_weight_that_only_the_history_notes_is_moved_to_the_spec(unet: Checkpoint, tmp_path: Path) -> None:
    history = tuple(Record("distill", {}, 0, changed, "", "") for changed in ({"guidance": 3.0}, {"guidance": 4.0}, {}))
    now = unet.evolve(spec=replace(unet.spec, baked_in_guidance=4.0), history=history)
    save_checkpoint(now, tmp_path / "saved")
    rewrite(tmp_path / "saved", lambda record: record["spec"].pop("baked_in_guidance"))
    old = load_checkpoint(tmp_path / "saved")
    assert old.spec == now.spec and old.hash == now.hash and old.history == history


def test_a_weight_in_the_spec_takes_precedence_and_a_weight_of_one_leaves_the_spec_as_it_is(
    unet: Checkpoint, tmp_path: Path
) -> None:
    noted = unet.evolve(history=(Record("distill", {}, 0, {"guidance": 1.0}, "", ""),))
    save_checkpoint(noted, tmp_path / "saved")
    assert load_checkpoint(tmp_path / "saved").hash == unet.hash
    rewrite(tmp_path / "saved", lambda record: record["spec"].update(baked_in_guidance=2.0))
    assert load_checkpoint(tmp_path / "saved").spec.baked_in_guidance == 2.0


@pytest.mark.parametrize("history", [3, [3], [{"changed": {"guidance": 2.0}}], [{"changed": 3}]])
def test_an_invalid_history_is_refused(history: object, unet: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(unet, tmp_path / "saved")
    rewrite(tmp_path / "saved", lambda record: record.update(history=history))
    with pytest.raises(InvalidInputError, match="invalid history"):
        load_checkpoint(tmp_path / "saved")


@pytest.mark.parametrize("number", [0, 3, "2"])
def test_other_formats_are_refused_with_those_that_can_be_read(number: object, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(FIXTURES / "checkpoint", tmp_path / "checkpoint"))
    rewrite(copy, lambda record: record.update(format=number))
    with pytest.raises(InvalidInputError, match="this diffpress reads 1 and 2"):
        load_checkpoint(copy)
