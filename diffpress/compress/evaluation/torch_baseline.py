"""Benchmark subject that runs a checkpoint in PyTorch eager."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from diffpress.compress.models.counts import count
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.benchmarking.bench import TORCH, Subject, sample_once
from diffpress.runtime.sampler import network_evaluations
from diffpress.runtime.sampling_plan import make_plan

BASELINE_SOLVER, BASELINE_STEPS = "ddim", 50


def torch_subject(reference: str, threads: int | None = None) -> Subject:
    """Return the checkpoint in PyTorch eager, float32, as a benchmark subject.

    Pixel-space models are sampled with DDIM and 50 steps, the common default, with their plan's guidance; latent models
    under their pipeline's plan.
    """
    if threads:
        torch.set_num_threads(threads)
    checkpoint = load_checkpoint(reference)
    spec = checkpoint.spec
    if spec.is_pixel_space:
        steps = min(BASELINE_STEPS, len(spec.schedule))
        plan = make_plan(BASELINE_SOLVER, steps, spec.schedule, clip=spec.plan.clip)
        guidance = {name: getattr(spec.plan, name) for name in ("guidance", "guidance_rescale", "guidance_interval")}
        spec = spec.with_plan(replace(plan, **guidance))
    one_step = spec.plan.over(spec.plan.timesteps[:1])
    network = TorchNetwork(checkpoint.model, spec, fast_path=True)
    return Subject(
        name=f"{Path(reference).name} (PyTorch eager)",
        engine=TORCH,
        precision="fp32",
        steps=spec.plan.steps,
        nfe=network_evaluations(spec),
        size_mib=count(checkpoint.model, spec).fp32_bytes / 2**20,
        integer_mac_share=0.0,
        sample=lambda batch: sample_once(network, spec, batch),
        step=lambda batch: sample_once(network, spec.with_plan(one_step), batch),
    )
