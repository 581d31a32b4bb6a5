"""How a solver samples a model with a given timestep spacing: its own timesteps, and where its plans start and end.

diffusers couples solver and spacing. `Scheduler.from_config(pipe.scheduler.config)` carries the setting of
`timestep_spacing` over, but each family of schedulers makes other timesteps of it:

    family    solvers                                        leading        linspace        starts from
    ddim      ddim, ddpm, plms, pndm                         leading        linspace        noise of unit variance
    euler     euler, euler_ancestral, heun, lms, kdpm2,      leading        linspace,       noise of variance sigma^2,
              dpmpp_sde                                                     fractional      unless leading
    dpm       dpmpp_*, unipc_*, deis_*                       dpm_leading    dpm_linspace    noise of unit variance
    lcm       lcm                                            lcm            lcm             noise of unit variance

'trailing' is the same for all but lcm. Spacings that are not diffusers' (quad, ays_*, ...) and flow schedules keep
their timesteps with every solver. Where the scheduler config of a model says something else, the spec holds the
settings of that solver, or the reason why it cannot follow the config.
"""

from __future__ import annotations

from dataclasses import replace

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseSchedule, is_flow
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.solver_settings import SolverSettings
from diffpress.runtime.solvers import CLIPPING, get_solver
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import TimestepSpacing

DPM_KINDS = {"leading": "dpm_leading", "linspace": "dpm_linspace"}
PLAIN_KINDS = {dpm: plain for plain, dpm in DPM_KINDS.items()}
SHARED_KINDS = {*DPM_KINDS, *PLAIN_KINDS, "trailing"}

FAMILIES = {
    **dict.fromkeys(("ddim", "ddim_clip", "ddpm", "ddpm_large", "plms", "plms_v", "pndm", "pndm_v"), "ddim"),
    **dict.fromkeys(("euler", "euler_ancestral", "heun", "lms", "kdpm2", "dpmpp_sde"), "euler"),
    **dict.fromkeys(("dpmpp_2m", "dpmpp_2m_heun", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_2s", "dpm_2m"), "dpm"),
    **dict.fromkeys(("unipc_1", "unipc_2", "unipc_3", "unipc_bh1_1", "unipc_bh1_2", "unipc_bh1_3"), "dpm"),
    **dict.fromkeys(("deis_2", "deis_3"), "dpm"),
    "lcm": "lcm",
}


def carried_settings(spacing: TimestepSpacing, schedule: NoiseSchedule, solver: str) -> SolverSettings:
    """Return the settings of a solver on a model with this spacing, by the rules above.

    Raises:
        InvalidInputError: Unknown solver.
    """
    get_solver(solver)
    family = FAMILIES.get(solver)
    end = 0.0 if solver.startswith("deis") else None
    settings = SolverSettings(solver, runs=solver, spacing=spacing, end=end)
    if is_flow(schedule) or family is None or spacing.kind not in SHARED_KINDS:
        return settings
    kind = (DPM_KINDS if family == "dpm" else PLAIN_KINDS).get(spacing.kind, spacing.kind)
    integer = family != "euler" or kind != "linspace"
    if family == "lcm":
        kind = "lcm"
    offset = spacing.offset if kind.endswith("leading") else 0
    start = "noise" if family == "euler" and kind != "leading" else SamplingPlan.start
    return replace(settings, spacing=TimestepSpacing(kind, offset, integer), start=start)


def settings_of(spec: DenoiserSpec, solver: str) -> SolverSettings:
    """Return the settings of a solver on the spec's model.

    Raises:
        InvalidInputError: Unknown solver, or one that cannot follow the model's scheduler config.
    """
    recorded = next((known for known in spec.solver_settings if known.solver == solver), None)
    if recorded is None:
        return carried_settings(spec.spacing, spec.schedule, solver)
    if recorded.refused:
        raise InvalidInputError(f"solver '{solver}' cannot sample this model: {recorded.refused}; use another solver")
    return recorded


def with_solver(spec: DenoiserSpec, name: str) -> SamplingPlan:
    """Return the spec's plan with another solver and the plan's timesteps.

    `start` and `end` become the solver's. The output corrections and the step cache are dropped, because they were
    measured with the plan's own solver. Either the plan or its solver clips x_0, never both.

    Raises:
        InvalidInputError: As in `settings_of`.
    """
    plan = spec.plan
    settings = settings_of(spec, name)
    if settings.runs == plan.solver:
        return plan
    clip = (plan.clip or plan.solver == CLIPPING) if settings.clip is None else settings.clip
    return replace(
        plan,
        solver=settings.runs,
        start=settings.start,
        end=settings.end,
        clip=clip and settings.runs != CLIPPING,
        threshold=plan.threshold if settings.clip is None else settings.threshold,
        output_corrections=(),
        cache=None,
    )
