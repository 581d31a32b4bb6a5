"""compress/recipe.py: valid recipes are resolved with all defaults, invalid ones are refused before any stage."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from diffpress.cli.plan import add_arguments
from diffpress.compress.builtin import CALIB_DATA, RECIPES
from diffpress.compress.distillation.distill import KINDS
from diffpress.compress.recipe import Recipe
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import write_json

RECIPE = """
seed: 3
stages:
  - prune: {ratio: 0.25}
  - distill: {steps: 7}
  - quantize
export: {targets: [onnx, openvino]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """Read a recipe from its text."""

    def read(text: str = RECIPE, *overrides: str) -> Recipe:
        (tmp_path / "r.yaml").write_text(text)
        return Recipe.load(tmp_path / "r.yaml", overrides)

    return read


@pytest.fixture
def refused(recipe: Callable[..., Recipe]) -> Callable[..., None]:
    def check(text: str, *words: str, overrides: tuple[str, ...] = ()) -> None:
        with pytest.raises(InvalidInputError) as caught:
            recipe(text, *overrides)
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message

    return check


def test_a_resolved_recipe_writes_out_every_default_as_json(recipe: Callable[..., Recipe]) -> None:
    found = recipe().to_json()
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["seed", "data", "teacher", "teacher_samples", "stages", "export", "evaluate", "gates"]
    assert [list(stage) for stage in found["stages"]] == [["prune"], ["distill"], ["quantize"]]
    prune = found["stages"][0]["prune"]
    assert prune["ratio"] == 0.25 and prune["method"] == "taylor" and prune["scope"] == "local"
    assert found["stages"][1]["distill"]["steps"] == 7 and found["stages"][2]["quantize"]["format"] == "int8"
    assert found["export"]["targets"] == ["onnx", "openvino"] and found["export"]["revert_slower"] is False
    assert found["evaluate"] is None and found["seed"] == 3


def test_a_resolved_recipe_reads_back_unchanged(recipe: Callable[..., Recipe]) -> None:
    found = recipe().to_json()
    again = recipe(json.dumps({key: value for key, value in found.items() if value is not None}))
    assert again.to_json() == found


def test_an_empty_recipe_only_exports(recipe: Callable[..., Recipe]) -> None:
    found = recipe("{}")
    assert found.stages == () and found.export.targets == ("onnx",) and found.seed == 0


TWO_STEPS = "[{distill: {kind: trajectory, sample_steps: 2}}, "


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_built_in_recipes_are_valid(path: Path) -> None:
    assert Recipe.load(path).stages


def test_the_number_of_teacher_samples_is_read(recipe: Callable[..., Recipe], refused: Callable[..., None]) -> None:
    assert recipe("{}").teacher_samples == 64 and recipe("teacher_samples: 5").teacher_samples == 5
    for value in ("0", "-3", "2.5", "many", "true", "[4]"):
        refused(f"teacher_samples: {value}", "r.yaml", "teacher_samples", "a whole number from 1")


def test_a_gate_on_the_frechet_distance_enables_the_evaluation(recipe: Callable[..., Recipe]) -> None:
    assert recipe("gates: {frechet_ratio: 1.2}").evaluate is not None
    assert recipe("gates: {parity_sqnr_db: 20}").evaluate is None


def test_data_is_found_beside_the_recipe_and_in_the_built_in_folder(recipe: Callable[..., Recipe], npz: Path) -> None:
    assert recipe(f"data: {npz.name}").data == npz
    assert recipe("data: calib_data/calibration.npz").data == CALIB_DATA / "calibration.npz"


# --- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("sead: 1", "'sead'", "'seed'"),
        ("stage: []", "'stage'", "'stages'"),
        ("stages: [{prun: {ratio: 0.2}}]", "'stages[0].prun'", "'prune'"),
        ("stages: [{prune: {ratoi: 0.2}}]", "'stages[0].prune.ratoi'", "'ratio'"),
        ("stages: [schedule, {quantize: {formats: int8}}]", "'stages[1].quantize.formats'", "'format'"),
        ("export: {target: [onnx]}", "'export.target'", "'targets'"),
        ("evaluate: {sample: 9}", "'evaluate.sample'", "'samples'"),
        ("gates: {frechet: 1.1}", "'gates.frechet'", "'frechet_ratio'"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_match(
    text: str, key: str, nearest: str, refused: Callable[..., None]
) -> None:
    refused(text, "r.yaml", f"unknown key {key}", f"did you mean {nearest}?")


def test_an_unknown_key_without_a_near_match_lists_the_known_keys(refused: Callable[..., None]) -> None:
    refused("xyzzy: 1", "'xyzzy'", "known are seed, data, teacher, teacher_samples, stages, export, evaluate, gates")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("seed: one", "seed: 'one'"),
        ("seed: -1", "seed: -1"),
        ("seed: true", "seed: True"),
        ("seed: 99999999999999999999", "seed"),
        ("stages: prune", "stages"),
        ("stages: {prune: {}}", "stages"),
        ("stages: [[prune]]", "stages[0]"),
        ("stages: [{prune: {}, distill: {}}]", "stages[0]"),
        ("stages: [{prune: 0.3}]", "stages[0].prune: "),
        ("stages: [{prune: {ratio: much}}]", "stages[0].prune.ratio: "),
        ("stages: [{prune: {ratio: 1.0}}]", "stages[0].prune.ratio: "),
        ("stages: [{prune: {ratio: .nan}}]", "stages[0].prune.ratio: "),
        ("stages: [{prune: {method: magic}}]", "stages[0].prune.method: "),
        ("stages: [{schedule: {steps: 0}}]", "stages[0].schedule.steps: "),
        ("stages: [{schedule: {solver: magic}}]", "magic"),
        ("stages: [{schedule: {spacing: sideways}}]", "sideways"),
        ("stages: [prune, {distill: {steps: 1.5}}]", "stages[1].distill.steps: "),
        ("stages: [{quantize: {format: int3}}]", "stages[0].quantize.format: "),
        ("export: {targets: [coreml]}", "export.targets.0: "),
        ("export: [onnx]", "export: "),
        ("evaluate: {samples: 2}", "evaluate.samples: "),
        ("gates: {frechet_ratio: -1}", "gates.frechet_ratio: "),
        ("data: nowhere.npz", "nowhere.npz does not exist"),
        ("data: [a, b]", "data: "),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_path(
    text: str, where: str, refused: Callable[..., None]
) -> None:
    refused(text, "r.yaml", where)


@pytest.mark.parametrize("text", ["stages: [", "a: b: c", "\t- x", "!!python/object:os.system {}", "\x00"])
def test_broken_yaml_is_refused(text: str, refused: Callable[..., None]) -> None:
    refused(text, "r.yaml", "not valid YAML")


REPEATED = [
    ("seed: 1\nstages: [prune]\nseed: 2\n", "'seed'", "line 3"),
    ("stages:\n  - prune: {ratio: 0.1}\nstages: [quantize]\n", "'stages'", "line 3"),
    ("stages:\n  - prune: {ratio: 0.1, method: taylor, ratio: 0.3}\n", "'ratio'", "line 2"),
    ('export:\n  targets: [onnx]\n  "targets": [openvino]\n', "'targets'", "line 3"),
]


@pytest.mark.parametrize(("text", "key", "line"), REPEATED)
def test_a_key_that_is_given_twice_is_refused_by_name(
    text: str, key: str, line: str, refused: Callable[..., None]
) -> None:
    refused(text, "r.yaml", key, line, "twice")


@pytest.mark.parametrize(
    ("text", "key"),
    [('{"seed": 1, "seed": 2}', "'seed'"), ('{"stages": [{"prune": {"ratio": 0.1, "ratio": 0.3}}]}', "'ratio'")],
)
def test_a_key_that_a_json_recipe_gives_twice_is_refused_by_name(text: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InvalidInputError, match=f"r.json: key {key} is given twice; keep one of them"):
        Recipe.load(tmp_path / "r.json")


def test_stages_may_repeat_a_key_and_a_merge_key_may_be_overridden(recipe: Callable[..., Recipe]) -> None:
    text = "stages:\n- prune: &first {ratio: 0.1, method: taylor}\n- prune: {<<: *first, ratio: 0.2}\n"
    assert [stage.config.ratio for stage in recipe(text).stages] == [0.1, 0.2]
    # the second mapping is merged into the third, after its own merge key is expanded
    chain = f"{text}- prune: &second {{<<: *first, ratio: 0.3}}\n- prune: {{<<: *second, ratio: 0.4}}\n"
    assert [stage.config.ratio for stage in recipe(chain).stages] == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("text", ["", "just words", "- prune", "5"])
def test_a_file_that_is_no_mapping_is_refused(text: str, refused: Callable[..., None]) -> None:
    refused(text, "r.yaml", "a recipe is a mapping", "stages")


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(InvalidInputError, match=f"{path.name}: the recipe cannot be read"):
            Recipe.load(path)


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InvalidInputError, match=r"r.yaml: not valid YAML"):
        Recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("stages", "where", "why"),
    [
        ("[quantize, prune]", "stages[1]: prune cannot come after quantize", "one set of channels"),
        ("[prune, quantize, distill]", "stages[2]: distill cannot come after quantize", "calibrated scales"),
        ("[quantize, schedule]", "stages[1]: schedule cannot come after quantize", "trajectory"),
        ("[quantize, quantize]", "stages[1]: quantize cannot come after quantize", "once"),
        (TWO_STEPS + "schedule]", "stages[1]: schedule cannot come after distill: {kind: trajectory}", "one plan"),
        (TWO_STEPS + "prune]", "stages[1]: prune cannot come after distill: {kind: trajectory}", "one network"),
        ("[distill]", "stages[0]: distill", "must come after prune"),
        ("[distill, prune]", "stages[0]: distill", "must come after prune"),
    ],
)
def test_an_impossible_order_is_refused_with_the_reason(
    stages: str, where: str, why: str, refused: Callable[..., None]
) -> None:
    refused(f"stages: {stages}", "r.yaml", where, why)


