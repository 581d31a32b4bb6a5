"""A recipe: one YAML or JSON file that describes a whole run. It is read, checked and ordered before any work begins.

    seed: 0
    data: images.npz            # with captions, or prompts.txt, for a model of text
    teacher: sd15               # the model to distill from and to compare with, if not the checkpoint itself
    teacher_samples: 64         # training data for models of latents: samples of the teacher
    stages:
      - prune: {method: taylor, ratio: 0.3}
      - distill: {kind: recover, steps: 2000}
      - quantize: {format: int8}
    export: {targets: [onnx, openvino]}
    evaluate: {samples: 256, seeds: 3}
    gates: {frechet_ratio: 1.3}

Unknown keys are refused with their path and the nearest match. Paths are relative to the recipe's folder, or begin with
`calib_data/` for the built-in data. The resolved recipe of a run, `recipe.json` in its folder, is a recipe as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from diffpress.compress.builtin import CALIB_DATA, built_in_path, built_in_recipes, recipe_file
from diffpress.compress.config import (
    EVALUATE_FILES,
    Config,
    EvaluateConfig,
    ExportConfig,
    GatesConfig,
    StageConfig,
    input_error,
    unknown_key,
)
from diffpress.compress.recipe_text import read_recipe_text, yaml_value
from diffpress.compress.stages import STAGES, Stage, check_order, stages_of
from diffpress.runtime.errors import InvalidInputError, unknown_name
from diffpress.runtime.sampler import MAX_SEED

SECTIONS: dict[str, type[Config]] = {"export": ExportConfig, "evaluate": EvaluateConfig, "gates": GatesConfig}
KEYS = ("seed", "data", "teacher", "teacher_samples", "stages", *SECTIONS)

TEACHER_SAMPLES = 64


@dataclass(frozen=True)
class Recipe:
    """A checked recipe, every default filled in.

    `teacher` is the model to distill from and to compare with; None for the checkpoint itself.

    Examples:
        >>> import diffpress as dp
        >>> recipe = dp.Recipe.load("int8")
        >>> [stage.name for stage in recipe.stages]
        ['quantize']
    """

    seed: int
    data: Path | None
    teacher: str | None
    teacher_samples: int
    stages: tuple[Stage, ...]
    export: ExportConfig
    evaluate: EvaluateConfig | None
    gates: GatesConfig

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file, or a built-in recipe by its name, and check it.

        Args:
            path: A YAML or JSON file, or "quick", "int8" and so on (`diffpress recipes` lists them).
            overrides: Settings to replace, each "stages.prune.ratio=0.2" or shorter, "prune.ratio=0.2".

        Raises:
            InvalidInputError: For everything that is wrong with it: file or override, key and hint in one line.
        """
        file = recipe_file(path)
        if not file.exists() and not file.suffix:
            raise unknown_name("recipe", str(path), built_in_recipes())
        raw = _read(file)
        try:
            return _resolve(_overridden(raw, overrides), file)
        except InvalidInputError as error:
            culprit = _culprit(raw, overrides, file, str(error))
            if culprit is None:
                raise
            raise InvalidInputError(f"--set {culprit}: {str(error).removeprefix(f'{file}: ')}") from error

    @staticmethod
    def of(
        stages: Sequence[StageConfig],
        *,
        data: str | Path | None = None,
        teacher: str | Path | None = None,
        seed: int = 0,
        teacher_samples: int = TEACHER_SAMPLES,
    ) -> Recipe:
        """Make a recipe of stage objects (`diffpress.Prune`, `Quantize`, ...), without export, scores and gates.

        Args:
            stages: What to do, in this order.
            data: Training images (.npz), with captions for models of text, or prompts (.txt) for them.
            teacher: The model to distill from, if not the checkpoint itself.
            seed: Every random draw of the run follows from it.
            teacher_samples: How many samples of the teacher models of latents learn from.

        Raises:
            InvalidInputError: For an impossible order of stages, data that is not there, or a seed out of range.
        """
        where = Path("stages")
        raw = {"seed": seed, "data": data, "teacher": teacher, "teacher_samples": teacher_samples}
        recipe = _resolve(raw, where if data is None and teacher is None else Path.cwd() / "stages")
        made = stages_of(stages)
        check_order(made, str(where), is_student=teacher is not None)
        return replace(recipe, stages=made)

    def to_json(self) -> dict[str, Any]:
        """Return the resolved recipe as JSON, every default written out; it can be read from any folder."""
        return {
            "seed": self.seed,
            "data": file_reference(self.data) if self.data else None,
            "teacher": self.teacher,
            "teacher_samples": self.teacher_samples,
            "stages": [{stage.name: stage.config.model_dump(mode="json")} for stage in self.stages],
            "export": self.export.model_dump(mode="json"),
            "evaluate": _evaluate_json(self.evaluate) if self.evaluate else None,
            "gates": self.gates.model_dump(mode="json"),
        }


