"""Which steps of a plan to evaluate in full: the patterns of lowest cost, by dynamic programming.

    V_1(S) = sum of error(S, j) over all j after S
    V_e(S) = min_n  sum of error(S, j) over the j before n  +  gamma V_(e-1)(S')

S are the last order + 1 full steps, S' those with one more full step n, and error(S, j) is the cost of leaving out the
evaluation of step j.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MAX_GAP = 8  # a full step and the others after it, at most

Pattern = tuple[int, ...]  # indices of the full steps, ascending from 0
Errors = Callable[[Pattern, int], float]


def best_patterns(error: Errors, steps: int, order: int, gamma: float) -> dict[int, Pattern]:
    """Return number of full steps -> the pattern of lowest cost with that many, by the recursion above.

    Numbers that would need more than MAX_GAP steps from one full step to the next are left out.
    """
    costs: dict[Pattern, np.ndarray] = {}
    choices: dict[Pattern, np.ndarray] = {}
    for last in reversed(range(steps)):
        for state in _states(last, order):
            # [e]: cost of e + 1 full steps from the last one of the state on
            best, choice = np.full(steps, np.inf), np.zeros(steps, np.int64)
            so_far = 0.0
            for following in range(last + 1, min(last + MAX_GAP, steps) + 1):
                if following == steps:
                    if so_far < best[0]:
                        best[0], choice[0] = so_far, steps
                    break
                cost = so_far + gamma * costs[(*state, following)[-(order + 1) :]][:-1]
                better = cost < best[1:]
                best[1:][better], choice[1:][better] = cost[better], following
                so_far += error(state, following)
            costs[state], choices[state] = best, choice
    found = {}
    for count in range(1, steps + 1):
        if np.isfinite(costs[0,][count - 1]):
            state, pattern = (0,), [0]
            for left in range(count - 1, 0, -1):
                following = int(choices[state][left])
                pattern.append(following)
                state = (*state, following)[-(order + 1) :]
            found[count] = tuple(pattern)
    return found


def _states(last: int, order: int) -> list[Pattern]:
    """Return every tuple of the last order + 1 full steps that ends with `last`; fewer only if it starts with 0."""
    found: list[Pattern] = [(last,)]
    complete: list[Pattern] = []
    for _ in range(order):
        complete += [state for state in found if state[0] == 0]
        found = [
            (before, *state) for state in found for before in range(max(0, state[0] - MAX_GAP), state[0]) if state[0]
        ]
    return [*complete, *(state for state in found if len(state) == order + 1)] if order else found
