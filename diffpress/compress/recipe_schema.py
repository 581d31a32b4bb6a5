"""JSON schema of a recipe (draft 2020-12), generated from the configs: editors complete and check recipes with it."""

from __future__ import annotations

import re
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from diffpress.compress.distillation import distill
from diffpress.compress.pruning import prune
from diffpress.compress.recipe import SECTIONS, TEACHER_SAMPLES
from diffpress.compress.stages import STAGES
from diffpress.runtime.sampler import MAX_SEED

DESCRIPTIONS = {
    "seed": "Seed of every random draw of the run.",
    "data": "Training samples: .npz with `x` uint8 [N, H, W(, C)] and `y` labels [N], or with `samples` float [N, ...] "
    "and the model's conditioning tensors by name. For models conditioned on text: .npz with `x` and `caption` [N], "
    "or prompts (.txt, one per line). Relative to the recipe; `calib_data/...` names the built-in data.",
    "teacher": "The model to distill from and to compare with, if not the checkpoint itself: a folder, a .safetensors "
    "file or a hub id.",
    "teacher_samples": "Number of teacher samples that models of latents train on.",
    "stages": "The stages, in the order in which they run.",
    "export": "Export of the result.",
    "evaluate": "Scores of the samples; left out, nothing is scored.",
    "gates": "Bounds that the result must meet.",
}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema: every stage and section with its defaults and descriptions; unknown keys are refused."""
    configs = {**{name: stage.config for name, stage in STAGES.items()}, **SECTIONS}
    found, definitions = TypeAdapter.json_schemas(
        [(name, "validation", TypeAdapter(config)) for name, config in configs.items()], schema_generator=_Generator
    )
    # a key without settings, as in '- prune:', has null
    settings = {name: {"anyOf": [found[name, "validation"], {"type": "null"}]} for name in configs}
    entries = [_object({name: settings[name]}, required=[name]) for name in STAGES]
    keys: dict[str, dict[str, Any]] = {
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED, "default": 0},
        "data": {"type": ["string", "null"], "default": None},
        "teacher": {"type": ["string", "null"], "default": None},
        "teacher_samples": {"type": "integer", "minimum": 1, "default": TEACHER_SAMPLES},
        "stages": {"type": "array", "items": {"oneOf": [*entries, {"enum": list(STAGES)}]}, "default": []},
        **{name: settings[name] for name in SECTIONS},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "diffpress recipe",
        **_object({name: {**key, "description": DESCRIPTIONS[name]} for name, key in keys.items()}),
        **definitions,
    }


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


class _Generator(GenerateJsonSchema):
    """Pydantic's schemas without its titles, described by the first paragraph of the docstring, in terms of YAML."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        made = super().model_schema(schema)
        made.pop("title", None)
        made["description"] = re.sub(r" \([\w/]+\.py\)", "", made["description"].partition("\n\n")[0])
        for name, key in made["properties"].items():
            key["description"] = re.sub(r"\bNone\b", "null", key["description"])
            # the kind of a stage is a constant, that of a step cache a choice with a default
            if name == "kind" and key.get("const", prune.DEFAULT_KIND) not in (
                distill.DEFAULT_KIND,
                prune.DEFAULT_KIND,
            ):
                made["required"] = ["kind"]
        return made

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        made = super().tagged_union_schema(schema)
        made.pop("discriminator", None)  # a keyword of OpenAPI
        return made

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False