def _read(file: Path) -> dict[str, Any]:
    """Return the content of a recipe file, unchecked."""
    raw = read_recipe_text(file)
    if not isinstance(raw, dict):
        raise InvalidInputError(f"{file}: a recipe is a mapping with the keys {', '.join(KEYS)}")
    return raw


def _resolve(raw: dict[str, Any], path: Path) -> Recipe:
    for key in raw:
        if key not in KEYS:
            raise unknown_key(key, KEYS, f"{path}: ")
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise InvalidInputError(f"{path}: seed: {seed!r} must be a whole number from 0 to 2^63 - 1")
    entries = raw.get("stages") or []
    if not isinstance(entries, list):
        raise InvalidInputError(f"{path}: stages: must be a list of stages")
    stages = tuple(_stage(entry, i, path) for i, entry in enumerate(entries))
    teacher = _teacher(raw.get("teacher"), path)
    check_order(stages, str(path), is_student=teacher is not None)
    sections = {name: _section(raw, name, kind, path) for name, kind in SECTIONS.items()}
    gates, evaluate = sections["gates"] or GatesConfig(), sections["evaluate"]
    if gates.frechet_ratio is not None and evaluate is None:
        evaluate = EvaluateConfig()
    if evaluate is not None:
        named = {name: getattr(evaluate, name) for name in EVALUATE_FILES}
        found = {name: _existing(file, path, f"evaluate.{name}") for name, file in named.items() if file is not None}
        evaluate = evaluate.model_copy(update=found)
    made = raw.get("teacher_samples", TEACHER_SAMPLES)
    if not isinstance(made, int) or isinstance(made, bool) or made < 1:
        raise InvalidInputError(f"{path}: teacher_samples: {made!r} must be a whole number from 1")
    data = _data_path(raw.get("data"), path)
    return Recipe(seed, data, teacher, made, stages, sections["export"] or ExportConfig(), evaluate, gates)


def _existing(file: Path, path: Path, where: str) -> Path:
    """Return a file or folder that the recipe at `path` names."""
    found = built_in_path(file, path.parent).resolve()
    if not found.exists():
        raise InvalidInputError(f"{path}: {where}: {found} does not exist")
    return found


def _stage(entry: Any, index: int, path: Path) -> Stage:
    where = f"stages[{index}]"
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise InvalidInputError(
            f"{path}: {where}: a stage is one name with its settings, like  - prune: {{ratio: 0.3}}"
        )
    name, settings = next(iter(entry.items()))
    if name not in STAGES:
        raise unknown_key(name, tuple(STAGES), f"{path}: {where}")
    return Stage(name, _config(STAGES[name].config, settings, path, f"{where}.{name}"))


def _section(raw: dict[str, Any], name: str, kind: type[Config], path: Path) -> Any:
    return _config(kind, raw[name], path, name) if name in raw else None