@pytest.mark.parametrize(
    "stages", ["[schedule, prune, distill, quantize]", "[prune, prune, distill, schedule, quantize]"]
)
def test_a_possible_order_is_kept(stages: str, recipe: Callable[..., Recipe]) -> None:
    assert [stage.name for stage in recipe(f"stages: {stages}").stages] == stages.strip("[]").split(", ")


def test_a_kind_of_distillation_accepts_only_its_own_settings(
    refused: Callable[..., None], recipe: Callable[..., Recipe]
) -> None:
    stages = recipe("stages: [{distill: {kind: trajectory, sample_steps: 3}}]").stages
    assert (stages[0].config.kind, stages[0].config.sample_steps, stages[0].config.trajectories) == (
        "trajectory",
        3,
        4096,
    )
    refused("stages: [{distill: {kind: trajektory}}]", "stages[0].distill: kind", "did you mean 'trajectory'?")
    refused("stages: [{distill: {kind: trajectory, task_weight: 1}}]", "unknown key 'stages[0].distill.task_weight'")


# --- overrides -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override", ["stages.0.prune.ratio=0.4", "stages.prune.ratio=0.4"], ids=["by index", "by the stage's name"]
)
def test_a_setting_is_overridden(override: str, recipe: Callable[..., Recipe]) -> None:
    assert recipe(RECIPE, override).stages[0].config.ratio == 0.4


