"""The scheduler classes of diffusers that we follow: for each its family, its solver, and the followed entries.

One allow-list: an entry of a scheduler's signature that is neither in its class's `followed`, nor at its default, is
refused by name. The function of a class picks the solver, and refuses values that no solver implements. Entries of
other classes, which diffusers ignores, are ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.solvers import CLIPPING

Settings = dict[str, Any]

TABLE = frozenset(
    ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
)
SPACED = frozenset(("timestep_spacing", "steps_offset"))
SIGMAS = frozenset(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"))
THRESHOLD = frozenset(("thresholding", "dynamic_thresholding_ratio", "sample_max_value"))
CLIP = frozenset(("clip_sample", "clip_sample_range"))
SHIFT = frozenset(
    (
        "num_train_timesteps",
        "shift",
        "use_dynamic_shifting",
        "base_shift",
        "max_shift",
        "base_image_seq_len",
        "max_image_seq_len",
        "shift_terminal",
        "time_shift_type",
    )
)
ZERO_SNR = frozenset(("rescale_betas_zero_snr",))
OWN_NOISE = "the noise added at each step is drawn by diffpress's own generator"


class SchedulerClass(NamedTuple):
    """A scheduler class: its family (`diffpress.runtime.carried_settings`, or 'flow'), solver and followed entries."""

    family: str
    solver: Callable[[Settings], str]
    followed: frozenset[str]
    note: str | None = None


def only(settings: Settings, entry: str, *values: Any) -> Any:
    """Return the setting; raise InvalidInputError if it is none of the values."""
    value = settings.get(entry, values[0])
    if value not in values:
        supported = " or ".join(str(known) for known in values)
        raise InvalidInputError(f"{entry} {value} is not supported, only {supported}")
    return value


def _clipping(settings: Settings) -> bool:
    """Whether x_0 is clipped, to -1..1."""
    clips = bool(settings.get("clip_sample")) and not settings.get("thresholding")
    if clips:
        only(settings, "clip_sample_range", 1.0)
    return clips


def _plain(solver: str) -> Callable[[Settings], str]:
    def choose(settings: Settings) -> str:
        _clipping(settings)
        return solver

    return choose


def _ddim(settings: Settings) -> str:
    only(settings, "thresholding", False)  # diffusers keeps eps when it thresholds x_0
    return CLIPPING if _clipping(settings) else "ddim"


def _ddpm(settings: Settings) -> str:
    _clipping(settings)
    if only(settings, "variance_type", "fixed_small", "fixed_small_log", "fixed_large", None) != "fixed_large":
        return "ddpm"
    only(settings, "timestep_spacing", "leading")  # diffusers would add noise to the final clean sample
    only(settings, "steps_offset", 0)
    return "ddpm_large"


def _pndm(settings: Settings) -> str:
    only(settings, "timestep_spacing", "leading")  # it steps by T // N, which differs from the other timesteps
    if not settings["skip_prk_steps"]:
        only(settings, "steps_offset", 0, 1)
    name = "plms" if settings["skip_prk_steps"] else "pndm"
    return name if only(settings, "prediction_type", "epsilon", "v_prediction") == "epsilon" else f"{name}_v"


def _euler(settings: Settings) -> str:
    if settings["prediction_type"] == "v_prediction":
        only(settings, "timestep_type", "discrete")
    only(settings, "interpolation_type", "linear")
    only(settings, "final_sigmas_type", "zero")  # its last sample is x / alpha, which no noise level of ours is
    return "euler"


def _dpm(settings: Settings) -> str:
    algorithm = only(settings, "algorithm_type", "dpmsolver++", "sde-dpmsolver++", "dpmsolver")
    only(settings, "use_dynamic_shifting", False)
    _not_learned(settings)
    order = _order(settings, 3 if algorithm == "dpmsolver++" else 2)
    if algorithm == "dpmsolver":
        only(settings, "final_sigmas_type", "sigma_min")
        only(settings, "use_flow_sigmas", False)
        only(settings, "thresholding", False)
    _final_orders(settings, order)
    if order == 1:
        return "ddpm" if algorithm == "sde-dpmsolver++" else "ddim"
    if algorithm == "dpmsolver++" and order == 2 and settings["solver_type"] == "heun":
        return "dpmpp_2m_heun"
    only(settings, "solver_type", "midpoint")
    if algorithm == "dpmsolver++":
        return f"dpmpp_{order}m"
    return "dpm_2m" if algorithm == "dpmsolver" else "dpmpp_2m_sde"


def _not_learned(settings: Settings) -> None:
    """Refuse learned variances; the fixed ones of other classes have no effect."""
    if settings.get("variance_type") in ("learned", "learned_range"):
        only(settings, "variance_type", None)


def _final_orders(settings: Settings, order: int) -> None:
    """Check that the last steps have the orders of our solvers: below 15 steps 1 in the last, 2 in the one before."""
    if order == 3 or (order == 2 and settings.get("final_sigmas_type") == "sigma_min"):
        only(settings, "lower_order_final", True)
    if order > 1 and settings.get("final_sigmas_type") == "sigma_min":
        only(settings, "euler_at_final", False)


def _order(settings: Settings, highest: int) -> int:
    return int(only(settings, "solver_order", *range(1, highest + 1)))


def _singlestep(settings: Settings) -> str:
    only(settings, "algorithm_type", "dpmsolver++")
    only(settings, "use_dynamic_shifting", False)
    _not_learned(settings)
    order = _order(settings, 2)
    only(settings, "final_sigmas_type", "zero")
    if order == 1:
        return "ddim"
    only(settings, "solver_type", "midpoint")
    return "dpmpp_2s"


def _deis(settings: Settings) -> str:
    only(settings, "use_dynamic_shifting", False)
    only(settings, "use_flow_sigmas", False)
    order = _order(settings, 3)
    if order > 1:
        only(settings, "lower_order_final", True)
    return "ddim" if order == 1 else f"deis_{order}"


def _unipc(settings: Settings) -> str:
    only(settings, "use_dynamic_shifting", False)
    only(settings, "predict_x0", True)
    only(settings, "disable_corrector", [])
    only(settings, "solver_p", None)
    only(settings, "shift_terminal", None)
    order = _order(settings, 3)
    if order > 1:
        only(settings, "lower_order_final", True)
    return f"unipc_bh1_{order}" if settings["solver_type"] == "bh1" else f"unipc_{order}"


def _flow_euler(settings: Settings) -> str:
    only(settings, "invert_sigmas", False)
    return "consistency" if settings["stochastic_sampling"] else "euler"


def _flow_lcm(settings: Settings) -> str:
    only(settings, "invert_sigmas", False)
    only(settings, "scale_factors", None, [])
    return "consistency"


_DDIM = SchedulerClass("ddim", _ddim, TABLE | SPACED | CLIP | ZERO_SNR | THRESHOLD | {"set_alpha_to_one"})
_DDPM = SchedulerClass("ddim", _ddpm, TABLE | SPACED | CLIP | ZERO_SNR | THRESHOLD | {"variance_type"}, OWN_NOISE)
_ORDERS = frozenset(("solver_order", "solver_type", "lower_order_final"))
_FLOW_SIGMAS = frozenset(("use_flow_sigmas", "flow_shift", "use_dynamic_shifting", "time_shift_type"))
_DPM = TABLE | THRESHOLD | SIGMAS | _ORDERS | _FLOW_SIGMAS | {"algorithm_type", "final_sigmas_type", "variance_type"}

SCHEDULERS = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "PNDMScheduler": SchedulerClass("ddim", _pndm, TABLE | SPACED | {"skip_prk_steps", "set_alpha_to_one"}),
    "LCMScheduler": SchedulerClass(
        "lcm",
        _plain("lcm"),
        # each step is spaced on the timesteps of training, and the last one always ends at x_0
        TABLE | SPACED | CLIP | ZERO_SNR | THRESHOLD | {"original_inference_steps", "set_alpha_to_one"},
        OWN_NOISE,
    ),
    "EulerDiscreteScheduler": SchedulerClass(
        "euler",
        _euler,
        TABLE
        | SPACED
        | SIGMAS
        | ZERO_SNR
        | {"final_sigmas_type", "sigma_min", "sigma_max", "interpolation_type", "timestep_type"},
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass(
        "euler", _plain("euler_ancestral"), TABLE | SPACED | ZERO_SNR, OWN_NOISE
    ),
    "HeunDiscreteScheduler": SchedulerClass("euler", _plain("heun"), TABLE | SPACED | SIGMAS | CLIP),
    "LMSDiscreteScheduler": SchedulerClass("euler", _plain("lms"), TABLE | SPACED | SIGMAS),
    "KDPM2DiscreteScheduler": SchedulerClass("euler", _plain("kdpm2"), TABLE | SPACED | SIGMAS),
    "DPMSolverSDEScheduler": SchedulerClass(
        "euler", _plain("dpmpp_sde"), TABLE | SPACED | SIGMAS | {"noise_sampler_seed"}, OWN_NOISE
    ),
    "DPMSolverMultistepScheduler": SchedulerClass(
        "dpm", _dpm, _DPM | SPACED | ZERO_SNR | {"euler_at_final", "use_lu_lambdas", "lambda_min_clipped"}
    ),
    "DPMSolverSinglestepScheduler": SchedulerClass("dpm", _singlestep, _DPM | {"lambda_min_clipped"}),
    "DEISMultistepScheduler": SchedulerClass(
        "dpm", _deis, TABLE | SPACED | THRESHOLD | SIGMAS | _ORDERS | _FLOW_SIGMAS | {"algorithm_type"}
    ),
    "UniPCMultistepScheduler": SchedulerClass(
        "dpm",
        _unipc,
        TABLE
        | SPACED
        | THRESHOLD
        | SIGMAS
        | ZERO_SNR
        | _ORDERS
        | _FLOW_SIGMAS
        | {"predict_x0", "disable_corrector", "solver_p", "final_sigmas_type", "sigma_min", "sigma_max"}
        | {"shift_terminal"},
    ),
    "FlowMatchEulerDiscreteScheduler": SchedulerClass(
        "flow", _flow_euler, SHIFT | SIGMAS | {"invert_sigmas", "stochastic_sampling"}
    ),
    "FlowMatchHeunDiscreteScheduler": SchedulerClass("flow", _plain("heun_flow"), SHIFT),
    "FlowMatchLCMScheduler": SchedulerClass(
        "flow", _flow_lcm, SHIFT | SIGMAS | {"invert_sigmas", "scale_factors", "upscale_mode"}, OWN_NOISE
    ),
}

# Classes whose noise schedule and prediction are those of DDPM, but whose solver we do not have.
SAME_PARAMETERIZATION = ("KDPM2AncestralDiscreteScheduler", "SASolverScheduler", "TCDScheduler")

# The scheduler class and settings that correspond to a solver, for models with another scheduler.
EQUIVALENTS: dict[str, tuple[str, Settings]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddim_clip": ("DDIMScheduler", {"clip_sample": True}),
    "ddpm": ("DDPMScheduler", {"variance_type": "fixed_small"}),
    "ddpm_large": ("DDPMScheduler", {"variance_type": "fixed_large"}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "plms_v": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": False}),
    "pndm_v": ("PNDMScheduler", {"skip_prk_steps": False}),
    "lcm": ("LCMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "dpm_2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "solver_order": 2, "final_sigmas_type": "sigma_min"},
    ),
    **{
        name: ("DPMSolverMultistepScheduler", {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind})
        for name, algorithm, order, kind in (
            ("dpmpp_2m", "dpmsolver++", 2, "midpoint"),
            ("dpmpp_2m_heun", "dpmsolver++", 2, "heun"),
            ("dpmpp_3m", "dpmsolver++", 3, "midpoint"),
            ("dpmpp_2m_sde", "sde-dpmsolver++", 2, "midpoint"),
        )
    },
    "dpmpp_2s": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
    ),
    **{
        f"unipc_{infix}{order}": ("UniPCMultistepScheduler", {"solver_order": order, "solver_type": kind})
        for infix, kind in (("", "bh2"), ("bh1_", "bh1"))
        for order in (1, 2, 3)
    },
    **{f"deis_{order}": ("DEISMultistepScheduler", {"solver_order": order}) for order in (2, 3)},
}