def _config(kind: Any, settings: Any, path: Path, where: str) -> Any:
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise InvalidInputError(f"{path}: {where}: expected settings like {{key: value}}, found {settings!r}")
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        raise input_error(error, kind, f"{path}: {where}") from error


def _data_path(value: Any, path: Path) -> Path | None:
    if value is None:
        return None
    file = built_in_path(str(value), path.parent)
    if not file.is_file():
        raise InvalidInputError(f"{path}: data: {file} does not exist")
    return file


def _teacher(value: Any, path: Path) -> str | None:
    """Return what `load_checkpoint` takes: a folder or file that the recipe names, or else a hub id."""
    if value is None:
        return None
    if not isinstance(value, str | Path):
        raise InvalidInputError(f"{path}: teacher: {value!r} must be a folder, a .safetensors file or a hub id")
    module, colon, weights = str(value).partition(".py:")
    if colon:
        return f"{path.parent.absolute() / module}.py:{path.parent.absolute() / weights}"
    file = built_in_path(value, path.parent)
    return file_reference(file) if value and file.exists() else str(value)


def file_reference(file: Path) -> str:
    """Return how a recipe in any folder names this file."""
    found, built_in = file.resolve(), CALIB_DATA.resolve()
    return f"calib_data/{found.relative_to(built_in)}" if found.is_relative_to(built_in) else str(found)


def _evaluate_json(config: EvaluateConfig) -> dict[str, Any]:
    files = {name: file for name in EVALUATE_FILES if (file := getattr(config, name)) is not None}
    return config.model_dump(mode="json") | {name: file_reference(file) for name, file in files.items()}


def _overridden(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    changed = deepcopy(raw)
    for override in overrides:
        _override_(changed, override)
    return changed


def _culprit(raw: dict[str, Any], overrides: Sequence[str], file: Path, message: str) -> str | None:
    """Return the override that causes this error; None if the file has it without any, or if it is named already."""
    if message.startswith("--set "):
        return None
    for count in range(len(overrides) + 1):
        try:
            _resolve(_overridden(raw, overrides[:count]), file)
        except InvalidInputError as error:
            if str(error) == message:
                return overrides[count - 1] if count else None
    return None


def _override_(raw: dict[str, Any], override: str) -> None:
    """Apply `distill.steps=100`, or `stages.1.distill.steps=100` where a stage occurs more than once.

    A file is looked up in the current folder first, since the recipe may be a built-in one.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InvalidInputError(f"--set {override}: expected key=value, like stages.0.prune.ratio=0.2")
    *parents, last = key.split(".")
    if parents and parents[0] in STAGES:
        parents = ["stages", *parents]
    elif parents and parents[0] not in KEYS:
        raise unknown_key(parents[0], (*KEYS, *STAGES), f"--set {override}: ")
    node: Any = raw
    for part in parents:
        node = _child(node, part, override)
    if not isinstance(node, dict):
        raise InvalidInputError(f"--set {override}: '{key}' does not lead to a setting of the recipe")
    if value and key in ("data", "teacher", *(f"evaluate.{name}" for name in EVALUATE_FILES)) and Path(value).exists():
        node[last] = str(Path(value).absolute())
        return
    try:
        node[last] = yaml_value(value)
    except InvalidInputError as error:
        raise InvalidInputError(f"--set {override}: {error}") from error
    except yaml.YAMLError as error:
        raise InvalidInputError(f"--set {override}: '{value}' is not a YAML value") from error


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        node[:] = [{entry: {}} if isinstance(entry, str) else entry for entry in node]  # a bare "- prune"
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return node[int(part)]
    if isinstance(node, list):
        named = [entry for entry in node if isinstance(entry, dict) and part in entry]
        if len(named) == 1:
            return _child(named[0], part, override)
    if isinstance(node, dict):
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    raise InvalidInputError(f"--set {override}: the recipe has no single '{part}' there")
