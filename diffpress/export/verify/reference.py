"""What engines are compared with: torch's samples of a parity test case, over one full trajectory.

A small pixel-space model is tested under its own plan. A latent model may have gigabytes of weights and take a minute
per evaluation: it is tested on fewer and smaller samples, with just enough steps to show the feedback. The manifest
records how many.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.adapter import small_spec
from diffpress.compress.models.counts import is_large
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.runtime.caching.step_cache import CACHED, FULL
from diffpress.runtime.network_inputs import Network, dummy_conditioning
from diffpress.runtime.sampler import Step, generate, generate_batches
from diffpress.runtime.spec import DenoiserSpec

SAMPLES = 16  # with four samples, the SQNR varies by 1 dB between draws
WITHIN_DB = 1.0

# for latent models
LATENT_SAMPLES, LATENT_STEPS = 2, 4
LATENT_WITHIN_DB = 3.0  # two samples vary more than sixteen


@dataclass(frozen=True)
class ParityCase:
    """Parity test case: `samples` samples under the spec's plan at the spec's size."""

    spec: DenoiserSpec
    samples: int
    within_db: float

    @property
    def uncorrected(self) -> ParityCase:
        """The case without output corrections, which apply to the quantized network only."""
        return replace(self, spec=self.spec.with_plan(self.spec.plan.without_corrections))


@dataclass(frozen=True)
class Reference:
    """Torch's samples of a test case, to which engines are compared.

    Attributes:
        case: The test case.
        exact: Samples of the float model [N, ...].
        fake_quant: Samples of the fake-quantized model; None for a graph that is not quantized.
        not_finite: Which of torch's samples are not finite, and from which step on; empty if all are finite.
    """

    case: ParityCase
    exact: np.ndarray
    fake_quant: np.ndarray | None = None
    not_finite: str = ""

    @property
    def of_float_graph(self) -> Reference:
        """The reference of the graph before quantization."""
        return Reference(self.case.uncorrected, self.exact, not_finite=self.not_finite)


def parity_case_for(model: nn.Module, spec: DenoiserSpec, fixed_size: bool = False) -> ParityCase:
    """Return the parity test case for a model (see the module docstring)."""
    if spec.is_pixel_space and not is_large(model):
        return ParityCase(spec, SAMPLES, WITHIN_DB)
    if not fixed_size:
        spec = small_spec(model, spec)
    stride = -(-spec.plan.steps // LATENT_STEPS)
    plan, cache = spec.plan.over(spec.plan.timesteps[::stride]), spec.plan.cache
    if cache is not None and cache.kind == "features" and plan.cache is None:
        # the graph of the cached steps is run as well
        plan = replace(plan, cache=replace(cache, steps=((FULL, CACHED) * plan.steps)[: plan.steps]))
    return ParityCase(spec.with_plan(plan), LATENT_SAMPLES, LATENT_WITHIN_DB)


def torch_reference(checkpoint: Checkpoint, case: ParityCase) -> Reference:
    """Sample the test case with the checkpoint's model, and with its fake-quantized model if it is quantized."""
    uncorrected = case.uncorrected
    network = TorchNetwork(checkpoint.model, uncorrected.spec)
    exact, fake_quant, not_finite = samples_of(network, uncorrected), None, ""
    if not np.isfinite(exact).all():
        not_finite = f"torch's float model gives {first_not_finite(network, uncorrected)}"
    elif checkpoint.quantization is not None:
        quantized = TorchNetwork(fake_quantized(checkpoint), case.spec)
        fake_quant = samples_of(quantized, case)
        if not np.isfinite(fake_quant).all():
            not_finite = f"torch's fake quantization gives {first_not_finite(quantized, case)}"
    return Reference(case, exact, fake_quant, not_finite)


def samples_of(network: Network, case: ParityCase) -> np.ndarray:
    """Return the network's samples of the test case."""
    conditioning = dummy_conditioning(case.spec, case.samples)
    return generate(network, case.spec, range(case.samples), batch=case.samples, conditions=conditioning)


def first_not_finite(network: Network, case: ParityCase) -> str:
    """Sample again and describe the first step with a value that is not finite: 'NaN at step 2 of 4 (timestep 50)'."""
    found: list[tuple[str, Step]] = []

    def look(step: Step) -> None:
        finite = np.isfinite(step.x0) & np.isfinite(step.x)
        if not found and not finite.all():
            found.append(("NaN" if np.isnan(step.x0).any() or np.isnan(step.x).any() else "infinity", step))

    conditioning = dummy_conditioning(case.spec, case.samples)
    seeds = range(case.samples)
    batches = generate_batches(network, case.spec, seeds, batch=case.samples, conditions=conditioning, on_step=look)
    with np.errstate(all="ignore"):
        deque(batches, maxlen=0)
    if not found:
        return "NaN in fused sampling, but not step by step"
    value, step = found[0]
    return f"{value} at step {step.index + 1} of {case.spec.plan.steps} (timestep {step.t:g})"
