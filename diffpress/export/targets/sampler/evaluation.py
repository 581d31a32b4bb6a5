"""One evaluation of the denoiser in a sampler graph, with both guidance halves in one batch, as the runtime does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diffpress.export.graph.model import Graph
from diffpress.export.targets.sampler.block import Block, dtypes_of
from diffpress.runtime.network_inputs import SAMPLE, TIMESTEP


@dataclass(frozen=True)
class Denoiser:
    """A denoiser and what it reads besides sample and timestep, as tensors of the main block.

    Attributes:
        graph: Its graph.
        static_inputs: Its inputs that are constant over all steps, [halves N, ...] each.
        rows: halves N, int64 [1].
        guidance: Weight of classifier-free guidance, float32 []; None if one half is evaluated.
    """

    graph: Graph
    static_inputs: Mapping[str, str]
    rows: str
    guidance: str | None

    @property
    def timestep_dtype(self) -> np.dtype:
        """The dtype of its timesteps."""
        return dtypes_of(self.graph.proto.graph.input)[TIMESTEP]

    def evaluate(self, block: Block, x: str, timestep: str) -> str:
        """Add an evaluation; returns the output after guidance, float32 [N, C, ...].

        Args:
            block: The block to add it to.
            x: The sample, float32 [N, C, ...].
            timestep: The timestep in `timestep_dtype`, [].
        """
        inputs, outputs = self.graph.proto.graph.input, self.graph.proto.graph.output
        both = x if self.guidance is None else block.op("Concat", x, x, axis=0)
        feed = {
            **self.static_inputs,
            SAMPLE: block.cast(both, dtypes_of(inputs)[SAMPLE], np.float32),
            TIMESTEP: block.op("Expand", timestep, self.rows),
        }
        first = block.network(self.graph, "denoiser", feed)[0]
        out = block.cast(first, np.float32, dtypes_of(outputs)[outputs[0].name])
        if self.guidance is None:
            return out
        cond, uncond = block.split_op("Split", out, outputs=2, axis=0, num_outputs=2)
        return block.op("Add", uncond, block.op("Mul", self.guidance, block.op("Sub", cond, uncond)))
