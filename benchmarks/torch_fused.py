"""PyTorch baseline on a GPU: the model, the samples and the solver stay on the device from noise to image.

eager      PyTorch's defaults: float32, with TF32 in convolutions
bf16       the same under autocast to bfloat16
compiled   torch.compile(mode="reduce-overhead"), which replays CUDA graphs
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.runtime.errors import EngineUnavailableError
from diffpress.runtime.fused.program import FIRST_HISTORY, Program
from diffpress.runtime.network_inputs import typed_timesteps

KINDS = ("eager", "bf16", "compiled")


class TorchFusedSampler:
    """A checkpoint in PyTorch whose `run_fused` is a diffpress.runtime.fused.FusedSampler.

    `kind` is one of KINDS.
    """

    name = "torch on a GPU"

    def __init__(self, checkpoint: Checkpoint, kind: str, device: str = "cuda") -> None:
        self._device, model = device, checkpoint.model.to(device).eval()
        self._bf16, self._forward = kind == "bf16", adapter_for(model).forward
        self._model: Any = torch.compile(model, mode="reduce-overhead") if kind == "compiled" else model
        self.inputs = TorchNetwork(model, checkpoint.spec).inputs

    def run(self, _: dict[str, np.ndarray]) -> np.ndarray:
        raise EngineUnavailableError("this sampling plan has no fused sampling program: see runtime/fused/program.py")

    def run_fused(self, program: Program, static_inputs: Mapping[str, np.ndarray], start: np.ndarray) -> np.ndarray:
        rows = program.halves * len(start)
        feed = {name: torch.from_numpy(array).to(self._device) for name, array in static_inputs.items()}
        levels = np.stack([typed_timesteps([t] * rows, self.inputs["timestep"]) for t in program.timesteps])
        times, offsets = (torch.from_numpy(a).to(self._device) for a in (levels, program.offsets))
        x = torch.from_numpy(start).to(self._device)
        history: list[torch.Tensor] = []
        for step in range(program.steps):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad(), torch.autocast(self._device, torch.bfloat16, enabled=self._bf16):
                sample = torch.cat([x] * program.halves)
                out = self._forward(self._model, {"sample": sample, "timestep": times[step], **feed}).float()
            if program.halves == 2:
                cond_out, uncond_out = out.chunk(2)
                out = uncond_out + program.guidance * (cond_out - uncond_out)
            a, b = program.reads[step].tolist()
            x0 = a * x + b * out + offsets[step, :, None, None]
            x0 = x0 if program.bounds is None else x0.clamp(*program.bounds)
            terms = [x, x0, x0.clamp(-1.0, 1.0), *history]
            kept, x = (self._sum(row[step], terms) for row in (program.kept, program.moved))
            history = [kept, x0, *history][: program.kept.shape[1] - FIRST_HISTORY]
        return x.cpu().numpy()

    def _sum(self, weights: np.ndarray, terms: list[Any]) -> Any:
        found = [(w, term) for w, term in zip(weights.tolist(), terms, strict=False) if w]
        return sum((w * term for w, term in found[1:]), start=found[0][0] * found[0][1])
