"""DenoiserSpec: everything a sampler must know about a denoiser, as plain data that travels as JSON.

The forward process is  x_t = alpha_t * x_0 + sigma_t * eps,  given as two tables over the model's integer
timesteps instead of a scheduler's class name, so variance-preserving and flow-matching models look alike:

    prediction   the network returns                      alpha_t, sigma_t
    epsilon      eps                                      any
    v            alpha_t * eps - sigma_t * x_0            any          (Salimans & Ho 2022, appendix D)
    sample       x_0                                      any
    flow         eps - x_0                                1 - s, s     (Lipman et al. 2023; rectified flow)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from runtime.conditioning import Conditioning, conditioning_from_json
from runtime.errors import BadInput
from runtime.fields import LARGEST, boolean, floats, known, reading

PREDICTIONS = ("epsilon", "v", "sample", "flow")
STARTS = ("marginal", "noise", "unit")


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha_t and sigma_t at the integer timesteps 0..T-1 (t grows with the noise), float64 [T] each."""

    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        alphas, sigmas = np.asarray(self.alphas), np.asarray(self.sigmas)
        if alphas.ndim != 1 or alphas.shape != sigmas.shape or alphas.size < 2:
            raise BadInput(
                f"noise schedule: alphas {alphas.shape} and sigmas {sigmas.shape} must be equally long lists"
            )
        if not (np.isfinite(alphas).all() and np.isfinite(sigmas).all()):
            raise BadInput("noise schedule: alphas and sigmas must be finite numbers")
        if (alphas < 0).any() or (sigmas < 0).any() or (np.diff(alphas) > 0).any() or (np.diff(sigmas) < 0).any():
            raise BadInput(
                "noise schedule: with growing t, alphas must fall and sigmas must grow, and none be negative"
            )

    def __len__(self) -> int:
        return len(self.alphas)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Of two long tables, which every batch would walk through again to find its program."""
        return hash((self.alphas, self.sigmas))


@dataclass(frozen=True)
class Correction:
    """What takes off what rounding does to a network's output on the average: (out - bias[channel]) / (1 + slope)."""

    slope: float
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (np.isfinite(self.slope) and self.slope > -1.0 and np.isfinite(self.bias).all()):
            raise BadInput(f"plan: a correction's slope {self.slope:g} must lie above -1, and slope and bias be finite")


@dataclass(frozen=True)
class Threshold:
    """Dynamic thresholding (Saharia et al. 2022, Imagen, section 2.3): x_0 is bounded to -s..s and divided by s.

    s is each sample's `ratio` quantile of |x_0|, at least 1 and at most `most` (None: no bound), on data in -1..1.
    """

    ratio: float = 0.995
    most: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0 or not (self.most is None or (np.isfinite(self.most) and self.most >= 1.0)):
            raise BadInput(f"threshold: ratio {self.ratio:g} must lie in (0, 1], and most {self.most} be at least 1")


@dataclass(frozen=True)
class Plan:
    """How the model is meant to be sampled: a solver's name, the descending timesteps, and the guidance
    weight.

    `guidance` is the classifier-free guidance weight w of eps_null + w * (eps_label - eps_null); 1 switches
    it off and costs one call a step instead of two. It acts where low < sigma / alpha <= high for
    `guidance_interval` (low, high; None: without end), and elsewhere a step costs one call (Kynkaanniemi et al. 2024);
    `guidance_rescale` is phi of Lin et al. 2024, eq. 15-16: how far the guided output gets back the spread of the
    given half's. `eta` is DDIM's noise share. `clip` bounds the predicted x_0 to the data range at each step,
    `threshold` in its place by each sample's own values. `start` is the spread of the noise to start from: 'marginal'
    that of noised data, 'noise' sigma alone, 'unit' 1; they differ by parts in a thousand. `end` is the timestep at
    whose noise the last step stops, None for clean data (some checkpoints end at timestep 0, diffusers'
    `set_alpha_to_one: false`). `corrections` take off a quantized network's output what rounding does to it on the
    average, one for each timestep, or none (PTQD, He et al. 2023).
    """

    solver: str
    timesteps: tuple[float, ...]
    guidance: float = 1.0
    eta: float = 0.0
    clip: bool = True
    end: float | None = None
    corrections: tuple[Correction, ...] = ()
    start: str = STARTS[0]
    threshold: Threshold | None = None
    guidance_interval: tuple[float, float | None] | None = None
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        t = np.asarray(self.timesteps, dtype=float)
        if t.size < 1 or not np.isfinite(t).all() or (t < 0).any() or (np.diff(t) >= 0).any():
            raise BadInput("plan: timesteps must be one or more finite, non-negative, strictly descending numbers")
        if not (np.isfinite(self.guidance) and np.isfinite(self.eta) and 0.0 <= self.eta <= 1.0):
            raise BadInput(f"plan: guidance {self.guidance} must be finite and eta {self.eta} lie in [0, 1]")
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise BadInput(f"plan: guidance_rescale {self.guidance_rescale} must lie in [0, 1]")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not (np.isfinite(low) and low >= 0.0 and (high is None or (np.isfinite(high) and high > low))):
                raise BadInput(
                    f"plan: guidance_interval ({low}, {high}) must be two values of sigma / alpha, 0 <= low < high, "
                    "or null for no upper end"
                )
        if self.start not in STARTS:
            raise BadInput(f"plan: start '{self.start}' is not one of {', '.join(STARTS)}")
        if self.end is not None and not 0.0 <= self.end <= t[-1]:
            raise BadInput(f"plan: end {self.end} must be a timestep not above the last one, {t[-1]:g}")
        if self.corrections and len(self.corrections) != t.size:
            raise BadInput(f"plan: {len(self.corrections)} corrections for {t.size} timesteps; one each, or none")

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def uncorrected(self) -> Plan:
        """The plan for another network than the one that the corrections were measured on."""
        return replace(self, corrections=())

    def over(self, timesteps: tuple[float, ...]) -> Plan:
        """The plan over these timesteps; corrections hold for those alone that they were measured at."""
        return self if timesteps == self.timesteps else replace(self, timesteps=timesteps, corrections=())


