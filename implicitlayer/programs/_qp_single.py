"""The exact solution of one quadratic program on the CPU: the rounds of ``_qp_exact`` with NumPy's vectors."""

# Formulas and rules are those of ``_qp_exact`` (NOTE [active set]) and of ``Conditions`` (NOTE [scales]); what is left
# of them for one program costs a tenth of the time. Only what is proved is handed out: where a few rounds do not find
# an active set for which all conditions of optimality hold to TIGHT, the answer is None and the long way is taken.
#
# NOTE [cold start]: the search needs no interior point to begin with. From the minimum under the equations alone the
# primal-dual active set step reaches the solution of most strictly convex programs in 3 to 10 rounds, each of them one
# linear solve with the factors of Q. Of borders that are crossed a round takes the worst, as many as fill half of the
# freedom that is left: all of them together would soon be more than there are unknowns. A set of borders that comes
# again, or one that is not independent, ends it. Where a round finds nothing wrong, x and its multipliers are made
# exact and judged by the conditions of the program itself, which prove them or show what else is wrong.
#
# NOTE [repairs]: the derivative in a held row is l u_x + u_w x, with the multipliers l of the solution x. Where Q is
# small beside the forces (a linear program with a tiny ridge) u_x is the rounding of terms that are divided by Q, and
# u_x times l may be larger than u_w x, while both are nothing beside v over Q. So J u_x = g is to hold to the rounding
# of |x| |u_w| / |l|, in the unit of the row, or of J u_x itself; further solves, for what is left, take it there.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from implicitlayer.programs._interior_point import ProgramStatus, QuadraticSolution
from implicitlayer.programs._interior_point_single import Array, norm
from implicitlayer.programs._kkt_linear import Factors
from implicitlayer.programs._qp_exact import CORRECTIONS, EXACT, TIGHT, Exact, factorised
from implicitlayer.programs._qp_schur import SchurRows
from implicitlayer.programs._qp_terms import Mask, SingleProgram, Terms


class System(Protocol):
    """What solves with the matrix of an active set; ``keep`` are the rows that it holds, [e + held]."""

    keep: npt.NDArray[np.intp]

    def solve(self, f: Array, g: Array) -> tuple[Array, Array]:
        """x [n] and w [c], zero where not held, with Q x + J'w = f and J x = g in the rows that are held."""

    def factors(self, lanes: torch.Size) -> Factors:
        """The same for tensors [*lanes, ...]."""


_ROUNDS = 4  # active sets that are tried next to an answer
_COLD = 15  # from a cold start
REPAIRS = 3  # solves for what is left of an adjoint
ROUNDED = 8 * float(np.finfo(np.float64).eps)  # of the length of u_x: its products with rows are rounded by less
_NOISE = 1e-10  # of the largest length: a border that is crossed, or pulls, by less is not said to in a round


