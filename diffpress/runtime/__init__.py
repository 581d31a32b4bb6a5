"""diffpress.runtime: bundle in, images out, with numpy and an engine; never torch.

    from contextlib import closing
    from diffpress.runtime import generate, load_bundle, open_engine

    bundle = load_bundle("bundle")
    with closing(open_engine(bundle)) as engine:
        images = generate(engine, bundle.spec_for(engine.name), seeds=range(16))

Names are imported on first use: `import diffpress.runtime` itself loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpress.runtime.bundle import Bundle, load_bundle
    from diffpress.runtime.engines import open_engine
    from diffpress.runtime.errors import DiffpressError, InvalidInputError
    from diffpress.runtime.noise_schedule import NoiseSchedule
    from diffpress.runtime.sampler import generate, generate_batches, sample
    from diffpress.runtime.sampling_plan import SamplingPlan, make_plan
    from diffpress.runtime.spec import DenoiserSpec

_HOMES = {
    "Bundle": "diffpress.runtime.bundle",
    "load_bundle": "diffpress.runtime.bundle",
    "open_engine": "diffpress.runtime.engines",
    "InvalidInputError": "diffpress.runtime.errors",
    "DiffpressError": "diffpress.runtime.errors",
    "generate": "diffpress.runtime.sampler",
    "generate_batches": "diffpress.runtime.sampler",
    "sample": "diffpress.runtime.sampler",
    "make_plan": "diffpress.runtime.sampling_plan",
    "DenoiserSpec": "diffpress.runtime.spec",
    "NoiseSchedule": "diffpress.runtime.noise_schedule",
    "SamplingPlan": "diffpress.runtime.sampling_plan",
}

__all__ = [
    "Bundle",
    "DenoiserSpec",
    "DiffpressError",
    "InvalidInputError",
    "NoiseSchedule",
    "SamplingPlan",
    "generate",
    "generate_batches",
    "load_bundle",
    "make_plan",
    "open_engine",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffpress.runtime' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
