"""Benchmark of a bundle against its baselines in one run. Torch is imported only for a torch baseline.

PyTorch eager     the baseline checkpoint, sampled with DDIM and 50 steps, or as its pipeline does (torch_baseline.py)
the same engine   the baseline bundle in fp32
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from diffpress.runtime.benchmarking.bench import Subject, bundle_subject, measure, sampler_overhead
from diffpress.runtime.benchmarking.step_kinds import step_cache_facts
from diffpress.runtime.bundle import Bundle, find_bundle, load_bundle
from diffpress.runtime.engines import Engine, engine_label, installed, open_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import DiffpressError
from diffpress.runtime.trust.signature import refuse_unsigned


def bench(
    bundle: str | Path,
    baselines: Sequence[str | Path] = (),
    *,
    batch: Sequence[int] = (1, 8),
    engines: Sequence[str | None] = (None,),
    repeats: int = 3,
    options: EngineOptions | None = None,
    public_key: str | Path | None = None,
) -> dict[str, Any]:
    """Measure a bundle against its baselines in one run; the result has the shape of `bench --json`.

    Args:
        bundle: The bundle's folder.
        baselines: Checkpoints, which run in PyTorch eager, and bundles, which run in each engine.
        batch: The batch sizes to measure.
        engines: Names of engines; None for the preferred one, `["all"]` for all installed engines.
        repeats: Number of alternating rounds; the medians are reported.
        options: Threads, precision and other options of every engine.
        public_key: PEM file of the key that every bundle has to be signed with; baselines that are checkpoints are
            then refused.
    """
    options = options or EngineOptions()
    opened = load_bundle(bundle, public_key)
    every = list(engines) == ["all"]
    names: list[str | None] = [*(installed() if every else engines)]
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        subjects: list[Subject] = []
        overheads, cached = {}, {}

        def add(of: Bundle, name: str | None) -> Engine | None:
            try:
                engine = stack.enter_context(closing(open_engine(of, name, options=options)))
                subjects.append(bundle_subject(of, engine, batches=batch, options=options))
            except DiffpressError as error:
                if not every:  # the engine was requested by name
                    raise
                left_out[f"{of.path.name} in {name}"] = str(error)
                return None
            return engine

        for baseline in baselines:
            if find_bundle(baseline) is not None:
                other = load_bundle(baseline, public_key)
                for name in names:
                    add(other, name)
            else:
                from diffpress.compress.evaluation.torch_baseline import torch_subject

                refuse_unsigned(str(baseline), public_key)
                subjects.append(torch_subject(str(baseline), options.threads))
        for name in names:
            engine = add(opened, name)
            if engine is not None:
                label, spec = engine_label(engine), opened.spec_for(engine.name)
                overheads[label] = sampler_overhead(engine, opened.spec, min(batch), repeats)._asdict()
                if (facts := step_cache_facts(engine, spec, min(batch), repeats)) is not None:
                    cached[label] = facts
        result: dict[str, Any] = measure(subjects, batch, repeats)
    steps = {"step_cache": cached} if cached else {}
    return result | {"sampler_overhead": overheads, "left_out": left_out} | steps