def test_overrides_apply_in_order_and_at_every_level(recipe: Callable[..., Recipe]) -> None:
    found = recipe(
        RECIPE,
        "seed=5",
        "stages.distill.steps=9",
        "stages.distill.steps=11",
        "evaluate.samples=64",
        "export.targets=[onnx]",
        "gates.parity_sqnr_db=12.5",
    )
    assert found.evaluate is not None
    assert found.seed == 5 and found.stages[1].config.steps == 11 and found.evaluate.samples == 64
    assert found.export.targets == ("onnx",) and found.gates.parity_sqnr_db == 12.5


@pytest.mark.parametrize("text", ["stages: [{prune: {}}]", "stages: [{prune: }]", "stages: [prune]"])
@pytest.mark.parametrize("override", ["stages.0.prune.ratio=0.4", "stages.prune.ratio=0.4"])
def test_a_stage_without_settings_accepts_an_override(override: str, text: str, recipe: Callable[..., Recipe]) -> None:
    assert recipe(text, override).stages[0].config.ratio == 0.4


def test_the_example_in_the_help_works() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    example = re.search(r"like (\S+=\S+\b)", " ".join(parser.format_help().split()))
    assert example is not None
    Recipe.load(RECIPES / "quick.yaml", (example[1],))


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("seed", "expected key=value"),
        ("=5", "expected key=value"),
        ("stages.prune.ratoi=0.4", "'ratio'"),
        ("stages.9.prune.ratio=0.4", "'9'"),
        ("stages.schedule.steps=4", "'schedule'"),
        ("stages.0=5", "stages.0"),
        ("seed.x=5", "seed"),
        ("stages.prune.ratio=[", "stages.prune.ratio=["),
        ("export={targets: [onnx], targets: [openvino]}", "key 'targets' is given twice"),
    ],
)
def test_an_override_of_an_unknown_setting_is_refused(override: str, word: str, refused: Callable[..., None]) -> None:
    refused(RECIPE, word, overrides=(override,))


