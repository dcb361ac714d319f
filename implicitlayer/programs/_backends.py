"""Other people's solvers of quadratic programs, as the search for the active set of ``il.qp``."""

# NOTE [search]: what such a solver returns is a guess. Where the conditions of optimality of the program itself hold
# there, or at the point that its active set belongs to, to rounding, the solution is proved; every other lane is solved
# by the library itself, which also finds out what is wrong with it. So a solver that fails, or is not accurate, costs
# time and nothing else, and kinks, curvature and programs without a solution are told as ever.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from implicitlayer._errors import extra
from implicitlayer.programs._interior_point import ProgramStatus, QuadraticSolution
from implicitlayer.programs._interior_point_step import flat_lanes
from implicitlayer.programs._qp_cold import cold_lanes

Vector = npt.NDArray[np.float64]
# x, y, z of one program, or None where it was not solved
Answer = tuple[Any, Any, Any] | None

_FAR = 1e20  # what these solvers take for no side
_SMALL, _MANY = 64, 2  # unknowns up to which, and programs from which on, DAQP is faster than the library's own search


class Search:
    """Base class: a solver of programs that ``il.qp`` takes its guess of the active set from; see NOTE [search].

    A subclass has ``one``. Called with Q, p, A, b, G, h (leading dimensions are lanes), it returns a
    :class:`QuadraticSolution` whose ``codes`` say which lanes were solved.
    """

    batched: ClassVar[bool] = True
    package: ClassVar[str] = ""
    extra: ClassVar[str] = "qp"

    @property
    def name(self) -> str:
        """What records call it."""
        return type(self).__name__

    def module(self) -> Any:
        """The package, or an error that names the extra."""
        with extra(self.extra, f"il.solvers.{type(self).__name__} needs {self.package}"):
            return import_module(self.package)

    def one(self, Q: Vector, p: Vector, A: Vector, b: Vector, G: Vector, h: Vector) -> Answer:
        """The answer of one program, with y of either sign and z >= 0."""
        raise NotImplementedError

    def all(self, arrays: list[Vector]) -> list[Answer]:
        """The answers of all lanes [B]."""
        return [self.one(*(array[i] for array in arrays)) for i in range(len(arrays[1]))]

    def __call__(
        self, Q: torch.Tensor, p: torch.Tensor, A: torch.Tensor, b: torch.Tensor, G: torch.Tensor, h: torch.Tensor
    ) -> QuadraticSolution:
        lanes = p.shape[:-1]
        arrays = [t.detach().cpu().numpy() for t in flat_lanes((Q, p, A, b, G, h))]
        sizes = p.shape[-1], b.shape[-1], h.shape[-1]
        found = [np.zeros((lanes.numel(), size)) for size in sizes]
        codes = np.full(lanes.numel(), int(ProgramStatus.MAX_STEPS_REACHED))
        # what is not finite is not for compiled code that may trust it
        rows = [array.reshape(len(array), -1) for array in arrays]
        finite = np.logical_and.reduce([np.isfinite(array).all(1) for array in rows])
        if not finite.all():
            arrays = [array[finite] for array in arrays]
        answers = self.all(arrays) if finite.any() else []
        lanes_of = [lane for lane, answer in zip(finite.nonzero()[0], answers, strict=True) if answer is not None]
        if lanes_of:
            for into, parts in zip(found, zip(*(a for a in answers if a is not None), strict=True), strict=True):
                into[lanes_of] = np.stack(parts)
            good = np.logical_and.reduce([np.isfinite(part).all(1) for part in found])
            found = [np.where(good[:, None], part, 0.0) for part in found]
            solved = np.zeros_like(good)
            solved[lanes_of] = True
            codes[solved & good] = int(ProgramStatus.SOLVED)
        x, y, z = (torch.from_numpy(part.reshape(*lanes, part.shape[1])).to(p.device) for part in found)
        ends = torch.from_numpy(codes).reshape(lanes).to(p.device)
        error = torch.where(ends == int(ProgramStatus.SOLVED), 0.0, math.inf).to(p.dtype)
        return QuadraticSolution(x, y, z, ends, torch.zeros_like(ends), error)


