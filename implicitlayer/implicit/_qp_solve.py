"""The forward solve of ``il.qp``: a solver's answer, made exact for its active set."""

from __future__ import annotations

import itertools
from collections.abc import Callable
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
from implicitlayer._interior_point import Data, ProgramStatus, QuadraticSolution, interior_point
from implicitlayer._solution import SolverResult
from implicitlayer._status import Status
from implicitlayer._tree import name_lanes
from implicitlayer._types import OnFailure
from implicitlayer.implicit._kkt_active import ActiveConstraints, Conditions, Tolerances
from implicitlayer.implicit._kkt_lagrangian import Unknowns
from implicitlayer.implicit._kkt_linear import KktFactors, KktMatrices
from implicitlayer.implicit._kkt_multipliers import multipliers

_CORRECTIONS = 2  # solves with the factors of the active set: the second repairs the rounding of the first
_ENOUGH = 1e-6  # an answer whose conditions hold to this is one


@dataclass(eq=False)
class QuadraticSolver:
    """A solver of quadratic programs as a batched solver of the layer's scalar."""

    solver: Callable[..., Any] | None
    tolerances: Tolerances
    hold_kinks: bool
    on_failure: OnFailure
    found: list[ActiveConstraints] = field(default_factory=list)
    prepared: list[KktFactors | KktMatrices] = field(default_factory=list)
    batched: bool = True

    def __call__(self, scalar: Callable[..., Any], start: Unknowns, *data: torch.Tensor) -> SolverResult:
        lanes = start.x.shape[:-1]
        ranks = (2, 1, 2, 1, 2, 1)
        full = [t.detach().double().expand(*lanes, *t.shape[-k:]) for t, k in zip(data, ranks, strict=True)]
        Q, p, A, b, G, h = full
        program: Data = ((Q + Q.mT) / 2, p, A, b, G, h)
        answer = self._answer(program)
        solution, factors, guess = self._exact(program, answer)
        active, held = self._conditions(program, solution.x, start.x.dtype).active_set(
            solution.equality, solution.inequality, self.tolerances.active_rtol, self.hold_kinks
        )
        self._refuse(solution, active)
        self.found.append(active)
        rows, mask = torch.cat([A, G], -2), torch.cat([torch.ones_like(b), held.double()], -1)
        same = bool((held == guess).all())
        self.prepared.append(factors if same else KktMatrices(program[0], rows, mask))
        rest = (active.equality, torch.where(held, active.inequality, 0.0), held)
        z = Unknowns(*(t.to(start.x.dtype) for t in (solution.x, *rest)))
        return SolverResult(z, Status.CONVERGED, int(solution.steps.max()) if solution.steps.numel() else 0)

    def _answer(self, program: Data) -> QuadraticSolution:
        lanes = program[1].shape[:-1]
        if self.solver is None:
            _refuse_indefinite(program[0])
            return interior_point(program)
        if getattr(self.solver, "batched", False):
            return self._read(self.solver(*program), program)
        flat = [t.reshape(lanes.numel(), *t.shape[len(lanes) :]) for t in program]
        answers = []
        for i in range(lanes.numel()):
            one: Data = tuple(t[i] for t in flat)  # type: ignore[assignment]
            answers.append(self._read(self.solver(*one), one))
        names = QuadraticSolution.__dataclass_fields__
        stacks = {name: torch.stack([getattr(answer, name) for answer in answers]) for name in names}
        return QuadraticSolution(**{name: t.reshape((*lanes, *t.shape[1:])) for name, t in stacks.items()})

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
            y, z = self._fitted(program, x)
        else:
            y, z = _as_tensor(given[0], b, "the multipliers of A x = b"), _as_tensor(given[1], h, "those of G x <= h")
        lanes = p.shape[:-1]
        codes = torch.full(lanes, int(ProgramStatus.SOLVED), device=p.device)
        return QuadraticSolution(x, y, z, codes, torch.zeros_like(codes), torch.zeros(lanes, dtype=p.dtype))

    def _fitted(self, program: Data, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        conditions = self._conditions(program, x, x.dtype)
        near = conditions.near(max(self.tolerances.active_rtol, 1e-5))
        lanes = x.shape[:-1]
        if not lanes:
            return multipliers(conditions.gradient, conditions.rows_h, conditions.rows_g, near)
        pairs = []
        for lane in itertools.product(*(range(size) for size in lanes)):
            parts = (conditions.gradient, conditions.rows_h, conditions.rows_g, near)
            pairs.append(multipliers(*(t[lane] for t in parts)))
        y, z = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return y.reshape(*lanes, -1), z.reshape(*lanes, -1)

    def _conditions(self, program: Data, x: torch.Tensor, dtype: torch.dtype) -> Conditions:
        Q, p, A, b, G, h = program
        Qx = _times(Q, x)
        eps = torch.finfo(dtype).eps
        return Conditions(x, x, Qx + p, Qx, _times(A, x) - b, A, _times(G, x) - h, G, eps)

    def _exact(self, program: Data, answer: QuadraticSolution) -> tuple[QuadraticSolution, KktFactors, torch.Tensor]:
        """The solution with the inequalities as equations whose force is larger than their distance; kept if nearer."""
        Q, p, A, b, G, h = program
        x, y, z = answer.x, answer.equality, answer.inequality
        before = self._conditions(program, x, x.dtype)
        norms = torch.linalg.vector_norm(G, dim=-1)
        scale = torch.where(before.scale > 0, before.scale, 1.0)
        guess = z * norms / scale[..., None] > before.border_distance() / before.size[..., None]
        held = guess.to(p.dtype)
        mask = torch.cat([torch.ones_like(b), held], -1)
        eps = torch.finfo(p.dtype).eps
        factors = KktFactors(KktMatrices(Q, torch.cat([A, G], -2), mask), eps)
        new_x, new_y, new_z = x, y, z * held
        for _ in range(_CORRECTIONS):
            slope = _times(Q, new_x) + p + _times(A.mT, new_y) + _times(G.mT, new_z)
            off = torch.cat([slope, _times(A, new_x) - b, held * (_times(G, new_x) - h)], -1)
            step = factors.solve(off[..., None])[..., 0]
            dx, dy, dz = step.split([p.shape[-1], b.shape[-1], h.shape[-1]], -1)
            new_x, new_y, new_z = new_x - dx, new_y - dy, new_z - dz
        moved = replace(answer, x=new_x, equality=new_y, inequality=new_z)
        better = self._error(program, moved) <= self._error(program, answer)
        parts = {
            name: torch.where(better[..., None], getattr(moved, name), getattr(answer, name))
            for name in ("x", "equality", "inequality")
        }
        found = replace(answer, **parts)
        return replace(found, error=self._error(program, found)), factors, guess

    def _error(self, program: Data, at: QuadraticSolution) -> torch.Tensor:
        """The largest violation of a condition of optimality, each relative to the size of its terms, [*lanes]."""
        *_, A, _, G, _ = program
        where = self._conditions(program, at.x, at.x.dtype)
        z = at.inequality.clamp(min=0)
        slope = where.gradient + _times(A.mT, at.equality) + _times(G.mT, z)
        scale = torch.where(where.scale > 0, where.scale, 1.0)
        force = z * torch.linalg.vector_norm(G, dim=-1) / scale[..., None]
        distance = where.border_distance() / where.size[..., None]
        norms = torch.linalg.vector_norm(A, dim=-1)
        equations = (where.h / torch.where(norms > 0, norms, 1.0)).abs() / where.size[..., None]
        slack = torch.minimum(force, distance.clamp(min=0))  # complementarity: one of the two is zero
        all_of_them = torch.cat(
            [(torch.linalg.vector_norm(slope, dim=-1) / scale)[..., None], equations, (-distance).clamp(min=0), slack],
            -1,
        )
        return all_of_them.amax(-1).nan_to_num(torch.inf)

    def _refuse(self, solution: QuadraticSolution, active: ActiveConstraints) -> None:
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
                raise error(f"the quadratic program is {what}{name_lanes(bad)}. {status.help}")
        bad = ~(solution.error <= _ENOUGH)
        if self.solver is None and self.on_failure != "ignore" and bool(bad.any()):
            worst = float(solution.error[bad].max())
            raise NotConvergedError(
                f"the quadratic program was not solved{name_lanes(bad)}: after {int(solution.steps.max())} "
                f"interior-point steps a condition of optimality is violated by {worst:.1e} of its terms (allowed "
                f"{_ENOUGH:.0e}). "
                f"{ProgramStatus.MAX_STEPS_REACHED.help}",
                solution,
            )


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (matrix @ vector[..., None])[..., 0]


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


def _refuse_indefinite(Q: torch.Tensor) -> None:
    """Raise if a Q has an eigenvalue below zero, by more than rounding."""
    finite = Q.isfinite().flatten(-2).all(-1)
    Q = torch.where(finite[..., None, None], Q, 0.0)
    n = Q.shape[-1]
    size = Q.abs().flatten(-2).amax(-1) if n else Q.new_zeros(Q.shape[:-2])
    noise = 1e3 * n * torch.finfo(Q.dtype).eps * size + torch.finfo(Q.dtype).tiny
    shift = torch.diag_embed(noise[..., None].expand(Q.shape[:-1]))
    _, info = torch.linalg.cholesky_ex(Q + shift)
    suspects = info > 0
    if bool(suspects.any()):
        lowest = torch.linalg.eigvalsh(Q).amin(-1)
        bad = suspects & (lowest < -noise)
        if bool(bad.any()):
            raise IndefiniteError(
                f"Q is not positive semidefinite{name_lanes(bad)}: its smallest eigenvalue is "
                f"{float(lowest[bad].min()):.3g}. il.qp solves convex programs; il.constrained_argmin differentiates "
                "the answer of any solver of a non-convex one."
            )