def test_a_name_shared_by_two_stages_is_refused(refused: Callable[..., None]) -> None:
    refused("stages: [prune, prune]", "no single 'prune'", overrides=("stages.prune.ratio=0.4",))


def test_quantization_bounds_are_read_and_an_invalid_one_is_named_with_its_path(
    recipe: Callable[..., Recipe], refused: Callable[..., None]
) -> None:
    found = recipe("stages: [{quantize: {bounds: {min_sqnr_db: 30, max_size_mib: 4, engine: openvino}}}]").stages[0]
    assert found.config.bounds.min_sqnr_db == 30 and found.config.bounds.max_latency_ratio is None
    assert found.config.bounds.engine == "openvino"
    wrong = "stages: [{quantize: {bounds: {%s}}}]"
    refused(wrong % "min_sqnr: 30", "stages[0].quantize.bounds.min_sqnr", "did you mean 'min_sqnr_db'?")
    refused(wrong % "", "stages[0].quantize.bounds", "give at least one of min_sqnr_db, ")
    refused(wrong % "max_size_mib: 0", "stages[0].quantize.bounds.max_size_mib", "greater than 0")


# --- recipes of runs, and who is to blame ------------------------------------------------------------------------


def test_the_resolved_recipe_of_a_run_is_a_recipe(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(npz.parent)  # the recipe names its data relative to itself, the run's folder is elsewhere
    Path("r.yaml").write_text(RECIPE + f"data: {npz.name}\n")
    found = Recipe.load("r.yaml", ("evaluate.samples=8", "quantize.qat.learning_rate=1.0e-07"))
    again = tmp_path / "elsewhere" / "recipe.json"
    write_json(again, {key: value for key, value in found.to_json().items() if value is not None})
    monkeypatch.chdir(tmp_path)
    assert Recipe.load(again).to_json() == found.to_json() and Recipe.load(again).data == npz.resolve()
    assert Recipe.load(again, ("seed=9",)).seed == 9


@pytest.mark.parametrize(
    "text",
    [
        *(path.read_text() for path in sorted(RECIPES.glob("*.yaml"))),
        "stages: [schedule, prune, distill, quantize]",
        "stages: [{schedule: {search: gits, refine: 2}}]",
        "stages: [{schedule: {timesteps: [900, 500, 100]}}]",
        *(f"stages: [prune, {{distill: {{kind: {kind}}}}}]" for kind in KINDS),
        "stages: [{quantize: {format: w4a8, awq: true, calibration: mse}}]",
        "stages: [{quantize: {smoothquant: {alpha: 0.3}, qat: true, ignored_layers: [up], gptq: {samples: 3}}}]",
        "stages: [{quantize: {svdquant: true, format_overrides: {up: float}, bounds: {min_sqnr_db: 20}}}]",
        "export: {targets: [tensorrt], tensorrt: {sizes: [[8, 8], [16, 16]]}}",
    ],
)
def test_every_resolved_recipe_reads_back_unchanged(text: str, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    found = recipe(text).to_json()
    write_json(tmp_path / "recipe.json", {key: value for key, value in found.items() if value is not None})
    assert Recipe.load(tmp_path / "recipe.json").to_json() == found


def test_built_in_data_keeps_its_name_in_a_resolved_recipe(recipe: Callable[..., Recipe]) -> None:
    named = "calib_data/calibration.npz"
    assert recipe(f"data: {named}").to_json()["data"] == named
    found = recipe(f"evaluate: {{features: calib_data/features.onnx, reference: {named}}}")
    assert found.evaluate is not None and found.evaluate.reference == (CALIB_DATA / "calibration.npz").resolve()
    assert found.to_json()["evaluate"]["features"] == "calib_data/features.onnx"


def test_broken_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{'seed': 1}")
    with pytest.raises(InvalidInputError, match=r"recipe.json: not valid JSON"):
        Recipe.load(tmp_path / "recipe.json")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantize.fromat=int8"], "--set quantize.fromat=int8: unknown key 'stages[0].quantize.fromat'; did you mean"),
        (["quantize.samples=0"], "--set quantize.samples=0: stages[0].quantize.samples: "),
        (["quantize.samples=abc", "seed=3"], "--set quantize.samples=abc: stages[0].quantize.samples: "),
        (["seed=3", "seed=-1"], "--set seed=-1: seed: -1"),
        (["quantise.samples=4"], "--set quantise.samples=4: unknown key 'quantise'; did you mean 'quantize'?"),
        (["sead=1"], "--set sead=1: unknown key 'sead'; did you mean 'seed'?"),
        (["data=nope.npz"], "--set data=nope.npz: data: "),
        (["evaluate.samples=4"], "--set evaluate.samples=4: evaluate.samples: "),
        (["stages=[distill]"], "--set stages=[distill]: stages[0]: distill: {kind: recover} must come after prune"),
    ],
)
def test_a_mistake_in_an_override_names_the_override_and_not_the_recipe(overrides: list[str], message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Recipe.load("int8", overrides)
    assert str(caught.value).startswith(message) and "int8.yaml" not in str(caught.value).split(";")[0]


def test_a_mistake_in_the_file_names_the_file_even_with_overrides(refused: Callable[..., None]) -> None:
    refused("stages: [{prune: {ratoi: 0.2}}]", "r.yaml: unknown key 'stages[0].prune.ratoi'", overrides=("seed=1",))


def test_an_override_can_repair_a_recipe(recipe: Callable[..., Recipe]) -> None:
    assert recipe("seed: -1", "seed=1").seed == 1


def test_data_in_an_override_is_relative_to_the_current_folder_first(
    npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(npz.parent)
    assert Recipe.load("int8", (f"data={npz.name}",)).data == npz.resolve()


# --- a student and its teacher -----------------------------------------------------------------------------------


def test_a_teacher_is_found_beside_the_recipe_in_the_built_in_data_and_on_a_hub(
    recipe: Callable[..., Recipe], npz: Path
) -> None:
    (npz.parent / "model").mkdir()
    assert recipe("teacher: model").teacher == str(npz.parent / "model")
    assert recipe("teacher: calib_data/icons/teacher").teacher == "calib_data/icons/teacher"
    assert recipe("teacher: owner/name").teacher == "owner/name"
    assert recipe("{}").teacher is None


def test_what_must_come_before_a_stage_may_have_made_the_student(
    recipe: Callable[..., Recipe], refused: Callable[..., None]
) -> None:
    assert [stage.name for stage in recipe("{teacher: owner/name, stages: [distill]}").stages] == ["distill"]
    refused("{teacher: owner/name, stages: [quantize, prune]}", "prune cannot come after quantize")
    refused("teacher: [1]", "teacher: [1] must be a folder")