@dataclass(frozen=True)
class ActiveSet(Search):
    """The library's own search: what ``il.qp`` takes where no solver is named.

    Args:
        start: inequalities to begin with, bool [*lanes, m]; ``il.qp(init=)`` knows them. None: a cold start.

    Example:
        >>> import torch, implicitlayer as il
        >>> eye, ones = torch.eye(2).double(), torch.ones(2).double()
        >>> il.qp(eye, -ones, ub=0.5 * ones, solver=il.solvers.ActiveSet()).tolist()
        [0.5, 0.5]
    """

    start: torch.Tensor | None = field(default=None, repr=False, compare=False)

    def all(self, arrays: list[Vector]) -> list[Answer]:
        """None for all lanes: nothing was found."""
        return [None] * len(arrays[1])

    def __call__(
        self, Q: torch.Tensor, p: torch.Tensor, A: torch.Tensor, b: torch.Tensor, G: torch.Tensor, h: torch.Tensor
    ) -> QuadraticSolution:
        found = cold_lanes((Q, p, A, b, G, h), torch.float64, self.start)
        if found is None:
            return super().__call__(Q, p, A, b, G, h)
        codes = torch.where(found.proved, int(ProgramStatus.SOLVED), int(ProgramStatus.MAX_STEPS_REACHED))
        return replace(found.exact().solution, codes=codes)


@dataclass(frozen=True)
class DAQP(Search):
    """DAQP, a dual active-set method in C: the fastest for many programs of up to about 64 unknowns.

    Args:
        settings: of ``daqp.solve``.

    Raises:
        ImportError: when used, if daqp is missing; ``pip install 'implicitlayer[qp]'``.

    Source: D. Arnstrom, A. Bemporad and D. Axehill, IEEE Transactions on Automatic Control 67 (2022).
    """

    settings: dict[str, Any] = field(default_factory=dict)

    package: ClassVar[str] = "daqp"

    def all(self, arrays: list[Vector]) -> list[Answer]:
        solve, (Q, p, A, b, G, h) = self.module().solve, arrays
        e, m = b.shape[-1], h.shape[-1]
        rows, above = np.concatenate([A, G], 1), np.concatenate([b, h], 1)
        below = np.concatenate([b, np.full_like(h, -1e30)], 1)
        sense = np.array([5] * e + [0] * m, dtype=np.int32)
        answers: list[Answer] = []
        for i in range(len(p)):
            x, _, flag, info = solve(Q[i], p[i], rows[i], above[i], below[i], sense, **self.settings)
            answers.append((x, info["lam"][:e], info["lam"][e:]) if flag == 1 else None)
        return answers


@dataclass(frozen=True)
class ProxQP(Search):
    """ProxQP of proxsuite, a proximal augmented Lagrangian method in C++, one program at a time.

    Args:
        settings: of ``proxsuite.proxqp.dense.solve``; by default ``eps_abs = 1e-9``.

    Raises:
        ImportError: when used, if proxsuite is missing; ``pip install 'implicitlayer[qp]'``.

    Source: A. Bambade et al., IEEE Transactions on Robotics 41 (2025).
    """

    settings: dict[str, Any] = field(default_factory=lambda: {"eps_abs": 1e-9})

    package: ClassVar[str] = "proxsuite"

    def one(self, Q: Vector, p: Vector, A: Vector, b: Vector, G: Vector, h: Vector) -> Answer:
        found = self.module().proxqp.dense.solve(Q, p, A, b, G, np.full_like(h, -_FAR), h, **self.settings)
        solved = found.info.status.name == "PROXQP_SOLVED"
        return (found.x, found.y, found.z) if solved else None


