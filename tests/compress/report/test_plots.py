"""compress/report/plots.py and tradeoff.py: what is drawn, in the page's colours, and what may not be drawn."""

from __future__ import annotations

import re
from typing import Any

import pytest

from diffpress.compress.report import plots
from diffpress.compress.report.facts import collect
from diffpress.compress.report.page import TEMPLATES
from diffpress.compress.report.tradeoff import Point, Tradeoff, tradeoff_of
from tests.compress.report.made_run import TEACHER_STEPS, bench, make_run, row


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return collect(make_run(tmp_path_factory.mktemp("made") / "run", 4))


def test_every_color_is_a_variable_of_the_style_sheet_in_all_schemes(facts: dict[str, Any]) -> None:
    drawn = [
        plots.quality_against_latency(tradeoff_of(facts)),
        plots.stages(facts["lineage"]),
        plots.sampling_plan(facts),
        plots.training_curve(facts["training"][0], 0),
    ]
    svg = "".join(plot or "" for plot in drawn)
    assert all(drawn) and not re.search(r"#[0-9a-f]{6}", svg)
    used = set(re.findall(r"var\(--(\w+)\)", svg))
    assert {"bundle", "baseline", "teacher", "muted", "line"} <= used
    light, dark, printed = (TEMPLATES / "style.css").read_text().split(":root")[1:]
    assert all(f"--{name}:" in scheme for name in used for scheme in (light, dark, printed))


def test_the_same_facts_give_the_same_plot(facts: dict[str, Any]) -> None:
    assert plots.sampling_plan(facts) == plots.sampling_plan(facts)


def test_text_has_the_font_of_the_page(facts: dict[str, Any]) -> None:
    assert "font-family" not in plots.sampling_plan(facts) and "DejaVu" not in plots.sampling_plan(facts)
    assert "signal to noise, dB" in plots.sampling_plan(facts)  # as text, not as outlines


def test_only_subjects_that_were_scored_under_the_timed_plan_have_a_quality(facts: dict[str, Any]) -> None:
    tradeoff = tradeoff_of(facts)
    assert tradeoff is not None and tradeoff.floor == 0.1 and tradeoff.batch == 1
    torch, baseline, bundle = tradeoff.points
    assert torch == Point("PyTorch eager, 50 steps", "torch", 400.0, None, None)
    assert baseline == Point("teacher in openvino, 8 steps", "baseline", 100.0, 0.8, 0.02)
    assert bundle == Point("bundle in openvino, 3 steps", "bundle", 20.0, 0.9, 0.02)


@pytest.mark.parametrize(("solver", "quality"), [("ddim", 0.8), ("dpmpp_2m", None)])
def test_pytorch_is_scored_only_with_the_solver_that_it_was_timed_with(
    solver: str, quality: float | None, facts: dict[str, Any]
) -> None:
    measured = bench()
    measured["rows"][0] = row("net (PyTorch eager)", "torch", "fp32", TEACHER_STEPS, 400.0)
    baseline = {**facts["baseline"], "plan": {**facts["baseline"]["plan"], "solver": solver}}
    tradeoff = tradeoff_of({**facts, "bench": measured, "baseline": baseline})
    assert tradeoff is not None and tradeoff.points[0].quality == quality


@pytest.mark.parametrize("missing", ["bench", "evaluation"])
def test_without_latency_or_quality_there_is_no_plot_of_them(missing: str, facts: dict[str, Any]) -> None:
    assert tradeoff_of({**facts, missing: None}) is None
    assert plots.quality_against_latency(None) is None


def test_names_are_text_and_no_formula_or_markup(recwarn: pytest.WarningsRecorder) -> None:
    name = r"<b>$\frac{$ 画像 </svg>"
    svg = plots.quality_against_latency(Tradeoff(1, "", 0.1, (Point(name, "bundle", 1.0, 0.5, None),)))
    assert svg is not None and r"&lt;b&gt;$\frac{$ 画像 &lt;/svg&gt;" in svg and svg.count("</svg>") == 1
    assert not recwarn.list


def test_an_sqnr_of_identical_networks_does_not_set_the_scale(facts: dict[str, Any]) -> None:
    svg = plots.stages(facts["lineage"])
    assert svg is not None and "60+" in svg and "200" not in re.findall(r">([^<>]+)</text>", svg)
    assert plots.stages({"stages": []}) is None