@dataclass(frozen=True, eq=False)
class SingleProof:
    """A solution that satisfies all conditions of optimality to TIGHT, with the inequalities ``held`` [m] as equations.

    Attributes:
        terms: at the solution. error: its violation. steps: rounds of the search.
        system: what solves with the matrix; None where it has no factors that can be relied on.
        found_by: the search.
    """

    terms: Terms
    held: Mask
    error: float
    steps: int
    system: System | None
    found_by: str

    def settled(self, eps: float, active_rtol: float, rtol: float) -> bool:
        """Whether the active set is all there is to say; see :meth:`Terms.settled`."""
        return self.terms.settled(self.held, eps, active_rtol, rtol)

    def solution(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, the multipliers of either kind, and what is held, [*lanes, ...]."""
        of, e = self.terms.of, self.terms.of.e
        y, z = self.terms.w[:e], np.where(self.held, self.terms.w[e:], 0.0)
        return of.lane(self.terms.x), of.lane(y), of.lane(z), of.lane(self.held)

    def adjoint(self, v: Sequence[torch.Tensor | None], rtol: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        """u_x [*lanes, n] and u_w [*lanes, c] with K u = v; None where that does not hold to ``rtol``.

        Rows that are not held count as zero. The residual is that of D K D, in which no unit of the data matters: D is
        the inverse root of the size of Q in x, and its inverse over the length of a row in the multipliers. These units
        hide what is left of the rows where forces are large beside Q: NOTE [repairs].
        """
        if self.system is None:
            return None
        of, keep = self.terms.of, self.system.keep
        sizes = of.n, of.e, len(of.sides) - of.e
        given = [np.zeros(k) if part is None else part.reshape(-1).numpy() for part, k in zip(v, sizes, strict=True)]
        f, g = given[0], np.concatenate(given[1:])
        largest = max(float(np.abs(f).max()), float(np.abs(g).max()) if len(g) else 0.0)
        if not largest < math.inf:
            return None
        f, g, size = f / (largest or 1.0), g / (largest or 1.0), of.curved or 1.0
        unit, X, force = math.sqrt(size) / of.over[keep], self.terms.size, norm(self.terms.w * of.over)
        b = unit * g[keep]
        x, w, total = *self.system.solve(f, g), f.dot(f) / size + b.dot(b)
        for left_solves in range(REPAIRS, -1, -1):
            left, off = f - of.Qx(x) - of.Jw(w), (g - of.Jx(x))[keep]
            a = unit * off
            error = left.dot(left) / size + a.dot(a)
            span = norm(x)
            reach = min(X * norm(w * of.over) / force, span) if force > 0 else span
            near = np.abs(off) <= EXACT * np.abs(g[keep]) + max(EXACT * reach, ROUNDED * span) * of.over[keep]
            if not left_solves or (error <= EXACT**2 * total and near.all()):
                break
            rest = np.zeros_like(g)
            rest[keep] = off
            dx, dw = self.system.solve(left, rest)
            x, w = x + dx, w + dw
        if not error <= (2 * rtol) ** 2 * total:
            return None
        return of.lane(x * largest), of.lane(w * largest)

    def exact(self) -> Exact:
        """As the long way puts it, with factors."""
        of = self.terms.of
        x, y, z, held = self.solution()
        left = torch.full(of.lanes, self.error, dtype=torch.float64)
        code, count = (torch.full(of.lanes, number) for number in (int(ProgramStatus.SOLVED), self.steps))
        factors = None if self.system is None else self.system.factors(of.lanes)
        return Exact(QuadraticSolution(x, y, z, code, count, left), left, held, factors)


def exact_cold(program: SingleProgram, start: Mask | None = None) -> SingleProof | None:
    """The proved solution; see NOTE [cold start]. ``start``: inequalities to begin with, none by default."""
    if not 0 < program.curved < math.inf:
        return None
    with np.errstate(all="ignore"):
        rows = SchurRows(program)
        if not rows.definite:
            return None
        rows.whole()
        none = np.zeros(len(program.sides) - program.e, dtype=bool)
        held = none if start is None or rows.guess(start) is None else start
        seen, noise = set[bytes](), _NOISE * rows.size
        while held.tobytes() not in seen and len(seen) < _COLD:
            seen.add(held.tobytes())
            guess = rows.guess(held)
            if guess is None:
                return None
            beyond = guess.beyond[program.e :]
            wrong = beyond > noise
            wrong[held] = guess.w[program.e :] < -noise
            if not wrong.any():
                terms, error = _made_exact(Terms(program, *rows.point(guess)), guess.system)
                wrong, beyond = terms.wrong(held), terms.away[program.e :]
                if not wrong.any():
                    proof = SingleProof(terms, held, error, len(seen), guess.system, "active set")
                    return proof if error <= TIGHT else None
            held = _next(program, beyond, held, wrong)
    return None


def _made_exact(best: Terms, system: System) -> tuple[Terms, float]:
    """The point and its violation, after solves for what is left, each of which repairs the rounding of the last."""
    error = best.violation()
    for _ in range(CORRECTIONS):
        if error <= EXACT:
            break
        dx, dw = system.solve(-best.left, -best.off)
        terms = Terms(best.of, best.x + dx, best.w + dw)
        if not terms.violation() < error:
            break
        best, error = terms, terms.violation()
    return best, error


def _next(program: SingleProgram, beyond: Array, held: Mask, wrong: Mask) -> Mask:
    """The borders of the next round: without those that pull, with the worst of those that are crossed."""
    stay, crossed = held & ~wrong, wrong & ~held
    room = max((program.n - program.e - int(np.count_nonzero(stay))) // 2, 1)
    if np.count_nonzero(crossed) > room:
        worst = np.argsort(np.where(crossed, -beyond, math.inf), kind="stable")[:room]
        crossed = np.zeros_like(crossed)
        crossed[worst] = True
    return stay | crossed


def exact_guess(program: SingleProgram, answer: QuadraticSolution, found_by: str) -> SingleProof | None:
    """The proved solution of a strictly convex program, at the answer or with its active set."""
    if not 0 < program.curved < math.inf:
        return None
    x, e = answer.x.reshape(-1).numpy(), program.e
    w = np.concatenate([t.reshape(-1).numpy() for t in (answer.equality, answer.inequality)])
    with np.errstate(all="ignore"):
        rows, start = SchurRows(program), Terms(program, x, w)
        if not rows.definite:
            return None
        held = start.force / start.scale > start.away[e:] / -start.length
        terms = Terms(program, x, np.concatenate([w[:e], np.where(held, w[e:], 0.0)]))
        system, error = rows.hold(held), terms.violation()
        if not error <= EXACT:
            if system is None:
                return None
            terms, error = _made_exact(Terms(program, *system.solve(-program.p, program.sides)), system)
        if terms.wrong(held).any() or not error <= TIGHT:
            return None
    return SingleProof(terms, held, error, 1, system, found_by)


class _KktSet:
    """What :class:`SchurSet` does, by the factors of the whole matrix."""

    def __init__(self, program: SingleProgram, held: Mask) -> None:
        self.of, self.kkt = program, factorised(program.data, program.lane(held))
        self.keep = np.concatenate([np.arange(program.e), program.e + held.nonzero()[0]])

    def solve(self, f: Array, g: Array) -> tuple[Array, Array]:
        rhs, n = np.zeros(len(f) + len(g)), len(f)
        rhs[:n], rhs[n + self.keep] = f, g[self.keep]
        u: Array = self.kkt.solve(self.of.lane(rhs)[..., None]).reshape(-1).numpy()
        return u[:n], u[n:]

    def factors(self, lanes: torch.Size) -> Factors:
        return self.kkt


def exact_near(
    program: SingleProgram, answer: QuadraticSolution | Mask, system_of: Callable[[Any, Mask], System] | None = None
) -> SingleProof | None:
    """The proved solution next to the answer, or to the minimum with these inequalities as equations.

    ``system_of(program, held)`` factorises, by default a dense matrix.
    """
    e, steps = program.e, 0
    with np.errstate(all="ignore"):
        if isinstance(answer, QuadraticSolution):
            x, steps = answer.x.reshape(-1).numpy(), int(answer.steps.max())
            w = np.concatenate([t.reshape(-1).numpy() for t in (answer.equality, answer.inequality)])
            start = Terms(program, x, w)
            held = start.force / start.scale > start.away[e:] / -start.length
        else:
            x, w, held = np.zeros(program.n), np.zeros(len(program.sides)), answer
        for _ in range(_ROUNDS):
            system = (system_of or _KktSet)(program, held)
            terms = Terms(program, x, np.concatenate([w[:e], w[e:] * held]))
            for _ in range(CORRECTIONS):
                dx, dw = system.solve(-terms.left, -terms.off)
                terms = Terms(program, terms.x + dx, terms.w + dw)
            wrong = terms.wrong(held)
            if not wrong.any():
                error, by = terms.violation(), "interior point" if steps else "active set"
                proof = SingleProof(terms, held, error, steps, system, by)
                return proof if error <= TIGHT and not terms.at_rest() else None
            held = held ^ wrong
    return None