@dataclass(frozen=True)
class Moreau(Search):
    """Moreau's dual active-set method in Rust, all lanes in one call, on the CPU.

    Args:
        settings: of ``moreau.Settings``; by default the active-set method.

    Raises:
        ImportError: when used, if moreau is missing; ``pip install 'implicitlayer[qp]'``.
    """

    settings: dict[str, Any] = field(default_factory=lambda: {"solver": "active_set"})
    _made: dict[tuple[int, ...], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    package: ClassVar[str] = "moreau"

    def all(self, arrays: list[Vector]) -> list[Answer]:
        moreau, (Q, p, A, b, G, h) = self.module(), arrays
        e = b.shape[-1]
        lanes, n, c = len(p), p.shape[-1], e + h.shape[-1]
        key = lanes, n, e, c
        if key not in self._made:  # a solver belongs to one shape; the latest is kept
            self._made.clear()
            columns = [np.tile(np.arange(n), k) for k in (n, c)]
            offsets = [n * np.arange(k + 1) for k in (n, c)]
            cones = moreau.Cones(num_zero_cones=e, num_nonneg_cones=c - e)
            how = moreau.Settings(**self.settings, device="cpu", batch_size=lanes)
            shape = offsets[0], columns[0], offsets[1], columns[1]
            self._made[key] = moreau.CompiledSolver(n, c, *shape, cones, how)
        solver = self._made[key]
        solver.setup(Q.reshape(lanes, -1), np.concatenate([A, G], 1).reshape(lanes, -1))
        found = solver.solve(p, np.concatenate([b, h], 1))
        x, w = np.asarray(found.x).reshape(lanes, n), np.asarray(found.z).reshape(lanes, c)
        solved = [status == moreau.SolverStatus.Solved for status in solver.info.status]
        return [(x[i], w[i, :e], w[i, e:]) if solved[i] else None for i in range(lanes)]


@dataclass(frozen=True)
class QPSolvers(Search):
    """Any solver of the package qpsolvers, one program at a time.

    Args:
        solver: its name there: ``"piqp"``, ``"quadprog"``, ``"clarabel"``, ...
        settings: keyword arguments of ``qpsolvers.solve_problem``.

    Raises:
        ImportError: when used, if qpsolvers is missing; ``pip install 'implicitlayer[qp]'``.
        ValueError: when used, if that solver is not installed.
    """

    solver: str
    settings: dict[str, Any] = field(default_factory=dict)

    package: ClassVar[str] = "qpsolvers"

    @property
    def name(self) -> str:
        """What records call it."""
        return f"QPSolvers({self.solver})"

    def one(self, Q: Vector, p: Vector, A: Vector, b: Vector, G: Vector, h: Vector) -> Answer:
        package = self.module()
        if self.solver not in package.available_solvers:
            raise ValueError(
                f"solver={self.solver!r} must be one of those that qpsolvers finds here, "
                f"{sorted(package.available_solvers)}. pip install {self.solver} may bring it."
            )
        equations, rows = ((A, b) if len(b) else (None, None)), ((G, h) if len(h) else (None, None))
        problem = package.Problem(Q, p, *rows, *equations)
        try:
            found = package.solve_problem(problem, solver=self.solver, **self.settings)
        except package.exceptions.QPError:  # what is wrong with the program is found out by the library
            return None
        if not found.found:
            return None
        none = np.zeros(0)
        return found.x, none if found.y is None else found.y, none if found.z is None else found.z


class OSQP(Search):
    """OSQP, an operator splitting method in C, one program at a time.

    Args:
        settings: of OSQP; by default ``eps_abs = eps_rel = 1e-9``, at most 100,000 steps and no output.

    Raises:
        ImportError: when used, if osqp is missing; ``pip install 'implicitlayer[solvers]'``.
    """

    package, extra = "osqp", "solvers"

    def __init__(self, **settings: Any) -> None:
        self.settings = {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 100_000, "verbose": False, **settings}

    def one(self, Q: Vector, p: Vector, A: Vector, b: Vector, G: Vector, h: Vector) -> Answer:
        module, sparse = self.module(), import_module("scipy.sparse")
        rows, sides = sparse.csc_matrix(np.concatenate([A, G])), (np.full_like(h, -np.inf), h)
        given, model = (sparse.csc_matrix(np.triu(Q)), p, rows, *(np.concatenate([b, s]) for s in sides)), module.OSQP()
        try:
            model.setup(*given, **self.settings)
        except module.OSQPException:  # not convex
            return None
        found = model.solve(raise_error=False)
        return (found.x, found.y[: len(b)], found.y[len(b) :]) if found.info.status == "solved" else None


def by_clarabel(clarabel: Any, program: Sequence[Vector], cones: list[Any], given: dict[str, Any]) -> Any:
    """Clarabel's answer to ``program``, Q, p, rows, sides: the least x'Qx/2 + p'x with sides - rows x in its cones."""
    sparse, settings, (Q, p, rows, sides) = import_module("scipy.sparse"), clarabel.DefaultSettings(), program
    for name, value in given.items():
        setattr(settings, name, value)
    matrices = sparse.csc_matrix(np.triu(Q)), p, sparse.csc_matrix(rows)
    return clarabel.DefaultSolver(*matrices, sides, cones, settings).solve()


class Clarabel(Search):
    """Clarabel, an interior-point method in Rust, one program at a time.

    Args:
        settings: attributes of ``clarabel.DefaultSettings``; by default no output.

    Raises:
        ImportError: when used, if clarabel is missing; ``pip install 'implicitlayer[solvers]'``.
    """

    package, extra = "clarabel", "solvers"

    def __init__(self, **settings: Any) -> None:
        self.settings = {"verbose": False, **settings}

    def one(self, Q: Vector, p: Vector, A: Vector, b: Vector, G: Vector, h: Vector) -> Answer:
        clarabel = self.module()
        cones = [cone(k) for cone, k in ((clarabel.ZeroConeT, len(b)), (clarabel.NonnegativeConeT, len(h))) if k]
        program = Q, p, np.concatenate([A, G]), np.concatenate([b, h])
        found = by_clarabel(clarabel, program, cones, self.settings)
        x, z = np.array(found.x), np.array(found.z)
        return (x, z[: len(b)], z[len(b) :]) if str(found.status) == "Solved" else None


def fastest(num_unknowns: int, num_programs: int) -> Search:
    """The fastest of what is installed for that many programs of that size (measured on one core)."""
    many = num_programs >= _MANY and num_unknowns <= _SMALL and find_spec("daqp") is not None
    return DAQP() if many else ActiveSet()