@dataclass(frozen=True)
class Spacing:
    """How a model's timesteps are laid out for any number of steps and any image size.

    `grid` is a name of runtime.schedule.GRIDS, `offset` is added to its timesteps ('leading' grids of latent
    diffusion start at 1), `whole` rounds them. Flow models then move s = t / (T - 1) towards the noise,
    s' = k s / (1 + (k - 1) s), with k = `shift`, or, where `dynamic` is given as (shift at the fewest tokens, shift
    at the most, fewest, most), k = exp(m) with m on the line through these for the image's number of tokens
    (Esser et al. 2024, section 5.3.2; Flux).
    """

    grid: str = "trailing"
    offset: int = 0
    whole: bool = True
    shift: float = 1.0
    dynamic: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.offset < 0 or not (np.isfinite(self.shift) and self.shift > 0):
            raise BadInput(f"spacing: offset {self.offset} must not be negative and shift {self.shift} be above 0")


@dataclass(frozen=True)
class DenoiserSpec:
    """One denoiser, completely described for a sampler.

    `sample_shape` is (channels, height, width) of what is denoised by default; a latent is decoded from
    latent / latent_scale + latent_shift, each cell to `latent_factor` pixels a side. Other sizes must have sides that
    are multiples of `size_multiple` cells. `data_range` is what pixel values mean at the end, `spacing` lays out the
    timesteps of plans with other numbers of steps. `fixed_timesteps` are those that the network knows, where it was
    exported for one plan (export/bake_time.py); none means all. `distilled` is the kind of distillation that taught the
    network to sample by this plan's few steps alone; '' for a network that any plan fits. `distilled_also` are the
    timesteps of other plans that it was taught, the solver being the same.
    """

    prediction: str
    schedule: NoiseSchedule
    sample_shape: tuple[int, int, int]
    plan: Plan
    conditioning: Conditioning = field(default_factory=Conditioning)
    latent_scale: float = 1.0
    latent_shift: float = 0.0
    data_range: tuple[float, float] = (-1.0, 1.0)
    latent_factor: int = 1
    size_multiple: int = 1
    spacing: Spacing = field(default_factory=Spacing)
    fixed_timesteps: tuple[float, ...] = ()
    distilled: str = ""
    distilled_also: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise BadInput(f"prediction '{self.prediction}' is not one of {', '.join(PREDICTIONS)}")
        if len(self.sample_shape) != 3 or min(self.sample_shape) < 1 or math.prod(self.sample_shape) > LARGEST:
            raise BadInput(
                f"sample shape {self.sample_shape} must be (channels, height, width), each at least 1, and together at "
                f"most {LARGEST} values"
            )
        if max(self.plan.timesteps) > len(self.schedule) - 1:
            raise BadInput(
                f"plan: timestep {max(self.plan.timesteps):g} lies beyond the last, {len(self.schedule) - 1}"
            )
        foreign = [t for t in self.plan.timesteps if self.fixed_timesteps and t not in self.fixed_timesteps]
        if foreign:
            raise BadInput(
                f"plan: timestep {foreign[0]:g} is not one of the {len(self.fixed_timesteps)} that this network was "
                "exported for; keep its own steps, or export again without --fixed-plan"
            )
        if any(len(correction.bias) != self.sample_shape[0] for correction in self.plan.corrections):
            raise BadInput(f"plan: each correction needs a bias for each of {self.sample_shape[0]} channels")
        if not self.data_range[0] < self.data_range[1]:
            raise BadInput(f"data range {self.data_range} is empty")
        if not (np.isfinite(self.latent_scale) and np.isfinite(self.latent_shift) and self.latent_scale != 0):
            raise BadInput(
                f"latent scale {self.latent_scale}, shift {self.latent_shift}: finite, and the scale not zero"
            )

        if self.latent_factor < 1 or self.size_multiple < 1:
            raise BadInput(
                f"latent factor {self.latent_factor} and size multiple {self.size_multiple} must be at least 1"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the final image, in pixels."""
        return self.sample_shape[1] * self.latent_factor, self.sample_shape[2] * self.latent_factor

    @property
    def is_pixel_space(self) -> bool:
        """Whether samples are images already; a denoiser of text that came without its decoder works on latents too."""
        return self.latent_factor == 1 and self.conditioning.kind != "text"

    def tokens(self, shape: tuple[int, int, int]) -> int:
        """Image tokens of a sample of this shape, which dynamic shifts count: cells of `size_multiple` a side."""
        return (shape[1] // self.size_multiple) * (shape[2] // self.size_multiple)

    def with_plan(self, plan: Plan) -> DenoiserSpec:
        return replace(self, plan=plan)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Any, where: str = "spec") -> DenoiserSpec:
        """Read a spec back; anything missing, unknown or of the wrong type raises BadInput naming `where`."""
        raw = known(DenoiserSpec, data, where)
        with reading(where):
            return DenoiserSpec(
                prediction=str(raw["prediction"]),
                schedule=NoiseSchedule(
                    **{k: floats(v) for k, v in known(NoiseSchedule, raw["schedule"], where).items()}
                ),
                sample_shape=_shape(raw["sample_shape"]),
                plan=plan_from_json(raw["plan"], f"{where}.plan"),
                conditioning=conditioning_from_json(raw["conditioning"], f"{where}.conditioning"),
                latent_scale=float(raw["latent_scale"]),
                latent_shift=float(raw["latent_shift"]),
                data_range=_range(raw["data_range"]),
                latent_factor=int(raw.get("latent_factor", 1)),
                size_multiple=int(raw.get("size_multiple", 1)),
                spacing=spacing_from_json(raw.get("spacing", {}), f"{where}.spacing"),
                fixed_timesteps=floats(raw.get("fixed_timesteps", ())),
                distilled=str(raw.get("distilled", "")),
                distilled_also=tuple(floats(timesteps) for timesteps in raw.get("distilled_also", ())),
            )


def plan_from_json(data: Any, where: str = "plan") -> Plan:
    raw = known(Plan, data, where)
    with reading(where):
        return Plan(
            solver=str(raw["solver"]),
            timesteps=floats(raw["timesteps"]),
            guidance=float(raw["guidance"]),
            eta=float(raw["eta"]),
            clip=boolean(raw["clip"]),
            end=None if raw.get("end") is None else float(raw["end"]),
            corrections=tuple(_correction(entry, where) for entry in raw.get("corrections", ())),
            start=str(raw.get("start", STARTS[0])),
            threshold=None if raw.get("threshold") is None else _threshold(raw["threshold"], where),
            guidance_interval=None if raw.get("guidance_interval") is None else _interval(raw["guidance_interval"]),
            guidance_rescale=float(raw.get("guidance_rescale", 0.0)),
        )


def spacing_from_json(data: Any, where: str = "spacing") -> Spacing:
    """Read a spacing back; anything unknown or of the wrong type raises BadInput naming `where`."""
    raw = known(Spacing, data, where)
    with reading(where):
        dynamic = raw.get("dynamic")
        return Spacing(
            grid=str(raw.get("grid", "trailing")),
            offset=int(raw.get("offset", 0)),
            whole=boolean(raw.get("whole", True)),
            shift=float(raw.get("shift", 1.0)),
            dynamic=None if dynamic is None else _four(dynamic),
        )


def _correction(data: Any, where: str) -> Correction:
    raw = known(Correction, data, where)
    return Correction(float(raw["slope"]), floats(raw["bias"]))


def _threshold(data: Any, where: str) -> Threshold:
    raw = known(Threshold, data, where)
    most = raw.get("most")
    return Threshold(float(raw["ratio"]), None if most is None else float(most))


def _interval(values: Any) -> tuple[float, float | None]:
    low, high = values
    return float(low), None if high is None else float(high)


def _shape(values: Any) -> tuple[int, int, int]:
    channels, height, width = (int(v) for v in values)
    return channels, height, width


def _range(values: Any) -> tuple[float, float]:
    low, high = (float(v) for v in values)
    return low, high


def _four(values: Any) -> tuple[float, float, float, float]:
    first, second, third, fourth = (float(v) for v in values)
    return first, second, third, fourth
