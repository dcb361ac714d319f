"""The forward solve of ``il.qp``: a solver's answer, made exact for its active set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from implicitlayer._errors import (
    IndefiniteError,
    InfeasibleError,
    NonFiniteError,
    NotConvergedError,
    SolverOutputError,
    UnboundedError,
)
from implicitlayer.base._failures import refuse
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._tree import name_lanes
from implicitlayer.base._types import OnFailure
from implicitlayer.constrained._kkt_lagrangian import Unknowns
from implicitlayer.equation._solve import Varying
from implicitlayer.programs._backends import ActiveSet, Search
from implicitlayer.programs._interior_point import ProgramStatus, QuadraticSolution, interior_point
from implicitlayer.programs._interior_point_step import Data, flat_lanes, norm_of, of_each, times
from implicitlayer.programs._kkt_active import ActiveConstraints, Tolerances
from implicitlayer.programs._kkt_linear import Factors, KktFactors, KktMatrices, PartedFactors, multipliers_of_lanes
from implicitlayer.programs._qp_cold import LanesProof, cold_lanes, guessed_lanes
from implicitlayer.programs._qp_exact import (
    ENOUGH,
    TIGHT,
    Exact,
    at_rest,
    conditions,
    error_of_x,
    exact,
    terms_at_rest,
    undecided,
    violation,
)
from implicitlayer.programs._qp_rank import Equations, RankFactors, independent_equations
from implicitlayer.programs._qp_single import SingleProof, exact_cold, exact_guess, exact_near
from implicitlayer.programs._qp_terms import SingleProgram
from implicitlayer.programs._units import above_zero

Proof = SingleProof | LanesProof

_NEAR = 1e-2  # a user's answer whose conditions hold to this is corrected; a worse one is judged as it is
_LATE = 1e-9  # of the interior point
_EARLY = 1e-4  # the same of one program: proved that early, it saves a quarter of the steps
_TIGHTEST = 1e-14  # no more than rounding allows: the interior point goes on while it improves


def full_data(data: Sequence[torch.Tensor], lanes: torch.Size) -> Data:
    """The program of plain tensors, detached, in float64, Q symmetric, with the dimensions of all lanes."""
    Q, p, A, b, G, h = (t.detach().double() for t in data)
    if lanes:
        given = zip((Q, p, A, b, G, h), (2, 1, 2, 1, 2, 1), strict=True)
        Q, p, A, b, G, h = (t.expand(*lanes, *t.shape[t.ndim - k :]) for t, k in given)
    return (Q + Q.mT) / 2, p, A, b, G, h


def searched(program: Data, dtype: torch.dtype, search: Search) -> Proof | None:
    """What a search without an interior point finds, for data of this dtype; of one program nothing but a proof.

    The equations are independent.
    """
    own = isinstance(search, ActiveSet) or not program[3].shape[-1] + program[5].shape[-1]
    start = search.start if isinstance(search, ActiveSet) else None
    if not is_single(program):
        if not own:
            return guessed_lanes(program, dtype, search(*program), search.name)
        return cold_lanes(program, dtype, start)
    with np.errstate(all="ignore"):  # what overflows is not proved
        one = SingleProgram(program)
    if not one.finite:
        return None
    if not own:
        return exact_guess(one, search(*program), search.name)
    return exact_cold(one, None if start is None else start.reshape(-1).numpy())


# NOTE [unknowns that nobody asks for]: such as those that CVXPY adds may be some of many. Where a direction d of them
# alone has Q d = 0, A d = 0 and G_i d = 0 for the rows that pull, x + t d is a solution, too; and where G_i d < 0 for
# all rows at a kink, none of them is at its border there. So the unknowns that are asked for have no kink.


def _without_kinks_of(
    added: torch.Tensor, program: Data, active: ActiveConstraints, held: torch.Tensor
) -> ActiveConstraints:
    """The same without the kinks of NOTE [unknowns that nobody asks for]."""
    Q, _, A, _, G, _ = program
    kinks = active.kinks.double()
    rows = G / above_zero(norm_of(G)).unsqueeze(-1)
    asked_for = torch.diag((~added).double()).expand_as(Q)
    pulling = rows * (held & ~active.kinks).unsqueeze(-1)
    fixed = torch.cat([Q / above_zero(Q.abs().amax((-2, -1), keepdim=True)), asked_for, A, pulling], -2)
    kept = torch.eye(len(added), dtype=Q.dtype, device=Q.device) - torch.linalg.pinv(fixed, rtol=1e-10) @ fixed
    bent = rows * kinks.unsqueeze(-1)
    d = kept @ (torch.linalg.pinv(bent @ kept, rtol=1e-10) @ -kinks.unsqueeze(-1))
    free = (((bent @ d)[..., 0] < -0.5) | ~active.kinks).all(-1)
    kinks = active.kinks & ~free.unsqueeze(-1)
    return replace(active, kinks=kinks, num_kinks=kinks.sum(-1))


def _can_contradict(varying: Sequence[torch.Tensor], program: Data, held: torch.Tensor) -> torch.Tensor:
    """Whether what varies can make the rows that hold contradict one another, [*lanes].

    It cannot where no row that varies takes part in a dependence: a vector l with J'l = 0.
    """
    rows = torch.cat([program[2], program[4] * held.unsqueeze(-1)], -2)
    rows = rows / above_zero(norm_of(rows)).unsqueeze(-1)
    unit = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    dependent = unit - rows @ torch.linalg.pinv(rows, rtol=1e-10)
    changes = torch.cat([varying[k].any(-1) | varying[k + 1] for k in (2, 4)])
    holds = torch.cat([torch.ones_like(program[3], dtype=torch.bool), held], -1)
    found: torch.Tensor = ((dependent.abs().amax(-1) > 1e-6) & changes & holds).any(-1)
    return found


def is_single(program: Data) -> bool:
    return program[1].shape[:-1].numel() == 1 and program[1].device.type == "cpu"


def forces_beside(program: Data, at: QuadraticSolution) -> torch.Tensor:
    """How large the forces of the rows are beside Q x, [*lanes], at least 1."""
    lengths = norm_of(torch.cat([program[2], program[4]], -2))
    forces = norm_of(torch.cat([at.equality, at.inequality], -1) * lengths)
    terms = program[0].abs().flatten(-2).amax(-1) * norm_of(at.x)
    return torch.where(terms > 0, forces / terms, 1.0).nan_to_num(1.0, 1.0, 1.0).clamp(min=1.0)


@dataclass(eq=False)
class QuadraticSolver:
    """A solver of quadratic programs as a batched solver of the layer's scalar.

    ``solver`` is the user's, or None for the search of :func:`searched` and an interior point where that does not do.
    ``known`` is what the search has found for the program of the call, where that was made: ``has_searched``.
    """

    solver: Callable[..., Any] | None
    tolerances: Tolerances
    hold_kinks: bool
    on_failure: OnFailure
    search: Search = field(default_factory=ActiveSet)
    known: Proof | None = None
    has_searched: bool = False
    shift: torch.Tensor | None = None  # how far sides were moved, of the closest feasible program
    added: torch.Tensor | None = None  # bool [n], unknowns that nobody asks for
    varying: Varying = None  # of :class:`Settings`
    found: list[ActiveConstraints] = field(default_factory=list)
    prepared: list[Factors | KktMatrices] = field(default_factory=list)
    balance: list[torch.Tensor] = field(default_factory=list)  # see KktSolver
    equations: Equations | None = None  # in the place of those of the call, where these depend on each other
    batched: bool = True

    def __call__(self, scalar: Callable[..., Any], start: Unknowns, *data: torch.Tensor) -> SolverResult:
        given = full_data(data, start.x.shape[:-1])
        eps = torch.finfo(start.x.dtype).eps
        self.given, self.equations = given, independent_equations(given, eps)
        program = given if self.equations is None else self.equations.data
        has_searched = self.has_searched or self.solver is not None
        proof = self.known if has_searched else searched(program, start.x.dtype, self.search)
        found, active, held = self._single(program, proof, eps) or self._judged(program, proof, start.x)
        solution = found.solution
        if self.added is not None and bool(active.num_kinks.any()):
            active = _without_kinks_of(self.added, program, active, held)
        factors: Factors | KktMatrices | None = found.factors
        if factors is None or not torch.equal(held, found.held):
            rows = torch.cat([program[2], program[4]], -2)
            mask = torch.cat([torch.ones_like(program[3]), held.double()], -1)
            matrices = KktMatrices(program[0], rows, mask)
            factors = matrices if self.equations is None else KktFactors(matrices, eps)
        if self.equations is not None:
            assert not isinstance(factors, KktMatrices)
            factors = RankFactors(factors, self.equations, given[2])
            independent = active.independent & ~self.equations.deficient
            old = times(self.equations.to_new.mT, active.equality)
            active = replace(active, equality=old, independent=independent)
        if self.varying is not None and not bool(active.independent.all()):
            fixed = ~_can_contradict(self.varying, given, held)
            active = replace(active, independent=active.independent | fixed)
        self.found.append(replace(active, found_by=self._name(proof), shift=self.shift))
        self.prepared.append(factors)
        self.balance.append(forces_beside(program, solution))
        rest = (active.equality, torch.where(held, active.inequality, 0.0), held)
        z = Unknowns(*(t.to(start.x.dtype) for t in (solution.x, *rest)))
        return SolverResult(z, Status.CONVERGED, int(solution.steps.max()) if solution.steps.numel() else 0)

    def _name(self, proof: Proof | None) -> str:
        """What found the active set; of lanes that were not all proved, both."""
        if self.solver is not None:
            return type(self.solver).__name__
        if proof is None:
            return "interior point"
        some = isinstance(proof, LanesProof) and not bool(proof.proved.all())
        return f"{proof.found_by}, interior point" if some else proof.found_by

    def _single(
        self, program: Data, proof: Proof | None, eps: float
    ) -> tuple[Exact, ActiveConstraints, torch.Tensor] | None:
        """The short way, for one program on the CPU; None where it does not lead to a proof."""
        if self.solver is not None or not is_single(program):
            return None
        if proof is None:
            with np.errstate(all="ignore"):
                one = SingleProgram(program)
            if not one.finite:
                return None
            _refuse_indefinite(program[0], eps)
            start = self.search.start if isinstance(self.search, ActiveSet) else None
            proof = None if start is None else exact_near(one, start.reshape(-1).numpy())
            # the active set shows long before the last steps, and what is proved needs no further one
            proof = proof or exact_near(one, interior_point(program, _EARLY))
        if not isinstance(proof, SingleProof):
            return None
        with np.errstate(all="ignore"):
            return proof.exact(), *proof.terms.active_set(eps, self.tolerances.active_rtol, self.hold_kinks)

    def _judged(
        self, program: Data, proof: Proof | None, like: torch.Tensor
    ) -> tuple[Exact, ActiveConstraints, torch.Tensor]:
        """The solutions, what is known of their constraints, and the mask of what is to hold as an equation."""
        rtol = self.tolerances.active_rtol
        if isinstance(proof, LanesProof) and bool(proof.proved.all()):
            return proof.exact(), *proof.active_set(rtol, self.hold_kinks)
        found, doubtful = self._solved(program, proof, torch.finfo(like.dtype).eps)
        solution = found.solution
        proved = bool((solution.error <= TIGHT).all())  # then x is not wrong by anything, and nothing is undecided
        where = conditions(program, solution.x, like.dtype)
        without = ~torch.cat([solution.equality, solution.inequality], -1).any(-1)
        where = replace(where, at_rest=torch.where(without, terms_at_rest(program, solution.x), 0.0))
        active, held = where.active_set(
            solution.equality,
            solution.inequality,
            rtol,
            self.hold_kinks,
            wrong_by=None if proved else error_of_x(program, solution),
            undecided=None if proved else doubtful,
        )
        self._refuse(solution)
        return found, active, held

    def _solved(self, program: Data, proof: Proof | None, eps: float) -> tuple[Exact, torch.Tensor]:
        """The solution, and the mask of inequalities that stay undecided."""
        if self.solver is not None:
            answer = self._answer(self.given, self.solver)  # of the equations as they were given
            if self.equations is not None:
                answer = replace(answer, equality=times(self.equations.of_old, answer.equality))
            return self._exact(program, answer)
        _refuse_indefinite(program[0], eps)
        if not isinstance(proof, LanesProof):
            return self._exact(program, interior_point(program, _LATE))
        return self._with_proved(program, proof)

    def _with_proved(self, program: Data, proof: LanesProof) -> tuple[Exact, torch.Tensor]:
        """Those of the lanes that are proved, and of the others as if they were alone."""
        rest, found = ~proof.proved, proof.exact()
        some = of_each(lambda t: t[rest], program)
        answer = found.solution.lanes(rest)
        far = ~(answer.error <= ENOUGH)
        if bool(far.any()):
            answer = answer.filled(far, interior_point(of_each(lambda t: t[far], some), _LATE))
        other, doubtful = self._exact(some, answer)
        all_doubtful = torch.zeros_like(found.held)
        all_doubtful[rest] = doubtful
        solution, held = found.solution.filled(rest, other.solution), found.held.clone()
        held[rest] = other.held
        factors = None if other.factors is None else PartedFactors(rest, proof.factors, other.factors)
        return Exact(solution, solution.error, held, factors), all_doubtful

    def _answer(self, program: Data, solver: Callable[..., Any]) -> QuadraticSolution:
        lanes = program[1].shape[:-1]
        if getattr(solver, "batched", False):
            return self._read(solver(*program), program)
        programs = zip(*flat_lanes(program), strict=True)
        answers = [self._read(solver(*one), one) for one in programs]
        names = QuadraticSolution.__dataclass_fields__
        found = QuadraticSolution(*(torch.stack([getattr(a, name) for a in answers]) for name in names))
        return found.reshaped(1, lanes)

    def _read(self, answer: Any, program: Data) -> QuadraticSolution:
        """What a solver returned, with multipliers fitted where it gave none."""
        _, p, _, b, _, h = program
        if isinstance(answer, QuadraticSolution):
            return answer
        given = None
        if isinstance(answer, tuple):
            if len(answer) != 2 or not isinstance(answer[1], tuple | list) or len(answer[1]) != 2:
                raise SolverOutputError(
                    "the solver of a quadratic program must return x or (x, (y, z)) with multipliers."
                )
            answer, given = answer
        x = _as_tensor(answer, p, "x")
        if given is None:
            at = conditions(program, x, x.dtype)
            near, known = at.near(max(self.tolerances.active_rtol, 1e-5)), [(None, None)] * x.shape[:-1].numel()
            y, z = multipliers_of_lanes(at.gradient, at.rows_h, at.rows_g, near, known)
        else:
            y, z = _as_tensor(given[0], b, "the multipliers of A x = b"), _as_tensor(given[1], h, "those of G x <= h")
        lanes = p.shape[:-1]
        codes = torch.full(lanes, int(ProgramStatus.SOLVED), device=p.device)
        return QuadraticSolution(x, y, z, codes, torch.zeros_like(codes), torch.zeros(lanes, dtype=p.dtype))

    def _exact(self, program: Data, answer: QuadraticSolution) -> tuple[Exact, torch.Tensor]:
        """The solution next to the answer, and the mask of inequalities that stay undecided."""
        # The library's own answer is a place to start from; a user's is corrected, but not replaced by another one.
        near = torch.ones_like(answer.error, dtype=torch.bool)
        if self.solver is not None:
            near = violation(program, answer) <= _NEAR
        found = at_rest(program, exact(program, answer, near), math.inf if self.solver is None else ENOUGH)
        rough = near & ~(found.error <= TIGHT)
        if self.solver is None:
            rough = rough & (answer.codes != int(ProgramStatus.NONFINITE))
            if bool(rough.any()):
                found = self._again(program, found, rough)
            # what satisfies the conditions is a solution, whatever the interior point made of the program
            codes = torch.where(found.error <= TIGHT, int(ProgramStatus.SOLVED), answer.codes)
            found = replace(found, solution=replace(found.solution, codes=codes))
        doubtful = near & ~(found.error <= TIGHT)
        solution = replace(found.solution, error=found.error)
        either = undecided(program, answer) | undecided(program, solution)
        return replace(found, solution=solution), either & doubtful[..., None]

    def _again(self, program: Data, found: Exact, rough: torch.Tensor) -> Exact:
        """Lanes whose active set was not found, from a point that is as near to the solution as rounding allows."""
        some = of_each(lambda t: t[rough], program)
        answer = interior_point(some, _TIGHTEST)
        other = exact(some, answer, torch.ones_like(answer.error, dtype=torch.bool))
        better = other.error < found.error[rough]
        lanes, error = torch.zeros_like(rough).masked_scatter(rough, better), found.error.clone()
        error[lanes] = other.error[better]
        solution = found.solution.filled(lanes, other.solution.lanes(better))
        return replace(found, solution=replace(solution, steps=found.solution.steps), error=error)

    def _refuse(self, solution: QuadraticSolution) -> None:
        """A program without a solution is an error, named by its lanes."""
        codes = solution.codes
        errors: dict[ProgramStatus, type[Exception]] = {
            ProgramStatus.NONFINITE: NonFiniteError,
            ProgramStatus.INFEASIBLE: InfeasibleError,
            ProgramStatus.UNBOUNDED: UnboundedError,
        }
        for status, error in errors.items():
            bad = codes == int(status)
            if bool(bad.any()):
                what = status.name.lower() if status is not ProgramStatus.NONFINITE else "not finite"
                refuse(bad, error(f"the quadratic program is {what}{name_lanes(bad)}. {status.help}"))
        bad = ~(solution.error <= ENOUGH)
        if self.solver is None and self.on_failure != "ignore" and bool(bad.any()):
            worst = float(solution.error[bad].max())
            failure = NotConvergedError(
                f"the quadratic program was not solved{name_lanes(bad)}: after {int(solution.steps.max())} "
                f"interior-point steps a condition of optimality is violated by {worst:.1e} of its terms (allowed "
                f"{ENOUGH:.0e}). "
                f"{ProgramStatus.MAX_STEPS_REACHED.help}",
                solution,
            )
            refuse(bad, failure)


def _as_tensor(value: Any, like: torch.Tensor, name: str) -> torch.Tensor:
    tensor = torch.as_tensor(np.asarray(value) if not isinstance(value, torch.Tensor) else value)
    if tensor.shape != like.shape:
        raise SolverOutputError(
            f"the solver returned {name} with shape {tuple(tensor.shape)}, expected {tuple(like.shape)}."
        )
    if not bool(tensor.isfinite().all()):
        raise NonFiniteError(
            f"the solver returned NaN or Inf in {name}: it diverged or failed, or there is no solution."
        )
    return tensor.detach().to(like)


def _refuse_indefinite(Q: torch.Tensor, eps: float) -> None:
    """Raise if a Q whose entries have this relative error has an eigenvalue below zero, by more than rounding."""
    finite = Q.isfinite().flatten(-2).all(-1)
    Q = torch.where(finite[..., None, None], Q, 0.0)
    n = Q.shape[-1]
    size = Q.abs().flatten(-2).amax(-1) if n else Q.new_zeros(Q.shape[:-2])
    noise = max(10 * eps, 1e3 * torch.finfo(Q.dtype).eps) * n * size + torch.finfo(Q.dtype).tiny
    shift = torch.diag_embed(noise[..., None].expand(Q.shape[:-1]))
    _, info = torch.linalg.cholesky_ex(Q + shift)
    suspects = info > 0
    if bool(suspects.any()):
        lowest = torch.linalg.eigvalsh(Q).amin(-1)
        bad = suspects & (lowest < -noise)
        if bool(bad.any()):
            error = IndefiniteError(
                f"Q is not positive semidefinite{name_lanes(bad)}: its smallest eigenvalue is "
                f"{float(lowest[bad].min()):.3g}. il.qp solves convex programs; il.constrained_argmin differentiates "
                "the answer of any solver of a non-convex one."
            )
            refuse(bad, error)
