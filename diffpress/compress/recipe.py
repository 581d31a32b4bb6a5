"""A recipe: one YAML file that describes a whole run. It is read, checked and ordered before any work begins.

    seed: 0
    data: images.npz            # prompts.txt for a model of text
    teacher_samples: 64         # training data for models of latents: samples of the teacher
    stages:
      - prune: {method: taylor, ratio: 0.3}
      - distill: {kind: recover, steps: 2000}
      - quantize: {format: int8}
    export: {targets: [onnx, openvino]}
    evaluate: {samples: 256, seeds: 3}
    gates: {frechet_ratio: 1.3}

Unknown keys are refused with their path and the nearest match. Paths are relative to the recipe's folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import ValidationError

from diffpress.compress.builtin import CALIB_DATA, RECIPES, recipe_file
from diffpress.compress.config import Config, EvaluateConfig, ExportConfig, GatesConfig
from diffpress.compress.distillation.config import FEW_STEP_KINDS
from diffpress.compress.distillation.config import KINDS as DISTILL_CONFIGS
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.sampling_schedule.config import ScheduleConfig
from diffpress.runtime.errors import InvalidInputError, unknown_name

STAGE_CONFIGS: dict[str, type[Config]] = {
    "schedule": ScheduleConfig,
    "prune": PruneConfig,
    "distill": DISTILL_CONFIGS["recover"],
    "quantize": QuantizeConfig,
}
SECTIONS: dict[str, type[Config]] = {"export": ExportConfig, "evaluate": EvaluateConfig, "gates": GatesConfig}
KEYS = ("seed", "data", "teacher_samples", "stages", *SECTIONS)

TEACHER_SAMPLES = 64

# stage -> the stages that may not come before it, and the reason
ORDER: dict[str, tuple[tuple[str, ...], str]] = {
    "prune": (("quantize",), "scales are calibrated for one set of channels"),
    "distill": (("quantize",), "training moves the weights away from their calibrated scales"),
    "schedule": (("quantize",), "scales are calibrated on the trajectory that is deployed"),
    "quantize": (("quantize",), "a model is quantized once"),
}


# keys and values of recipes for diffpress 0.1, by the stage or section that they stood in
RENAMED_KEYS: dict[str, dict[str, str]] = {
    "schedule": {"grid": "spacing"},
    "quantize": {
        "keep": "ignored_layers",
        "keep_fragile": "keep_sensitive_layers",
        "mixture": "format_overrides",
        "split_joins": "split_concats",
        "correct": "output_correction",
        "branch_rank": "svdquant_rank",
        "rounding_states": "rounding_samples",
    },
    "distill": {"paths": "trajectories", "path_steps": "trajectory_steps"},
    "export": {"fixed_plan": "fixed_timesteps"},
}
RENAMED_VALUES = {("rounding", "adaround"): "gptq"}


class Stage(NamedTuple):
    """One entry of `stages`: the stage's name and its checked configuration."""

    name: str
    config: Any


