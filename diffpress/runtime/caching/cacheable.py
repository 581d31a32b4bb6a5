"""Which solvers a step cache works with.

A second evaluation in a step would need a cache of its own, and fresh noise makes the next output unpredictable.
"""

from __future__ import annotations

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.solvers import SOLVERS, get_solver, solver_evaluations


def check_cacheable(solver: str, eta: float, where: str) -> None:
    """Raise InvalidInputError if no plan of this solver and eta can have a cache, with the solvers that can.

    An unknown solver is refused as in `get_solver`.
    """
    noisy = get_solver(solver).noisy or eta > 0.0
    if is_cacheable(solver) and not noisy:
        return
    able = ", ".join(name for name in SOLVERS if is_cacheable(name))
    reason = "adds noise in every step" if noisy else "evaluates the network more than once in a step"
    named = f"solver '{solver}'" + (f" with eta {eta:g}" if noisy and not SOLVERS[solver].noisy else "")
    raise InvalidInputError(f"{where}: {named} {reason}; a step cache works with eta 0 and the solvers {able}")


def is_cacheable(solver: str) -> bool:
    """Whether a solver evaluates the network once in each step, and adds no noise with eta 0."""
    return not SOLVERS[solver].noisy and all(solver_evaluations(solver, steps) == steps for steps in (4, 9))
