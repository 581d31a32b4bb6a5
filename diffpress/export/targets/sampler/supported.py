"""What a sampler graph cannot express: each is refused by name, before any work and again when the graph is built."""

from __future__ import annotations

from diffpress.export.targets.sampler.conditioning import IMAGES, NOISE
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.fused.program import Program, fused_program
from diffpress.runtime.solvers import get_solver
from diffpress.runtime.spec import DenoiserSpec

NAMES_IN_USE = (NOISE, "labels", IMAGES)


def checked_program(spec: DenoiserSpec) -> Program:
    """Return the program of a spec's plan.

    Raises:
        InvalidInputError: The plan or the conditioning has a setting that a sampler graph cannot express.
    """
    setting = _unsupported(spec)
    program = None if setting else fused_program(spec)
    if program is None:
        raise InvalidInputError(
            f"target sampler: {setting or f'solver {spec.plan.solver}'} cannot be part of one graph of deterministic "
            "steps; choose another plan (stage schedule, or --solver), or leave the target out"
        )
    return program


def _unsupported(spec: DenoiserSpec) -> str | None:
    """Return the first setting that a sampler graph cannot express; None if there is none that is known ahead."""
    plan, conditioning = spec.plan, spec.conditioning
    solver = get_solver(plan.solver)
    cache = plan.cache
    settings = {
        f"solver {plan.solver} (it adds noise in every step)": solver.noisy,
        f"solver {plan.solver} (it evaluates the network more than once per step)": (
            solver.evaluations(plan.steps) != plan.steps
        ),
        f"eta {plan.eta:g} (noise in every step)": plan.eta > 0.0,
        "threshold": plan.threshold is not None,
        f"guidance_rescale {plan.guidance_rescale:g}": plan.guidance_rescale > 0.0,
        "guidance_interval": plan.guidance_interval is not None,
        "a step cache of kind features": cache is not None and cache.kind == "features" and not cache.is_idle,
        "an image to inpaint": bool(conditioning.inpainting),
        **{f"a tensor named '{name}'": name in NAMES_IN_USE for name in conditioning.tensors},
    }
    return next((name for name, is_set in settings.items() if is_set), None)