@dataclass(frozen=True)
class Recipe:
    """A checked recipe, every default filled in.

    Examples:
        >>> import diffpress as dp
        >>> recipe = dp.Recipe.load("int8")
        >>> [stage.name for stage in recipe.stages]
        ['quantize']
    """

    seed: int
    data: Path | None
    teacher_samples: int
    stages: tuple[Stage, ...]
    export: ExportConfig
    evaluate: EvaluateConfig | None
    gates: GatesConfig

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file, or a built-in recipe by its name, and check it.

        Args:
            path: A YAML file, or "quick", "int8" and so on (`diffpress recipes` lists them).
            overrides: Settings to replace, each "stages.prune.ratio=0.2" or shorter, "prune.ratio=0.2".

        Raises:
            InvalidInputError: For everything that is wrong with it: file, key and hint in one line.
        """
        file = recipe_file(path)
        if not file.exists() and not file.suffix:
            raise unknown_name("recipe", str(path), sorted(built_in.stem for built_in in RECIPES.glob("*.yaml")))
        return read_recipe(file, tuple(overrides))

    @staticmethod
    def of(
        stages: Sequence[Config],
        *,
        data: str | Path | None = None,
        seed: int = 0,
        teacher_samples: int = TEACHER_SAMPLES,
    ) -> Recipe:
        """Make a recipe of stage objects (`diffpress.Prune`, `Quantize`, ...), without export, scores and gates.

        Args:
            stages: What to do, in this order.
            data: Training images (.npz), or prompts (.txt) for models of text.
            seed: Every random draw of the run follows from it.
            teacher_samples: How many samples of the teacher models of latents learn from.

        Raises:
            InvalidInputError: For an impossible order of stages, data that is not there, or a seed out of range.
        """
        from diffpress.compress.stages import stage_name

        where = Path("stages")
        raw = {"seed": seed, "data": data, "teacher_samples": teacher_samples}
        recipe = _resolve(raw, where if data is None else Path.cwd() / "stages")
        made = tuple(Stage(stage_name(config), config) for config in stages)
        _check_order(made, where)
        return replace(recipe, stages=made)

    def to_json(self) -> dict[str, Any]:
        """Return the resolved recipe as JSON, every default written out."""
        return {
            "seed": self.seed,
            "data": str(self.data) if self.data else None,
            "teacher_samples": self.teacher_samples,
            "stages": [{stage.name: stage.config.model_dump(mode="json")} for stage in self.stages],
            "export": self.export.model_dump(mode="json"),
            "evaluate": self.evaluate.model_dump(mode="json") if self.evaluate else None,
            "gates": self.gates.model_dump(mode="json"),
        }


def read_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file, apply overrides (`key.path=value`) and check it; every problem is an InvalidInputError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"{path}: the recipe cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: not valid YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(raw, dict):
        raise InvalidInputError(f"{path}: a recipe is a mapping with the keys {', '.join(KEYS)}")
    for override in overrides:
        _override_(raw, override)
    return _resolve(raw, path)


def _resolve(raw: dict[str, Any], path: Path) -> Recipe:
    _refuse_unknown(raw, KEYS, str(path), "")
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise InvalidInputError(f"{path}: seed: {seed!r} must be a whole number from 0 to 2^63 - 1")
    entries = raw.get("stages") or []
    if not isinstance(entries, list):
        raise InvalidInputError(f"{path}: stages: must be a list of stages")
    stages = tuple(_stage(entry, i, path) for i, entry in enumerate(entries))
    _check_order(stages, path)
    sections = {name: _section(raw, name, kind, path) for name, kind in SECTIONS.items()}
    gates, evaluate = sections["gates"] or GatesConfig(), sections["evaluate"]
    if gates.frechet_ratio is not None and evaluate is None:
        evaluate = EvaluateConfig()
    made = raw.get("teacher_samples", TEACHER_SAMPLES)
    if not isinstance(made, int) or isinstance(made, bool) or made < 1:
        raise InvalidInputError(f"{path}: teacher_samples: {made!r} must be a whole number from 1")
    data = _data_path(raw.get("data"), path)
    return Recipe(seed, data, made, stages, sections["export"] or ExportConfig(), evaluate, gates)


def _stage(entry: Any, index: int, path: Path) -> Stage:
    where = f"stages[{index}]"
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise InvalidInputError(
            f"{path}: {where}: a stage is one name with its settings, like  - prune: {{ratio: 0.3}}"
        )
    name, settings = next(iter(entry.items()))
    _refuse_unknown({name: None}, tuple(STAGE_CONFIGS), str(path), where)
    config = STAGE_CONFIGS[name]
    if name == "distill" and isinstance(settings, dict) and "kind" in settings:
        if settings["kind"] not in DISTILL_CONFIGS:
            raise unknown_name(f"{path}: {where}.{name}: kind", str(settings["kind"]), DISTILL_CONFIGS)
        config = DISTILL_CONFIGS[settings["kind"]]
    return Stage(str(name), _config(config, settings, path, f"{where}.{name}"))


def _section(raw: dict[str, Any], name: str, kind: type[Config], path: Path) -> Any:
    return _config(kind, raw[name], path, name) if name in raw else None


def _config(kind: type[Config], settings: Any, path: Path, where: str) -> Config:
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise InvalidInputError(f"{path}: {where}: expected settings like {{key: value}}, found {settings!r}")
    check_keys(kind, settings, str(path), where)
    try:
        return kind(**settings)
    except ValidationError as error:
        raise first_error(error, f"{path}: {where}") from error


def check_keys(kind: type[Config], settings: dict[str, Any], source: str, where: str) -> None:
    """Raise InvalidInputError for a key that `kind` does not have, with its new name or the nearest match."""
    _refuse_unknown(settings, tuple(kind.model_fields), source, where)
    for key, value in settings.items():
        inner = _config_in(kind.model_fields[key].annotation)
        if inner is not None and isinstance(value, dict):
            _refuse_unknown(value, tuple(inner.model_fields), source, f"{where}.{key}")


def first_error(error: ValidationError, where: str) -> InvalidInputError:
    """Return the first problem that pydantic found, as one line."""
    first = error.errors()[0]
    if not first["loc"]:  # a rule between several keys
        return InvalidInputError(f"{where}: {first['msg'].removeprefix('Value error, ')}")
    key = ".".join(map(str, (where, *first["loc"])))
    return InvalidInputError(f"{key}: {first['msg']}, found {first['input']!r}")


def _config_in(annotation: Any) -> type[Config] | None:
    """The settings that a field holds, as `BoundsConfig | None` does."""
    kinds = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return next((kind for kind in kinds if issubclass(kind, Config)), None)


def _refuse_unknown(found: dict[Any, Any], known: tuple[str, ...], path: str, where: str) -> None:
    section = where.rpartition(".")[2]
    for key, value in found.items():
        if key in RENAMED_KEYS.get(section, {}):
            new = RENAMED_KEYS[section][key]
            raise InvalidInputError(f"{path}: {where}.{key} is now called '{new}'; rename the key")
        if isinstance(value, str) and (key, value) in RENAMED_VALUES:
            raise InvalidInputError(f"{path}: {where}.{key}: '{value}' is now called '{RENAMED_VALUES[key, value]}'")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
            raise InvalidInputError(f"{path}: unknown key '{f'{where}.{key}'.lstrip('.')}'; {hint}")


def _check_order(stages: tuple[Stage, ...], path: Path) -> None:
    for i, stage in enumerate(stages):
        banned, why = ORDER[stage.name]
        for earlier in stages[:i]:
            if earlier.name in banned:
                raise InvalidInputError(f"{path}: stages[{i}]: {stage.name} cannot come after {earlier.name}: {why}")
        few = next((s.config.kind for s in stages[:i] if s.name == "distill" and s.config.kind in FEW_STEP_KINDS), None)
        if few and (stage.name in ("prune", "schedule") or getattr(stage.config, "kind", None) == "recover"):
            raise InvalidInputError(
                f"{path}: stages[{i}]: {stage.name} cannot come after distill: {{kind: {few}}}, "
                "which is for one network and one plan"
            )
        recovers = stage.name == "distill" and stage.config.kind == "recover"
        if recovers and not any(s.name == "prune" for s in stages[:i]):
            raise InvalidInputError(
                f"{path}: stages[{i}]: distill: {{kind: recover}} must come after prune: nothing was lost yet"
            )


def _data_path(value: Any, path: Path) -> Path | None:
    if value is None:
        return None
    name = str(value)
    file = CALIB_DATA / name.removeprefix("calib_data/") if name.startswith("calib_data/") else path.parent / name
    if not file.is_file():
        raise InvalidInputError(f"{path}: data: {file} does not exist")
    return file


def _override_(raw: dict[str, Any], override: str) -> None:
    """Apply `distill.steps=100`, or `stages.1.distill.steps=100` where a stage occurs more than once."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InvalidInputError(f"--set {override}: expected key=value, like stages.0.prune.ratio=0.2")
    *parents, last = key.split(".")
    if parents and parents[0] in STAGE_CONFIGS:
        parents = ["stages", *parents]
    node: Any = raw
    for part in parents:
        node = _child(node, part, override)
    if not isinstance(node, dict):
        raise InvalidInputError(f"--set {override}: '{key}' does not lead to a setting of the recipe")
    try:
        node[last] = yaml.safe_load(value)
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
