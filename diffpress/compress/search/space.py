"""What a search chooses: pruning, recovery, distillation, sampling plan, caching and number format of a recipe.

A choice depends on earlier ones, so the space is a function that draws one choice after the other from a trial of
Optuna; `stages_for` makes a recipe's stages of them. Amounts come from short lists rather than ranges: trials that
agree in their first stages share them through the stage cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.pruning.depth import removable_blocks
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import evaluations_per_step

Params = dict[str, Any]
Stages = list[dict[str, dict[str, Any]]]

NONE = "none"
WIDTH_METHODS = ("taylor", "diff_pruning", "magnitude")
MACS = (0.8, 0.65, 0.5, 0.35)  # fraction that remains
MAX_BLOCKS = 4
SHARES = (0.5, 1.0, 2.0)  # of the full budget of a training stage
SOLVERS = ("unipc_2", "dpmpp_2m", "ddim")
STEPS = (3, 4, 5, 6, 8, 10, 15)
CACHE_SPEEDUPS = (0.0, 1.25, 1.5)  # 0 for no step cache
FEW_STEPS = (1, 2, 4)
FORMATS = ("int8", "w4a8", "fp16")
MIN_SQNR_DB = (0.0, 20.0, 25.0)  # bound below which layers return to float; 0 for none
TRAJECTORY_STEPS = 12


class Chooser(Protocol):
    """What draws a choice: a trial of Optuna."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Return one of the choices."""
        ...


@dataclass(frozen=True)
class Space:
    """What can be chosen for one checkpoint.

    Attributes:
        prunings: Ways to prune it: `none`, criteria of width, `depth`.
        blocks: Numbers of blocks that depth pruning may remove.
        kinds: Kinds of distillation besides recovery.
        steps: Numbers of sampling steps without few-step distillation.
        is_distilled: Whether the checkpoint's few steps cannot be changed any more.
        train_steps: Optimizer steps of a training stage at its full budget.
        batch: Samples of a training step and of calibration.
    """

    prunings: tuple[str, ...]
    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    steps: tuple[int, ...]
    is_distilled: bool
    train_steps: int
    batch: int = 16


def space_of(checkpoint: Checkpoint, train_steps: int, comparable: bool) -> Space:
    """Return what can be chosen for the checkpoint.

    `comparable` leaves out kinds of distillation whose samples differ from the teacher's from the same noise: without
    features nothing else would show their quality.

    Raises:
        InvalidInputError: The checkpoint is quantized already.
    """
    if checkpoint.quantization is not None:
        raise InvalidInputError("search: the checkpoint is quantized already; name the one that it was made from")
    spec = checkpoint.spec
    try:
        blocks = tuple(range(1, min(MAX_BLOCKS, len(removable_blocks(checkpoint)) - 1) + 1))
    except InvalidInputError:
        blocks = ()
    if spec.distilled:
        return Space((NONE,), (), (NONE,), (), True, train_steps)
    kinds = (NONE, *(("guidance",) if evaluations_per_step(spec) > 1 else ()), "trajectory")
    return Space(
        prunings=(NONE, *WIDTH_METHODS, *(("depth",) if blocks else ())),
        blocks=blocks,
        kinds=kinds if comparable else (*kinds, "consistency"),
        steps=tuple(steps for steps in STEPS if steps < spec.plan.steps) or (spec.plan.steps,),
        is_distilled=False,
        train_steps=train_steps,
    )


def draw(trial: Chooser, space: Space) -> Params:
    """Draw one recipe's choices."""
    found: Params = {}

    def choose(name: str, choices: tuple[Any, ...]) -> Any:
        found[name] = choices[0] if len(choices) == 1 else trial.suggest_categorical(name, choices)
        return found[name]

    pruning = choose("prune", space.prunings)
    if pruning == "depth":
        choose("blocks", space.blocks)
    elif pruning != NONE:
        choose("macs", MACS)
    kind = choose("distill", space.kinds)
    has_own_plan = kind not in ("trajectory", "consistency") and not space.is_distilled
    if pruning != NONE:
        choose("recover", SHARES)
        if has_own_plan:
            choose("recover_timesteps", ("all", "plan"))
    if kind != NONE:
        choose("distill_budget", SHARES)
    if has_own_plan:
        choose("solver", SOLVERS)
        choose("steps", space.steps)
        choose("searched", (True, False))
        choose("cache", CACHE_SPEEDUPS)
    elif not space.is_distilled:
        choose("few_steps", FEW_STEPS)
    if choose("format", FORMATS) != "fp16":
        choose("min_sqnr_db", MIN_SQNR_DB)
    return found


