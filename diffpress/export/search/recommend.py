"""`diffpress recommend`: measure without training, and propose the recipe to start with, each choice with its reason.

profile          share of MACs by kind of layer, time of an evaluation in torch
formats          time of a step and size in the engine, per format, relative to fp32
sensitivity      SQNR of the output with everything quantized, and what must return to float for MIN_SQNR_DB
steps            error of the samples with fewer steps against the model's own plan, from the same noise
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.effort import PASSES, measure_cost
from diffpress.compress.models.counts import count, is_large
from diffpress.compress.pipeline import open_data
from diffpress.compress.quantization.config import BoundsConfig, QuantizeConfig
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.recipe import Recipe, file_reference
from diffpress.compress.sampling_schedule.config import ScheduleConfig
from diffpress.compress.sampling_schedule.schedule import schedule
from diffpress.compress.search.profile import KINDS, mac_shares
from diffpress.compress.search.proxies import Cost, compared_count, compared_samples, error_db
from diffpress.compress.training.teacher_data import read_prompts
from diffpress.compress.workspace import Workspace
from diffpress.export.search.trial_engine import EngineOfTrials, open_trial_engine
from diffpress.runtime.engines import available
from diffpress.runtime.errors import GateFailedError, InvalidInputError, MissingDependencyError
from diffpress.runtime.guidance import evaluations_per_step

logger = logging.getLogger(__name__)

SOLVER = "unipc_2"
STEPS = (4, 5, 6, 8, 10, 15, 20)
MAX_ERROR_DB = -10.0  # error of fewer steps: a tenth of the power of the samples
MIN_SQNR_DB = 20.0  # of the quantized output against the float one
FASTER = 0.95  # a format is taken for its speed from this ratio on
PRUNABLE = 0.5  # share of MACs in layers that lose channels
KEPT_MACS = 0.8
RECOVERY_BATCH, RECOVERY_STEPS = 16, (100, 1000)
RECOVERY_MINUTES = 30.0
COMPARING_MINUTES = 10.0  # of sampling plans of fewer steps
SAMPLES = 16


@dataclass(frozen=True)
class Recommendation:
    """A recipe to start with.

    Attributes:
        stages: Its stages, each with the reason for it.
        left_out: What the recipe does without, and why.
        measured: The measurements as text, one line each.
        export: Its section `export`.
        data: Its training data.
    """

    stages: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    export: dict[str, Any] = field(default_factory=dict)
    data: Path | None = None

    @property
    def recipe(self) -> str:
        """The recipe as YAML, with the reasons as comments."""
        lines = ["# Proposed by diffpress recommend: a start, not a result", "seed: 0"]
        lines += [f"data: {_flow(file_reference(self.data))}"] if self.data is not None else []
        lines += ["stages:"] if self.stages else ["stages: []"]
        for stage, reason in self.stages:
            lines += [f"  # {reason}", f"  - {_flow(stage)[1:-1]}"]
        lines += [f"# left out: {reason}" for reason in self.left_out]
        return "\n".join([*lines, f"export: {_flow(self.export)}", ""])


def recommend(checkpoint: Checkpoint, engine: str, *, data: Path | None, threads: int | None = None) -> Recommendation:
    """Measure the checkpoint and return the recipe to start with.

    Raises:
        InvalidInputError: The checkpoint is quantized already, or the data does not fit it.
        MissingDependencyError: The engine is not installed.
    """
    if checkpoint.quantization is not None:
        raise InvalidInputError("recommend: the checkpoint is quantized already; name the one that it was made from")
    if engine not in available():
        raise MissingDependencyError(engine, engine, f"--engine {engine}")
    targets = ["onnx"] if engine == "onnxruntime" else ["onnx", engine]
    found = Recommendation(export={"targets": targets}, data=data)
    with TemporaryDirectory() as folder:
        samples = open_data(checkpoint, Recipe.of((), data=data), Workspace(Path(folder)))
        context = Context(0, Path(folder) / "quantize", checkpoint, samples)
        seconds, shares = measure_cost(checkpoint).seconds, mac_shares(checkpoint)
        found.measured.append("MACs: " + ", ".join(f"{share:.0%} {kind}" for kind, share in shares.items()))
        found.measured.append(f"one evaluation of one sample takes {1e3 * seconds:.1f} ms in torch")
        _choose_steps(checkpoint, seconds, found)
        _choose_pruning(shares, seconds, found)
        _choose_distillation(checkpoint, found)
        _choose_format(checkpoint, engine, context, threads, found)
    return found


def _choose_steps(checkpoint: Checkpoint, seconds: float, found: Recommendation) -> None:
    spec, tried = checkpoint.spec, dict[int, float]()
    if spec.distilled:
        found.left_out.append(f"schedule: the model was distilled for its {spec.plan.steps} steps")
        return
    counts = [steps for steps in STEPS if steps < spec.plan.steps]
    if not counts:
        found.left_out.append(f"schedule: the model's plan has {spec.plan.steps} steps already")
        return
    evaluations = evaluations_per_step(spec) * (spec.plan.steps + sum(counts))
    minutes = compared_count(checkpoint) * evaluations * seconds / 60.0
    if minutes > COMPARING_MINUTES:
        found.left_out.append(f"schedule: comparing plans of fewer steps would take about {minutes:.0f} min here")
        return
    texts = read_prompts(None) if spec.conditioning.encoders else ()
    exact = compared_samples(checkpoint, texts)
    for steps in counts:
        config = ScheduleConfig(solver=SOLVER, steps=steps)
        planned = schedule(checkpoint, config, Context(0, Path(), checkpoint))
        tried[steps] = error_db(exact, compared_samples(planned, texts))
        if tried[steps] <= MAX_ERROR_DB:
            break
    shown = ", ".join(f"{steps} steps {error:.1f} dB" for steps, error in tried.items())
    found.measured.append(f"error of the samples against {spec.plan.steps} steps of {spec.plan.solver}: {shown}")
    steps, error = list(tried.items())[-1]
    if error > MAX_ERROR_DB:
        found.left_out.append(f"schedule: no plan of fewer steps keeps the error below {MAX_ERROR_DB:g} dB")
        return
    reason = f"{steps} steps are the fewest whose samples stay within {MAX_ERROR_DB:g} dB of the model's own plan"
    settings: dict[str, Any] = {"solver": SOLVER, "steps": steps}
    if not is_large(checkpoint.model):
        settings |= {"search": "gits", "samples": 16, "fine": max(40, 2 * steps), "batch": 16}
        reason += "; a search then improves its timesteps"
    found.stages.append(({"schedule": settings}, reason))


def _choose_pruning(shares: Mapping[str, float], seconds: float, found: Recommendation) -> None:
    prunable, each = sum(shares[kind] for kind in KINDS), PASSES * RECOVERY_BATCH * seconds
    least, most = RECOVERY_STEPS
    steps = int(min(most, RECOVERY_MINUTES * 60.0 / each))
    if prunable < PRUNABLE:
        found.left_out.append(f"prune: only {prunable:.0%} of the MACs are in layers that lose channels")
        return
    if steps < least:
        found.left_out.append(
            f"prune: {least} steps of recovery would take {least * each / 3600.0:.1f} h on this machine; use a GPU"
        )
        return
    prune = {"method": "diff_pruning", "scope": "global", "target": {"macs": KEPT_MACS}, "batch": 16, "timesteps": 12}
    recover = {"kind": "recover", "steps": steps, "batch": RECOVERY_BATCH}
    if any("schedule" in stage for stage, _ in found.stages):
        recover["timesteps"] = "plan"
    reason = f"{prunable:.0%} of the MACs are in layers that lose channels; a fifth of them is a careful start"
    found.stages.append(({"prune": prune}, reason))
    found.stages.append(({"distill": recover}, f"about {steps * each / 60.0:.0f} min of training on this machine"))


def _choose_distillation(checkpoint: Checkpoint, found: Recommendation) -> None:
    if evaluations_per_step(checkpoint.spec) > 1:
        found.left_out.append(
            "distill: {kind: guidance} would halve the evaluations of a step; it takes a training that this start "
            "leaves out"
        )
    if not checkpoint.spec.distilled:
        found.left_out.append("few-step distillation: its trainings take hours; see docs/few-steps.md")


def _choose_format(
    checkpoint: Checkpoint, engine: str, context: Context, threads: int | None, found: Recommendation
) -> None:
    if is_large(checkpoint.model):
        settings = {"format": "int8", "samples": 8, "batch": 1}
        reason = "int8 is the smallest format that engines run as integers; a model of this size was not timed"
        found.stages.append(({"quantize": settings}, reason))
        return
    quantized, sensitivity = _quantized(checkpoint, context)
    with open_trial_engine(checkpoint, engine, threads, ()) as opened:
        costs = _costs(checkpoint, quantized, opened)
    parameters_mib = count(checkpoint.model, checkpoint.spec).fp32_bytes / 2**20
    shown = ", ".join(f"{name} {cost.step_ratio:.2f}x time, {cost.size_mib:.2f} MiB" for name, cost in costs.items())
    found.measured.append(f"{engine}, relative to fp32 with {parameters_mib:.2f} MiB of weights: {shown}")
    found.measured.append(sensitivity.text)
    if quantized is not None and costs["int8"].step_ratio <= FASTER:
        settings = {"format": "int8", "samples": 16, "batch": 16}
        reason = f"int8 takes {costs['int8'].step_ratio:.2f} of the time of fp32 in {engine} here"
        if sensitivity.in_float:
            settings["bounds"] = {"min_sqnr_db": MIN_SQNR_DB}
            reason += f"; the bound keeps sensitive layers in float, such as {sensitivity.in_float[0]}"
        found.stages.append(({"quantize": settings}, reason))
        return
    ratio = (
        "cannot keep its bound" if quantized is None else f"takes {costs['int8'].step_ratio:.2f} of the time of fp32"
    )
    found.left_out.append(f"quantize: int8 {ratio} in {engine} here; fp16 weights halve the file instead")
    found.export["precision"] = "fp16"


@dataclass(frozen=True)
class _Sensitivity:
    text: str
    in_float: list[str] = field(default_factory=list)


def _quantized(checkpoint: Checkpoint, context: Context) -> tuple[Checkpoint | None, _Sensitivity]:
    """Return the checkpoint in int8 within MIN_SQNR_DB, None if that cannot be kept, and what was found on the way."""
    config = QuantizeConfig(
        "int8",
        samples=SAMPLES,
        batch=SAMPLES,
        output_correction=False,
        bounds=BoundsConfig(min_sqnr_db=MIN_SQNR_DB),
    )
    try:
        quantized = quantize(checkpoint, config, context)
    except GateFailedError as error:
        return None, _Sensitivity(f"int8: {error}")
    mixed = context.notes["mixed"]
    worst = list(mixed["places"].items())[:3]
    named = ", ".join(f"{name} {row['sqnr_db']:.0f} dB" for name, row in worst)
    text = f"int8: SQNR of the output {mixed['all_quantized']['sqnr_db']:.1f} dB; most sensitive alone: {named}"
    return quantized, _Sensitivity(text, list(mixed["in_float"]))


def _costs(checkpoint: Checkpoint, quantized: Checkpoint | None, engine: EngineOfTrials) -> dict[str, Cost]:
    found = {"fp16": engine.cost(checkpoint, "fp16")}
    if quantized is not None:
        found["int8"] = engine.cost(quantized, "fp32")
    return found


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).removesuffix("...\n").strip()
