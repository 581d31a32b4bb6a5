"""Settings of a search, checked before any work: bounds, budget, and what selects and what reports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from diffpress.compress.config import Config, input_error
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampler import MAX_SEED

SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
DEFAULT_TRIALS = 30


class Bounds(Config):
    """What the result must keep, relative to the teacher's fp32 bundle under its own plan in the same engine."""

    max_latency_ratio: float | None = Field(None, gt=0.0, description="Maximum time of an image.")
    max_frechet_ratio: float | None = Field(None, gt=0.0, description="Maximum Fréchet distance of the samples.")
    max_size_mib: float | None = Field(None, gt=0.0, description="Maximum size of the denoiser's file, in MiB.")

    def excesses(self, latency_ratio: float, frechet_ratio: float | None, size_mib: float) -> dict[str, float]:
        """Return bound -> how far the value exceeds it, as a fraction of it; at most 0 if it is kept.

        A Fréchet ratio that was not measured is left out.
        """
        values = {
            "max_latency_ratio": latency_ratio,
            "max_frechet_ratio": frechet_ratio,
            "max_size_mib": size_mib,
        }
        limits = self.model_dump()
        return {
            name: value / limits[name] - 1.0
            for name, value in values.items()
            if limits[name] is not None and value is not None
        }


class SearchSettings(Config):
    """Everything that decides which trials a search proposes, and how they are measured.

    A search is resumed only with the same settings; how long it lasts is not one of them.
    """

    bounds: Bounds = Field(Bounds(), description="What the result must keep.")
    engine: Literal["openvino", "onnxruntime"] = Field(description="Engine that latency is measured in.")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Every random draw of the search follows from it.")
    train_steps: int = Field(ge=1, description="Optimizer steps of a training stage at its full budget.")
    threads: int | None = Field(None, ge=1, description="Processor threads of the engine; None means all.")
    data: Path | None = Field(None, description="Training data of the recipes.")
    select_features: Path | None = Field(None, description="Feature network that selects.")
    select_reference: Path | None = Field(None, description="Real images for the network that selects.")
    features: Path | None = Field(None, description="Feature network that reports.")
    reference: Path | None = Field(None, description="Real images for the network that reports.")
    prompts: Path | None = Field(None, description="Prompts of a text model, of which every second one selects.")
    samples: int = Field(256, ge=8, description="Samples of a draw that selects or reports.")


def make_settings(**values: Any) -> SearchSettings:
    """Return the settings; InvalidInputError in one line for a value that makes no sense."""
    bounds = {name: values.pop(name) for name in Bounds.model_fields if name in values}
    try:
        return SearchSettings(bounds=Bounds(**bounds), **values)
    except ValidationError as error:
        config = SearchSettings if error.title == SearchSettings.__name__ else Bounds
        raise input_error(error, config, "search") from error


def parse_duration(text: str) -> float:
    """Return the seconds of '90s', '60m' or '1.5h'; InvalidInputError without a unit, or for another one."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", text.strip())
    if match is None or match[2] not in SECONDS or float(match[1]) == 0.0:
        raise InvalidInputError(f"--time {text}: give a number with a unit: s, m or h, as in 60m")
    return float(match[1]) * SECONDS[match[2]]
