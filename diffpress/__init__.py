"""diffpress makes a pretrained diffusion model deployable: prune, distill, quantize, export, sample without torch."""

from __future__ import annotations

__version__ = "0.2.0"
