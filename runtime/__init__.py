"""diffpress.runtime: bundle in, images out, with numpy and an engine; never torch.

    from contextlib import closing
    from runtime import generate, load_bundle, open_engine

    bundle = load_bundle("bundle")
    with closing(open_engine(bundle)) as engine:
        images = generate(engine, bundle.spec_for(engine.name), seeds=range(16))

Names are imported on first use: `import runtime` itself loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.bundle import Bundle, load_bundle
    from runtime.engines import open_engine
    from runtime.errors import BadInput, DiffpressError
    from runtime.sampler import generate, generate_batches, sample
    from runtime.schedule import make_plan
    from runtime.spec import DenoiserSpec, NoiseSchedule, Plan

_HOMES = {
    "Bundle": "runtime.bundle",
    "load_bundle": "runtime.bundle",
    "open_engine": "runtime.engines",
    "BadInput": "runtime.errors",
    "DiffpressError": "runtime.errors",
    "generate": "runtime.sampler",
    "generate_batches": "runtime.sampler",
    "sample": "runtime.sampler",
    "make_plan": "runtime.schedule",
    "DenoiserSpec": "runtime.spec",
    "NoiseSchedule": "runtime.spec",
    "Plan": "runtime.spec",
}

__all__ = [
    "BadInput",
    "Bundle",
    "DenoiserSpec",
    "DiffpressError",
    "NoiseSchedule",
    "Plan",
    "generate",
    "generate_batches",
    "load_bundle",
    "make_plan",
    "open_engine",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'runtime' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
