"""compress/report/figures.py and summary.py: the rows of the summary, from facts as a run leaves them."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from diffpress.compress.report.figures import COLUMNS, Figure, figures_of, to_csv
from diffpress.compress.report.summary import MAX_LINES, summary
from tests.compress.report.made_run import bench, row, score


def facts(**changed: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "bundle": {"name": "student", "denoiser_mib": 7.0, "size_ratio": 0.25},
        "baseline": {"denoiser_mib": 28.0},
        "components": {},
        "history": [],
        "engines": [],
        "variants": {},
        "evaluation": None,
        "latency": None,
        "bench": None,
    }
    return plain | changed


def line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_quantized_components_have_their_size_and_their_effect_on_the_image() -> None:
    found = summary(
        facts(
            components={
                "text_encoder": {"mib": 2.0, "baseline_mib": 8.0, "precision": "int8", "image_psnr_db": 41.25},
                "vae_decoder": {"mib": 2.5, "baseline_mib": 2.5, "precision": "fp32"},
            }
        )
    )
    assert line(found, "text_encoder.onnx").split()[2:] == ["8.00", "2.00", "0.250"]
    assert any(line.strip().startswith("image PSNR with it in int8") and "41.2" in line for line in found.splitlines())
    assert sum("image PSNR" in line for line in found.splitlines()) == 1


def test_prompt_adherence_is_shown_for_both_and_absent_from_older_runs() -> None:
    scores = {"clip_score": {"mean": 31.0, "sd": 0.1}, "retrieval": {"mean": 0.81, "sd": 0.02, "candidates": 1140}}
    found = summary(facts(evaluation={"baseline": score(0.5) | scores, "bundle": score(0.5) | scores}))
    assert line(found, "retrieval accuracy among 1140 texts").count("0.810 ± 0.020") == 2
    del scores["retrieval"]
    older = summary(facts(evaluation={"baseline": score(0.5) | scores, "bundle": score(0.5) | scores}))
    assert "CLIP score" in older and "retrieval" not in older


def test_distances_below_that_of_real_images_have_no_ratio() -> None:
    found = summary(facts(evaluation={"baseline": score(0.09), "bundle": score(0.08)}))
    assert "both below real images" in line(found, "Frechet distance (3 x 64)")
    assert line(summary(facts(evaluation={"baseline": score(0.8), "bundle": score(1.0)})), "Frechet").endswith("1.250")


@pytest.mark.parametrize(("ms", "change"), [(20.0, "5.0x faster"), (250.0, "2.5x slower")])
def test_speed_is_that_of_the_baselines_at_the_same_batch_size(ms: float, change: str) -> None:
    measured = bench(ms)
    measured["rows"].append(row("teacher", "openvino", "fp32", 8, 7.0, batch=8))
    rows = [figure for figure in figures_of(facts(bench=measured)) if figure.name.startswith("image")]
    assert [(figure.teacher, figure.bundle) for figure in rows] == [(400.0, ms), (100.0, ms)]
    assert rows[1].change == change


def test_a_bundle_that_is_not_quantized_has_its_speed_as_well() -> None:
    measured = bench()
    measured["rows"][2]["precision"] = "fp32"
    assert sum(figure.name.startswith("image") for figure in figures_of(facts(bench=measured))) == 2


def test_a_long_summary_leaves_out_details_first_and_says_how_many() -> None:
    parts = {
        f"part{i}": {"mib": 1.0, "baseline_mib": 1.0, "precision": "int8", "image_psnr_db": 40.0} for i in range(9)
    }
    verdict = {"sentence": "word " * 60}
    crowded = facts(
        components=parts, bench=bench(), verdict=verdict, evaluation={"baseline": score(1), "bundle": score(1)}
    )
    lines = summary(crowded).splitlines()
    assert len(lines) == MAX_LINES and "part8.onnx" in "\n".join(lines)
    assert sum(line.startswith("image") for line in lines) == 2  # the last two rows, which are no details
    left_out = len(figures_of(crowded)) - (len(lines) - 3 - 1 - 2 - 1)
    assert lines[-1] == f"({left_out} more figures in the report)"
    assert sum("image PSNR" in line for line in lines) < 9


def test_the_csv_has_numbers_and_their_standard_deviations() -> None:
    spread = {"mean": 0.5, "sd": None}
    text = to_csv([Figure('a "name", quoted', "dB", 1.25, spread | {"sd": 0.1}), Figure("one seed", "", None, spread)])
    first, second = csv.DictReader(io.StringIO(text))
    assert tuple(first) == COLUMNS
    assert first["figure"] == 'a "name", quoted' and float(first["teacher"]) == 1.25 and first["bundle_sd"] == "0.1"
    assert second["teacher"] == second["bundle_sd"] == "" and second["bundle"] == "0.5"
