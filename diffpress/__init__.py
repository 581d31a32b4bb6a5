"""diffpress makes a pretrained diffusion model deployable: prune, distill, quantize, export, sample without torch.

    import diffpress as dp

    model = dp.load("my-pipeline")
    small = dp.compress(model, [dp.Prune(ratio=0.3), dp.Recover(steps=2000), dp.Quantize("int8")], out="work")
    bundle = dp.export(small, "bundle", targets=["openvino"])
    with dp.Pipeline("bundle") as pipe:
        images = pipe("a lighthouse in the fog", seeds=range(4), steps=20)

Names are imported on first use: `import diffpress` alone loads neither torch nor an engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from diffpress.api import bench as bench
    from diffpress.api import compress as compress
    from diffpress.api import evaluate as evaluate
    from diffpress.api import export as export
    from diffpress.api import load as load
    from diffpress.compress.checkpoint import Checkpoint as Checkpoint
    from diffpress.compress.distillation.config import (
        ConsistencyConfig,
        GuidanceConfig,
        ProgressiveConfig,
        RecoverConfig,
        ScoreConfig,
        TrajectoryConfig,
    )
    from diffpress.compress.pruning.config import (
        PruneConfig,
        PruneDepthConfig,
        PruneLowRankConfig,
        PruneSparsityConfig,
    )
    from diffpress.compress.quantization.config import QuantizeConfig
    from diffpress.compress.recipe import Recipe as Recipe
    from diffpress.compress.sampling_schedule.config import ScheduleConfig
    from diffpress.runtime.bundle import Bundle as Bundle
    from diffpress.runtime.bundle import load_bundle as load_bundle
    from diffpress.runtime.caching.step_cache import StepCache as StepCache
    from diffpress.runtime.conditioning import Conditioning as Conditioning
    from diffpress.runtime.conditioning import TensorInput as TensorInput
    from diffpress.runtime.errors import DiffpressError as DiffpressError
    from diffpress.runtime.errors import EngineUnavailableError as EngineUnavailableError
    from diffpress.runtime.errors import GateFailedError as GateFailedError
    from diffpress.runtime.errors import InvalidInputError as InvalidInputError
    from diffpress.runtime.errors import MissingDependencyError as MissingDependencyError
    from diffpress.runtime.noise_schedule import betas_schedule as betas_schedule
    from diffpress.runtime.noise_schedule import flow_schedule as flow_schedule
    from diffpress.runtime.pipeline import Pipeline as Pipeline
    from diffpress.runtime.sampler import Step as Step
    from diffpress.runtime.sampling_plan import SamplingPlan as SamplingPlan
    from diffpress.runtime.sampling_plan import make_plan as make_plan
    from diffpress.runtime.spec import DenoiserSpec as DenoiserSpec

    Consistency = ConsistencyConfig
    Guidance = GuidanceConfig
    Progressive = ProgressiveConfig
    Prune = PruneConfig
    PruneDepth = PruneDepthConfig
    PruneLowRank = PruneLowRankConfig
    PruneSparsity = PruneSparsityConfig
    Quantize = QuantizeConfig
    Recover = RecoverConfig
    Schedule = ScheduleConfig
    Score = ScoreConfig
    Trajectory = TrajectoryConfig

# public name -> the module that has it, with the name there if it differs; `compress` and `export` are packages that
# can be called
_MODULES = {
    "Bundle": "diffpress.runtime.bundle",
    "Checkpoint": "diffpress.compress.checkpoint",
    "Conditioning": "diffpress.runtime.conditioning",
    "Consistency": "diffpress.compress.distillation.config:ConsistencyConfig",
    "DenoiserSpec": "diffpress.runtime.spec",
    "DiffpressError": "diffpress.runtime.errors",
    "EngineUnavailableError": "diffpress.runtime.errors",
    "GateFailedError": "diffpress.runtime.errors",
    "Guidance": "diffpress.compress.distillation.config:GuidanceConfig",
    "InvalidInputError": "diffpress.runtime.errors",
    "MissingDependencyError": "diffpress.runtime.errors",
    "Pipeline": "diffpress.runtime.pipeline",
    "Progressive": "diffpress.compress.distillation.config:ProgressiveConfig",
    "Prune": "diffpress.compress.pruning.config:PruneConfig",
    "PruneDepth": "diffpress.compress.pruning.config:PruneDepthConfig",
    "PruneLowRank": "diffpress.compress.pruning.config:PruneLowRankConfig",
    "PruneSparsity": "diffpress.compress.pruning.config:PruneSparsityConfig",
    "Quantize": "diffpress.compress.quantization.config:QuantizeConfig",
    "Recipe": "diffpress.compress.recipe",
    "Recover": "diffpress.compress.distillation.config:RecoverConfig",
    "SamplingPlan": "diffpress.runtime.sampling_plan",
    "Schedule": "diffpress.compress.sampling_schedule.config:ScheduleConfig",
    "Score": "diffpress.compress.distillation.config:ScoreConfig",
    "Step": "diffpress.runtime.sampler",
    "StepCache": "diffpress.runtime.caching.step_cache",
    "TensorInput": "diffpress.runtime.conditioning",
    "Trajectory": "diffpress.compress.distillation.config:TrajectoryConfig",
    "bench": "diffpress.api",
    "betas_schedule": "diffpress.runtime.noise_schedule",
    "evaluate": "diffpress.api",
    "flow_schedule": "diffpress.runtime.noise_schedule",
    "load": "diffpress.api",
    "load_bundle": "diffpress.runtime.bundle",
    "make_plan": "diffpress.runtime.sampling_plan",
}
_PACKAGES = ("compress", "export")

__all__ = ["__version__", *sorted((*_MODULES, *_PACKAGES))]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"diffpress.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'diffpress' has no attribute '{name}'")
    module, _, name_there = _MODULES[name].partition(":")
    try:
        value = getattr(importlib.import_module(module), name_there or name)
    except ModuleNotFoundError as error:
        from diffpress.runtime.errors import extra_for

        missing = extra_for(error, f"diffpress.{name}")
        if missing is None:
            raise
        raise missing from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
