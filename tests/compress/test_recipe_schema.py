"""compress/recipe_schema.py: the JSON schema accepts what recipes may be, and refuses what they may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from diffpress.compress.builtin import built_in_recipes
from diffpress.compress.recipe import KEYS, Recipe
from diffpress.compress.recipe_schema import recipe_schema
from diffpress.compress.stages import STAGES
from diffpress.runtime.errors import InvalidInputError

ROOT = Path(__file__).parents[2]
FILES = [*built_in_recipes().values(), *sorted((ROOT / "benchmarks" / "recipes").glob("*.yaml"))]


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = recipe_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(json.loads(json.dumps(schema)))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_recipes_of_the_project_are_valid(file: Path, validator: Draft202012Validator) -> None:
    assert len(FILES) >= 9
    validator.validate(yaml.safe_load(file.read_text()))


ACCEPTED = [
    "{}",
    "stages: [prune, distill, quantize]",
    "stages: [{prune: }, {distill: {steps: 3}}]",
    "stages: [{distill: {kind: score, guidance: null}}]",
    "stages: [{quantize: {format: w4a8, awq: true, calibration: mse, gptq: {samples: 8}}}]",
    "stages: [{quantize: {format_overrides: {conv_in: float}, bounds: {min_sqnr_db: 30}}}]",
    "stages: [{schedule: {timesteps: [9, 1.5], guidance_interval: [0.1, null]}}]",
    "export: {targets: [onnx, openvino], size: [8, 16], tensorrt: {tf32: true}}",
    "{export: , evaluate: {samples: 9}, gates: {frechet_ratio: 1.5}}",
]
REFUSED = [
    "sead: 1",
    "seed: -1",
    "seed: 9223372036854775808",
    "teacher_samples: 0",
    "data: [a]",
    "stages: {prune: {}}",
    "stages: [prun]",
    "stages: [{prun: {}}]",
    "stages: [{prune: {}, quantize: {}}]",
    "stages: [{prune: {ratoi: 0.3}}]",
    "stages: [{prune: {ratio: 1.0}}]",
    "stages: [{prune: {method: magic}}]",
    "stages: [prune, {distill: {kind: trajektory}}]",
    "stages: [prune, {distill: {sample_steps: 2}}]",
    "stages: [prune, {distill: {kind: trajectory, task_weight: 1}}]",
    "stages: [{quantize: {format: int3}}]",
    "stages: [{quantize: {qat: {stepz: 3}}}]",
    "export: {targets: [coreml]}",
    "export: {tensorrt: {fp8: true}}",
    "evaluate: {samples: 2}",
    "gates: {frechet: 1}",
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_the_reader_accepts_is_valid(text: str, validator: Draft202012Validator, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    Recipe.load(tmp_path / "r.yaml")
    validator.validate(yaml.safe_load(text))


@pytest.mark.parametrize("text", REFUSED)
def test_what_the_reader_refuses_is_invalid(text: str, validator: Draft202012Validator, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InvalidInputError):
        Recipe.load(tmp_path / "r.yaml")
    assert not validator.is_valid(yaml.safe_load(text))


def test_the_schema_has_every_key_with_its_default_and_description() -> None:
    schema = recipe_schema()
    assert schema["$schema"].endswith("draft/2020-12/schema") and schema["title"] == "diffpress recipe"
    assert tuple(schema["properties"]) == KEYS and all(key["description"] for key in schema["properties"].values())
    objects = schema["$defs"]
    configs = [config for stage in STAGES.values() for config in stage.configs]
    assert {config.__name__ for config in configs} | {"BoundsConfig", "TensorRTConfig", "GatesConfig"} <= set(objects)
    for config in configs:
        found = objects[config.__name__]
        assert set(found["properties"]) == set(config.model_fields) and found["additionalProperties"] is False
        for name, key in found["properties"].items():
            default = config.model_fields[name].get_default()
            expected: Any = default.model_dump(mode="json") if hasattr(default, "model_dump") else default
            assert key["default"] == (list(expected) if isinstance(expected, tuple) else expected)


def test_every_description_is_a_sentence_about_yaml() -> None:
    for found in recipe_schema()["$defs"].values():
        for text in (found["description"], *(key["description"] for key in found["properties"].values())):
            assert text[0] != " " and text.endswith(".") and "None" not in text and ">>>" not in text, text
