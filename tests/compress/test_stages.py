"""compress/stages.py: one table has all stages, and nothing else must be changed to add one."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

import diffpress as dp
from diffpress.compress import stages
from diffpress.compress.config import Config, StageConfig
from diffpress.compress.distillation.distill import KINDS
from diffpress.compress.recipe import SECTIONS, Recipe
from diffpress.compress.recipe_schema import recipe_schema
from diffpress.compress.stages import STAGES, OrderRule, Stage, StageDef, check_order
from diffpress.runtime.errors import InvalidInputError

ROOT = Path(__file__).parents[2]


class BlurConfig(StageConfig):
    """Blur the weights."""

    radius: int = Field(1, ge=1, description="Radius of the blur.")


def all_configs(found: type[Config] = Config) -> set[type[Config]]:
    return {found}.union(*(all_configs(config) for config in found.__subclasses__()))


def test_every_setting_has_a_description() -> None:
    configs = {config for config in all_configs() if config.__module__.startswith("diffpress.")}
    assert {*SECTIONS.values(), *(config for stage in STAGES.values() for config in stage.configs)} <= configs
    for config in configs:
        for name, field in config.model_fields.items():
            assert re.fullmatch(r"[A-Z0-9\[a-z].{8,}\.", field.description or ""), f"{config.__name__}.{name}"


def test_the_functions_of_all_stages_and_kinds_exist() -> None:
    functions: list[Any] = [*(stage.run for stage in STAGES.values()), *(kind.run for kind in KINDS.values())]
    for function in functions:
        with pytest.raises(TypeError, match="missing"):
            function()


def test_reading_a_recipe_does_not_import_torch() -> None:
    code = (
        "import sys, diffpress as dp; dp.Recipe.load('smallest'); import diffpress.compress.recipe_schema as s; "
        "s.recipe_schema(); print([n for n in ('torch', 'diffusers', 'onnx', 'openvino') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_new_stage_is_one_entry_of_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order = (OrderRule(("prune",), ": it blurs the kept channels", required=True), OrderRule(("quantize",), ": no"))
    blur = StageDef("blur", BlurConfig, lambda checkpoint, config, ctx: checkpoint, order)
    monkeypatch.setitem(stages.STAGES, "blur", blur)
    file = tmp_path / "r.yaml"
    file.write_text("stages: [prune, {blur: {radius: 3}}]")
    assert Recipe.load(file, ["blur.radius=5"]).stages[1] == Stage("blur", BlurConfig(radius=5))
    assert Recipe.of([dp.Prune(), BlurConfig()]).stages[1].name == "blur"
    with pytest.raises(InvalidInputError, match=r"stages\[0\]: blur must come after prune: it blurs the kept channels"):
        Recipe.of([BlurConfig()])
    with pytest.raises(InvalidInputError, match=r"diffpress\.Blur\.radius: .*greater than or equal to 1, found 0"):
        BlurConfig(radius=0)
    assert recipe_schema()["$defs"]["BlurConfig"]["properties"]["radius"]["minimum"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_only_few_step_kinds_fix_the_network_and_its_plan(kind: str) -> None:
    settings = {"start_steps": 2, "sample_steps": 1} if kind == "progressive" else {}
    distilled = [Stage("prune", dp.Prune()), Stage("distill", KINDS[kind].config(**settings))]
    later = [Stage("schedule", dp.Schedule()), Stage("prune", dp.Prune()), Stage("distill", dp.Recover())]
    for stage in later:
        if KINDS[kind].few_step:
            with pytest.raises(
                InvalidInputError, match=rf"{stage.name}.* cannot come after distill: {{kind: {kind}}}, wh"
            ):
                check_order([*distilled, stage], "r")
        else:
            check_order([*distilled, stage], "r")
    check_order([*distilled, Stage("distill", dp.Guidance()), Stage("quantize", dp.Quantize())], "r")


def test_a_rule_can_be_for_one_kind_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = OrderRule(("schedule",), ": it needs its own plan", only="distill: {kind: score}")
    monkeypatch.setitem(stages.STAGES, "distill", replace(STAGES["distill"], ordering=(rule,)))
    before = Stage("schedule", dp.Schedule())
    check_order([before, Stage("distill", dp.Consistency())], "r")
    with pytest.raises(InvalidInputError, match=r"score\} cannot come after schedule: it needs its own plan"):
        check_order([before, Stage("distill", dp.Score())], "r")


def test_distillation_and_qat_train() -> None:
    trains = {
        stage: STAGES[stage].trains(config)
        for stage, config in (("prune", dp.Prune()), ("schedule", dp.Schedule()), ("distill", dp.Score()))
    }
    assert trains == {"prune": False, "schedule": False, "distill": True}
    quantize: Any = STAGES["quantize"]
    assert not quantize.trains(dp.Quantize()) and quantize.trains(dp.Quantize(qat=True))


def test_a_public_name_is_the_config_that_a_recipe_makes() -> None:
    recipe = Recipe.load("quick")
    kinds = {"schedule": dp.Schedule, "prune": dp.Prune, "distill": dp.Recover, "quantize": dp.Quantize}
    assert [type(stage.config) for stage in recipe.stages] == [kinds[stage.name] for stage in recipe.stages]
    assert Recipe.of([stage.config for stage in recipe.stages]).stages == recipe.stages
    assert repr(dp.Prune(ratio=0.5)).startswith("Prune(kind='width', method='taylor', ratio=0.5, ")