def starting_points(space: Space) -> list[Params]:
    """Return choices that are tried first because they are known to do well, as far as the space has them."""
    plan = {"solver": "unipc_2", "steps": 5, "searched": True, "cache": 0.0}
    int8 = {"format": "int8", "min_sqnr_db": 0.0}
    pruned = {"prune": "diff_pruning", "macs": 0.8, "recover": 1.0}
    points = [
        {"prune": NONE, "distill": NONE, **plan, **int8},
        {**pruned, "recover_timesteps": "plan", "distill": NONE, **plan, **int8},
        {"prune": NONE, "distill": NONE, **plan, "steps": 8, **int8},
        {**pruned, "distill": "trajectory", "distill_budget": 1.0, "few_steps": 2, **int8},
    ]
    if space.is_distilled:
        return [{"prune": NONE, "distill": NONE, **int8}]
    return [point for point in points if point.get("steps", space.steps[0]) in space.steps]


def stages_for(params: Mapping[str, Any], space: Space, fraction: float = 1.0) -> Stages:
    """Return the stages of a recipe, with this fraction of the steps of its training stages."""
    steps = {name: _steps(space, params.get(name), fraction) for name in ("recover", "distill_budget")}
    schedule = _schedule(params)
    plan_first = bool(schedule) and params.get("recover_timesteps") == "plan"
    found: Stages = [*schedule] if plan_first else []
    found += _prune(params, space)
    if "recover" in params:
        timesteps = {"timesteps": "plan"} if plan_first else {}
        found.append({"distill": {"kind": "recover", **timesteps, **_training(steps["recover"], space)}})
    if params["distill"] != NONE:
        found.append({"distill": {"kind": params["distill"], **_distill(params, space, steps["distill_budget"])}})
    found += [] if plan_first else schedule
    if params["format"] != "fp16":
        bounds = {"bounds": {"min_sqnr_db": params["min_sqnr_db"]}} if params["min_sqnr_db"] else {}
        found.append({"quantize": {"format": params["format"], "samples": 16, "batch": space.batch, **bounds}})
    return found


def trains(params: Mapping[str, Any]) -> bool:
    """Return whether the recipe has a training stage."""
    return "recover" in params or params["distill"] != NONE


def precision_of(params: Mapping[str, Any]) -> str:
    """Return the precision of the export's float graphs."""
    return "fp16" if params["format"] == "fp16" else "fp32"


def _steps(space: Space, share: float | None, fraction: float) -> int:
    return max(1, round(space.train_steps * (share or 1.0) * fraction))


def _training(steps: int, space: Space) -> dict[str, Any]:
    """Return settings that short trainings share: the average of the weights spans a tenth of them."""
    ema = round(1.0 - 1.0 / max(2.0, 0.1 * steps), 4)
    return {"steps": steps, "batch": space.batch, "warmup": min(20, steps // 10), "ema": min(ema, 0.999)}


def _prune(params: Mapping[str, Any], space: Space) -> Stages:
    method = params["prune"]
    if method == NONE:
        return []
    if method == "depth":
        return [{"prune": {"kind": "depth", "blocks": params["blocks"]}}]
    gradients = {} if method == "magnitude" else {"batch": space.batch, "timesteps": 12}
    return [{"prune": {"method": method, "scope": "global", "target": {"macs": params["macs"]}, **gradients}}]


def _distill(params: Mapping[str, Any], space: Space, steps: int) -> dict[str, Any]:
    found = _training(steps, space)
    if params["distill"] != "guidance":
        found["sample_steps"] = params["few_steps"]
    if params["distill"] == "trajectory":
        full = _steps(space, params["distill_budget"], 1.0)  # the same trajectories at every budget
        found |= {"trajectories": min(max(4 * full, 128), 4096), "trajectory_steps": TRAJECTORY_STEPS}
    return found


def _schedule(params: Mapping[str, Any]) -> Stages:
    if "solver" not in params:
        return []
    found: dict[str, Any] = {"solver": params["solver"], "steps": params["steps"]}
    if params["searched"]:
        found |= {"search": "gits", "samples": 16, "fine": 40, "batch": 16}
    if params["cache"]:
        found["cache"] = {"kind": "forecast", "speedup": params["cache"], "samples": 16, "batch": 16}
    return [{"schedule": found}]
