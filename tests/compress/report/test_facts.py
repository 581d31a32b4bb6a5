"""compress/report: facts.py, lineage.py and layers.py, from the folder of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffpress.compress.config import StageConfig
from diffpress.compress.distillation.config import RecoverConfig
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.report.facts import MAX_DB, collect
from diffpress.compress.report.lineage import SHOWN_POINTS, changed_settings
from diffpress.compress.workspace import Workspace
from diffpress.runtime.errors import InvalidInputError
from tests.compress.report.made_run import BUNDLE_STEPS, FELL_BACK, KEPT_IN_FLOAT, LAYERS, TEACHER_STEPS, make_run

# the keys of report.json that other tools read
CONTRACT = {
    "bundle",
    "baseline",
    "components",
    "recipe",
    "history",
    "parity",
    "engines",
    "variants",
    "evaluation",
    "gates",
    "latency",
    "bench",
}


def test_the_facts_have_every_documented_key_and_are_json(tmp_path: Path) -> None:
    facts = collect(make_run(tmp_path / "run"))
    assert facts.keys() >= CONTRACT and facts["bundle"]["size_ratio"] == 0.25
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_a_layer_has_its_format_its_size_its_sensitivity_and_what_it_ran_in(tmp_path: Path) -> None:
    layers = {layer["layer"]: layer for layer in collect(make_run(tmp_path / "run"))["layers"]}
    assert list(layers) == list(LAYERS)  # 2 before 10, and no norm
    assert [layers[name]["format"] for name in LAYERS] == ["w4a8", "int8", "int8", "int8", "float"]
    assert [layers[name]["weights"] for name in LAYERS] == [16, 20, 24, 28, 32]
    assert layers[LAYERS[1]]["sqnr_db"] == 29.0
    ran = {name: layers[name]["executed"]["openvino"] for name in LAYERS}
    assert ran[LAYERS[0]] == "integer" and ran[KEPT_IN_FLOAT] == "float"
    assert ran[FELL_BACK] == "float: no integer kernel matched"


def test_without_a_checkpoint_the_quantized_layers_are_known(tmp_path: Path) -> None:
    layers = collect(make_run(tmp_path / "run", checkpoint=False))["layers"]
    assert {layer["layer"] for layer in layers} == set(LAYERS) - {KEPT_IN_FLOAT}
    assert {(layer["format"], layer["weights"]) for layer in layers} == {("quantized", None)}


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    file = Workspace(root).checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(b"{}")
    with pytest.raises(InvalidInputError, match=r"diffusion_pytorch_model\.safetensors: not readable"):
        collect(root)


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("distill", RecoverConfig(steps=77), {"kind": "recover", "steps": 77}),
        ("quantize", QuantizeConfig(), {}),
        ("quantize", QuantizeConfig.model_validate({"bounds": {"max_size_mib": 3.0}}), {"bounds.max_size_mib": 3.0}),
    ],
)
def test_only_settings_that_differ_from_the_defaults_are_shown(
    name: str, config: StageConfig, expected: dict[str, object]
) -> None:
    assert changed_settings(name, config.model_dump(mode="json")) == expected


def test_settings_of_another_version_are_all_shown() -> None:
    assert changed_settings("quantize", {"format": "int8", "later": {"setting": 1}}) == {
        "format": "int8",
        "later.setting": 1,
    }
    assert changed_settings("unheard of", {"a": 1}) == {"a": 1}


def test_the_lineage_runs_from_the_checkpoint_to_the_bundle(tmp_path: Path) -> None:
    facts = collect(make_run(tmp_path / "run", 4))
    lineage = facts["lineage"]
    hashes = [lineage["checkpoint"], *(stage["after"] for stage in lineage["stages"])]
    assert hashes == [f"{i:064x}" for i in range(5)] and lineage["bundle"] == facts["bundle"]["hash"]
    assert [stage["stage"] for stage in lineage["stages"]] == ["schedule", "prune", "distill", "quantize"]
    assert not any(stage["earlier"] for stage in lineage["stages"])


def test_stages_before_the_run_are_marked(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 4)
    Workspace(root).inputs.write_text(json.dumps({"teacher": "f" * 64, "checkpoint": f"{2:064x}"}))
    assert [stage["earlier"] for stage in collect(root)["lineage"]["stages"]] == [True, True, False, False]


def test_losses_are_those_of_the_stages_of_the_bundle_and_few_points(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", 5)
    run = Workspace(root)
    stale = run.stage(2, "distill", "of another recipe")  # left by an earlier recipe in this folder
    stale.mkdir()
    (stale / "diffpress.json").write_text('{"hash": "other"}')
    run.logs(stale).mkdir(parents=True)
    (run.logs(stale) / "losses.csv").write_text("step,loss\n1,5.0\n")
    (curve,) = collect(root)["training"]
    assert (curve["stage"], curve["what"], curve["steps"]) == (3, "distill recover", 500)
    assert len(curve["points"]) <= SHOWN_POINTS and curve["points"][-1][0] == 500
    step, mean, low, high = curve["points"][0]
    assert step == 3 and (low, high) == (pytest.approx(1 / 3, abs=1e-6), 1.0)
    assert mean == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, abs=1e-6)


def test_the_sampling_plans_have_the_signal_to_noise_ratio_of_each_evaluation(tmp_path: Path) -> None:
    facts = collect(make_run(tmp_path / "run"))
    for name, steps in (("baseline", TEACHER_STEPS), ("bundle", BUNDLE_STEPS)):
        plan = facts[name]["plan"]
        assert plan["evaluations"] == len(plan["levels"]) == len(plan["timesteps"]) == steps
    curve = dict(map(tuple, facts["schedule"]))
    assert all(abs(curve[t] - ratio) < 0.01 for t, ratio in facts["bundle"]["plan"]["levels"])
    assert all(abs(ratio) <= MAX_DB for ratio in curve.values())


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="not the folder of a compress run"):
        collect(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"rows": [1]}', '{"rows": [{"name": "a"}]}', "no JSON"])
def test_a_file_that_is_no_benchmark_is_refused_by_its_name(text: str, tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    Workspace(root).bench.write_text(text)
    with pytest.raises(InvalidInputError, match=r"bench\.json: "):
        collect(root)
