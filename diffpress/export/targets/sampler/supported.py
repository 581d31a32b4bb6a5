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
    conditioning = spec.conditioning
    if conditioning.inpainting:
        raise InvalidInputError(
            "target sampler: a network for inpainting reads an image, which a sampler has no input for"
        )
    for name in conditioning.tensors:
        if name in NAMES_IN_USE:
            raise InvalidInputError(f"target sampler: the tensor '{name}' has the name of another input; rename it")
    program = fused_program(spec)
    if program is None:
        raise InvalidInputError(
            f"target sampler: {_unsupported(spec)} cannot be part of one graph of deterministic steps; choose another "
            "plan (stage schedule, or --solver), or leave the target out"
        )
    return program


def _unsupported(spec: DenoiserSpec) -> str:
    """Return the setting because of which a plan has no program."""
    plan = spec.plan
    solver, cache = get_solver(plan.solver), plan.cache
    settings = {
        "threshold": plan.threshold is not None,
        f"guidance_rescale {plan.guidance_rescale:g}": plan.guidance_rescale > 0.0,
        "guidance_interval": plan.guidance_interval is not None,
        "a step cache of kind features": cache is not None and cache.kind == "features" and not cache.is_idle,
        f"solver {plan.solver} (it evaluates the network more than once per step)": (
            solver.evaluations(plan.steps) != plan.steps
        ),
        f"solver {plan.solver} (it adds noise between steps)": solver.noisy,
        f"eta {plan.eta:g} (it adds noise between steps)": plan.eta > 0.0,
    }
    return next((name for name, is_set in settings.items() if is_set), f"solver {plan.solver}")
