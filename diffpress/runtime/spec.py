"""DenoiserSpec: everything a sampler needs to know about a denoiser, as JSON-serializable data.

The forward process x_t = alpha_t * x_0 + sigma_t * eps is stored as two tables over the model's integer timesteps
instead of a scheduler's class name, so that variance-preserving and flow-matching models are treated alike:

    prediction   the network returns                      alpha_t, sigma_t
    epsilon      eps                                      any
    v            alpha_t * eps - sigma_t * x_0            any          (Salimans & Ho 2022, appendix D)
    sample       x_0                                      any
    flow         eps - x_0                                1 - s, s     (Lipman et al. 2023; rectified flow)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from diffpress.runtime.conditioning import Conditioning, conditioning_from_json
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.json_fields import LARGEST, check_fields, convert_errors, floats
from diffpress.runtime.noise_schedule import NoiseSchedule
from diffpress.runtime.sampling_plan import SamplingPlan, plan_from_json
from diffpress.runtime.solver_settings import SolverSettings, solver_settings_from_json
from diffpress.runtime.timesteps import TimestepSpacing, spacing_from_json

PREDICTIONS = ("epsilon", "v", "sample", "flow")
MAX_RANK = 4  # of a sample; batches have one dimension more
PICTURE_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class DenoiserSpec:
    """Complete description of a denoiser for a sampler.

    Attributes:
        prediction: One of PREDICTIONS.
        schedule: Noise schedule.
        sample_shape: Shape of one sample, pixels or latents, with 1 to 4 sizes and the channels first: (D,) for points,
            (C, L) for sequences, (C, H, W) for images, (C, T, H, W) for video.
        plan: Sampling plan.
        conditioning: Inputs besides sample and timestep.
        latent_scale: A latent is decoded from latent / latent_scale + latent_shift.
        latent_shift: See `latent_scale`.
        data_range: Lowest and highest value of the data; x_0 is clipped to it if the plan clips.
        latent_factor: Pixels per latent cell along one side; 1 for models of pixels or other data, and for denoisers of
            pipelines without a decoder.
        size_multiple: Other image sizes must have sides that are multiples of this many cells.
        spacing: Timestep spacing for plans with another number of steps.
        fixed_timesteps: The only timesteps the network supports, if it was exported for one plan
            (export/passes/fold_timesteps.py); empty if it supports all.
        distilled: Kind of distillation, if it trained the network for specific sampling plans; '' if any plan fits.
        distilled_timesteps: Timesteps of other plans with the same solver that a distilled network was trained for.
        baked_in_guidance: Guidance weight that the network was distilled from, 1 if none. Further distillation uses it
            where the plan's own weight is 1.
        solver_settings: Settings of solvers that differ from the rules in `diffpress.runtime.carried_settings`.

    Examples:
        >>> import diffpress as dp
        >>> schedule = dp.flow_schedule(1000)
        >>> spec = dp.DenoiserSpec("flow", schedule, (3, 32, 32), dp.make_plan("euler", 20, schedule))
        >>> spec.image_size
        (32, 32)
    """

    prediction: str
    schedule: NoiseSchedule
    sample_shape: tuple[int, ...]
    plan: SamplingPlan
    conditioning: Conditioning = field(default_factory=Conditioning)
    latent_scale: float = 1.0
    latent_shift: float = 0.0
    data_range: tuple[float, float] = (-1.0, 1.0)
    latent_factor: int = 1
    size_multiple: int = 1
    spacing: TimestepSpacing = field(default_factory=TimestepSpacing)
    fixed_timesteps: tuple[float, ...] = ()
    distilled: str = ""
    distilled_timesteps: tuple[tuple[float, ...], ...] = ()
    baked_in_guidance: float = 1.0
    solver_settings: tuple[SolverSettings, ...] = ()

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise InvalidInputError(f"prediction '{self.prediction}' is not one of {', '.join(PREDICTIONS)}")
        sizes = tuple(self.sample_shape)
        object.__setattr__(self, "sample_shape", sizes)  # a list or torch.Size compares and prints differently
        if not 1 <= len(sizes) <= MAX_RANK or min(sizes) < 1 or math.prod(sizes) > LARGEST:
            raise InvalidInputError(
                f"sample shape {sizes} must have 1 to {MAX_RANK} sizes, channels first, as in (D,), (C, L), (C, H, W) "
                f"or (C, T, H, W), each at least 1, and together at most {LARGEST} values"
            )
        if max(self.plan.timesteps) > len(self.schedule) - 1:
            raise InvalidInputError(
                f"plan: timestep {max(self.plan.timesteps):g} lies beyond the last one, {len(self.schedule) - 1}"
            )
        foreign = [t for t in self.plan.timesteps if self.fixed_timesteps and t not in self.fixed_timesteps]
        if foreign:
            raise InvalidInputError(
                f"plan: timestep {foreign[0]:g} is not one of the {len(self.fixed_timesteps)} that this network was "
                "exported for; keep the bundle's own steps, or export again without --fixed-timesteps"
            )
        if self.distilled and self.plan.cache is not None:
            raise InvalidInputError(
                f"plan: cache: this network was distilled ({self.distilled}) for few steps, between which too much "
                "changes to reuse anything; remove the cache"
            )
        if any(len(correction.bias) != self.sample_shape[0] for correction in self.plan.output_corrections):
            raise InvalidInputError(
                f"plan: each output correction needs a bias for each of {self.sample_shape[0]} channels"
            )
        if not self.data_range[0] < self.data_range[1]:
            raise InvalidInputError(f"data range {self.data_range} is empty")
        if not (np.isfinite(self.latent_scale) and np.isfinite(self.latent_shift) and self.latent_scale != 0):
            raise InvalidInputError(
                f"latent scale {self.latent_scale}, shift {self.latent_shift}: both must be finite, the scale not zero"
            )
        if self.latent_factor < 1 or self.size_multiple < 1:
            raise InvalidInputError(
                f"latent factor {self.latent_factor} and size multiple {self.size_multiple} must be at least 1"
            )
        if not np.isfinite(self.baked_in_guidance):
            raise InvalidInputError(f"baked-in guidance {self.baked_in_guidance} must be finite")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the final image, in pixels; raises InvalidInputError if samples are not [C, H, W]."""
        if len(self.sample_shape) != 3:
            raise InvalidInputError(
                f"samples of shape {self.sample_shape} are no images: they have no height and width"
            )
        return self.sample_shape[1] * self.latent_factor, self.sample_shape[2] * self.latent_factor

    @property
    def is_pixel_space(self) -> bool:
        """Whether samples are images. Text-conditional denoisers exported without a decoder have latents as well."""
        return self.latent_factor == 1 and self.conditioning.kind != "text"

    @property
    def is_picture(self) -> bool:
        """Whether a sample itself can be shown as a picture: pixels [C, H, W] with 1, 3 or 4 channels."""
        return self.is_pixel_space and is_picture(self.sample_shape)

    def tokens(self, shape: tuple[int, ...]) -> int:
        """Return the number of image tokens of a sample of this shape, as dynamic shifts count them.

        A token covers `size_multiple` latent cells along each side.
        """
        return math.prod(side // self.size_multiple for side in shape[1:])

    @property
    def masked_image_shape(self) -> tuple[int, ...]:
        """Shape of the masked image that a network for inpainting reads: its channels at the sample's size."""
        cell = {"": 0, "mask": 1, "pixel_mask": self.latent_factor**2}[self.conditioning.inpainting]
        return (self.sample_shape[0] + cell, *self.sample_shape[1:])

    @property
    def takes_integers(self) -> bool:
        """Whether the network takes integer timesteps: discrete-time models without text conditioning do."""
        return self.prediction != "flow" and self.conditioning.kind != "text" and self.spacing.integer

    def with_plan(self, plan: SamplingPlan) -> DenoiserSpec:
        """Return the spec with another sampling plan."""
        return replace(self, plan=plan)

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON-serializable data, without entries of later versions that are not in use."""
        data = asdict(self)
        # keeps the hashes of checkpoints that were saved before these entries existed
        if self.baked_in_guidance == 1.0:
            del data["baked_in_guidance"]
        if not self.conditioning.tensors:
            del data["conditioning"]["tensors"]
        if not self.conditioning.inpainting:
            del data["conditioning"]["inpainting"]
        data |= {"plan": self.plan.to_json(), "spacing": self.spacing.to_json()}
        data["solver_settings"] = [settings.to_json() for settings in self.solver_settings]
        if not self.solver_settings:
            del data["solver_settings"]
        return data

    @staticmethod
    def from_json(data: Any, where: str = "spec") -> DenoiserSpec:
        """Read a spec from its JSON form.

        Raises:
            InvalidInputError: An entry is missing, unknown or of the wrong type; the message starts with `where`.
        """
        raw = check_fields(DenoiserSpec, data, where)
        with convert_errors(where):
            return DenoiserSpec(
                prediction=str(raw["prediction"]),
                schedule=NoiseSchedule(
                    **{k: floats(v) for k, v in check_fields(NoiseSchedule, raw["schedule"], where).items()}
                ),
                sample_shape=tuple(int(size) for size in raw["sample_shape"]),
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
                distilled_timesteps=tuple(floats(timesteps) for timesteps in raw.get("distilled_timesteps", ())),
                baked_in_guidance=float(raw.get("baked_in_guidance", 1.0)),
                solver_settings=tuple(
                    solver_settings_from_json(entry, f"{where}.solver_settings")
                    for entry in raw.get("solver_settings", ())
                ),
            )


def is_picture(shape: tuple[int, ...]) -> bool:
    """Return whether an array of this shape can be shown as a picture: [C, H, W] with 1, 3 or 4 channels."""
    return len(shape) == 3 and shape[0] in PICTURE_CHANNELS


def _range(values: Any) -> tuple[float, float]:
    low, high = (float(v) for v in values)
    return low, high
