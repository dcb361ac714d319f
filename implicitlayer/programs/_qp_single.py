"""The exact solution of one quadratic program on the CPU: the rounds of ``_qp_exact`` with NumPy's vectors."""

# Formulas and rules are those of ``_qp_exact`` (NOTE [active set]) and of ``Conditions`` (NOTE [scales]); what is left
# of them for one program costs a tenth of the time. Only what is proved is handed out: where a few rounds do not find
# an active set for which all conditions of optimality hold to TIGHT, the answer is None and the long way is taken.
#
# NOTE [cold start]: the search needs no interior point to begin with. From the minimum under the equations alone the
# primal-dual active set step reaches the solution of most strictly convex programs in 3 to 10 rounds, each of them one
# linear solve with the factors of Q. Of borders that are crossed a round takes the worst, as many as fill half of the
# freedom that is left: all of them together would soon be more than there are unknowns. A set of borders that comes
# again, or one that is not independent, ends it.

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from implicitlayer.programs._interior_point import ProgramStatus, QuadraticSolution
from implicitlayer.programs._interior_point_single import Array
from implicitlayer.programs._qp_exact import CORRECTIONS, TIGHT, Exact, factorised
from implicitlayer.programs._qp_schur import SchurRows
from implicitlayer.programs._qp_terms import Mask, SingleProgram

__all__ = ["exact_cold", "exact_near"]

_ROUNDS = 4  # active sets that are tried next to an answer
_COLD = 15  # from a cold start


def exact_cold(program: SingleProgram) -> Exact | None:
    """The proved solution; see NOTE [cold start]."""
    if not 0 < program.curved < math.inf:
        return None
    lengths = np.concatenate([program.of_b, program.of_h])
    with np.errstate(all="ignore"):
        system = SchurRows(program.Q, program.curved, program.A, program.G, lengths)
        if not system.definite:
            return None
        f, borders = program.p / -program.curved, np.concatenate([program.b, program.h]) / system.lengths
        held, seen, e = np.zeros(len(program.h), dtype=bool), set[bytes](), len(program.b)
        while held.tobytes() not in seen and len(seen) < _COLD:
            seen.add(held.tobytes())
            rows = system.hold(held)
            if rows is None:
                return None
            for corrections in (0, CORRECTIONS):  # for the second time where the first finds nothing wrong
                x, w = rows.point(f, borders[rows.keep], corrections)
                w = w * program.curved / system.lengths[rows.keep]
                z = np.zeros_like(program.h)
                z[held] = w[e:]
                wrong = program.wrong(x, z, held)
                if wrong.any():
                    break
            else:
                proved = _proved(program, x, w[:e], z, held, len(seen))
                return None if proved is None else replace(proved, factors=rows.factors(program.lanes))
            held = _next(program, x, z, held, wrong)
    return None


def _next(program: SingleProgram, x: Array, z: Array, held: Mask, wrong: Mask) -> Mask:
    """The borders of the next round: without those that pull, with the worst of those that are crossed."""
    stay, crossed = held & ~wrong, wrong & ~held
    room = max((len(program.p) - len(program.b) - int(np.count_nonzero(stay))) // 2, 1)
    if np.count_nonzero(crossed) > room:
        _, distance = program.sides(x, z)
        worst = np.argsort(np.where(crossed, distance, math.inf), kind="stable")[:room]
        crossed = np.zeros_like(crossed)
        crossed[worst] = True
    return stay | crossed


def exact_near(program: SingleProgram, answer: QuadraticSolution) -> Exact | None:
    """The proved solution next to the answer."""
    x0, y0, z0 = (t.reshape(-1).numpy() for t in (answer.x, answer.equality, answer.inequality))
    with np.errstate(all="ignore"):
        force, distance = program.sides(x0, z0)
        held = force > distance
        for _ in range(_ROUNDS):
            factors = factorised(program.data, torch.from_numpy(held).reshape((*program.lanes, -1)))
            x, y, z = x0, y0, z0 * held
            for _ in range(CORRECTIONS):
                off = torch.from_numpy(program.off(x, y, z, held)).reshape((*program.lanes, -1, 1))
                step = factors.solve(off).reshape(-1).numpy()
                x, y, z = x - step[: len(x)], y - step[len(x) : len(x) + len(y)], z - step[len(x) + len(y) :]
            wrong = program.wrong(x, z, held)
            if not wrong.any():
                break
            held = held ^ wrong
        else:
            return None
        proved = _proved(program, x, y, z * held, held, int(answer.steps.max()))
    return None if proved is None else replace(proved, factors=factors)


def _proved(program: SingleProgram, x: Array, y: Array, z: Array, held: Mask, steps: int) -> Exact | None:
    error = program.violation(x, y, z)
    if not error <= TIGHT:
        return None
    x_, y_, z_, held_ = (program.lane(part) for part in (x, y, z, held))
    left = torch.full(program.lanes, error, dtype=torch.float64)
    code, count = (torch.full(program.lanes, v) for v in (int(ProgramStatus.SOLVED), steps))
    return Exact(QuadraticSolution(x_, y_, z_, code, count, left), left, held_, None)
