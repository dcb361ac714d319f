"""``il.qp``: convex quadratic programs as a layer, many at a time, differentiable in all their data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch

from implicitlayer import _torch
from implicitlayer.base._failures import marking
from implicitlayer.base._sharding import on_whole_tensors
from implicitlayer.base._surroundings import outside_compiled_code
from implicitlayer.base._tree import TreeSpec, flatten
from implicitlayer.base._types import FlatFunction, Leaves, OnFailure, check_one_of
from implicitlayer.constrained._kkt import AtKink, KktLayer
from implicitlayer.constrained._kkt_lagrangian import Unknowns
from implicitlayer.constrained._qp_arguments import (
    RANKS,
    Entries,
    Fold,
    arguments,
    is_sparse,
    made_dense,
    on_all_levels,
)
from implicitlayer.constrained._qp_closest import UNSOLVED, Program, Solution, closest
from implicitlayer.constrained._qp_function import ProvedProgram, Pull, by_data, in_plain_surroundings
from implicitlayer.constrained._qp_solve import Proof, QuadraticSolver, forces_beside, full_data, is_single, searched
from implicitlayer.equation._capture import ClosedOver, derivatives_possible
from implicitlayer.equation._flat import Signature
from implicitlayer.equation._jacobian import Graph
from implicitlayer.equation._residual import Attached, Residual
from implicitlayer.equation._rules import implicit_vjp
from implicitlayer.equation._solve import Settings, Varying, fill
from implicitlayer.layer._forward import Constraints
from implicitlayer.programs._backends import ActiveSet, Search, fastest
from implicitlayer.programs._interior_point_step import Data, times
from implicitlayer.programs._kkt_active import Tolerances
from implicitlayer.programs._kkt_linear import KktSolver
from implicitlayer.programs._qp_rank import independent_equations
from implicitlayer.programs._sparse_program import SparseProgram, sparse_proof
from implicitlayer.programs._units import unit_of_unknowns

_STATIONARITY_RTOL = 1e-6


@outside_compiled_code
@on_whole_tensors
def qp(
    Q: torch.Tensor,
    p: torch.Tensor,
    A: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    G: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    *,
    lower: torch.Tensor | None = None,
    lb: torch.Tensor | None = None,
    ub: torch.Tensor | None = None,
    init: Any = None,
    solver: Callable[..., Any] | Literal["auto"] | None = None,
    linear_solver: Callable[..., Any] | None = None,
    return_multipliers: bool = False,
    on_failure: OnFailure = "warn",
    active_rtol: float = 1e-8,
    at_kink: AtKink = "inactive",
    infeasible: Literal["error", "closest"] = "error",
) -> Any:
    """The x that minimises ``1/2 x'Qx + p'x`` under ``A x = b``, ``lower <= G x <= h`` and ``lb <= x <= ub``.

    Differentiable in all of these.

    Solved exactly: a few linear solves with inequalities as equations look for the active set for which all conditions
    of optimality hold to rounding (the derivatives use the factors again), from a cold start for a single program on
    the CPU, and next to the answer of an interior-point method where that is not enough and for many. An inequality for
    which the set is not decided counts as a kink. Derivatives are those of the conditions of optimality
    with that active set, to every order and in both modes; where an inequality is at its border with a zero multiplier
    the solution has a kink, and they are those of one side. What is known of the solve is in :func:`diagnostics`
    (``record.active_set``).

    Args:
        Q: [*batch, n, n], symmetric positive semidefinite (its symmetric part is used); p: [*batch, n].
        A: [*batch, e, n], b: [*batch, e]; both or neither.
        G: [*batch, m, n], h: [*batch, m]; both or neither, or ``lower`` in the place of h. Q, A and G of one program
            may be sparse (COO, CSR; needs SciPy): their gradients are those of the stored entries, in the same layout.
        lower: [*batch, m], of G x. lb, ub: [*batch, n], of x. A side of 1e20 or more, or inf, is none (of lower and lb
            with a minus), lane by lane: it gets no gradient and a multiplier of zero. Rows whose sides are equal in
            all programs are equations, outside of transforms.
            Leading dimensions are broadcast: an argument without them is shared by all programs, and its gradient is
            the sum over them.
        init: what a call with ``return_multipliers=True`` has returned for a program like this one: the constraints
            that were active there are tried first, which saves time. Under transforms it is not used.
        solver: what looks for the active set: :class:`il.solvers.ActiveSet` (the default), ``DAQP``, ``ProxQP``,
            ``Moreau``, ``QPSolvers``, or ``"auto"`` for the fastest that is installed. What they find is proved, or
            else an interior point solves the program, so all of them give the same answers;
            ``record.active_set.found_by`` says who did.
            Or a function: ``solver(Q, p, A, b, G, h) -> x`` or ``(x, (y, z))`` with multipliers y of the equations and
            z >= 0 of the inequalities; called program by program, or once with all of them if it declares ``batched =
            True``. An answer whose conditions of optimality hold to 1e-2 of their terms is made exact, a worse one is
            judged as it is.
        linear_solver: of the derivatives; default a dense symmetric indefinite solve.
        return_multipliers: return ``(x, Multipliers(equality, inequality))``, all differentiable. Those of G x are
            positive at h and negative at ``lower``; with lb or ub, inequality is the pair of those of G x and of x.
        on_failure: ``"warn"``, ``"raise"``, ``"ignore"`` or ``"mask"``, as in :func:`constrained_argmin`. A
            program that is found to have no solution is an error under every policy but ``"mask"``, which makes it NaN.
        active_rtol: distance from a border, relative to the size of x, and force of a border, relative to the terms of
            the gradient, that count as zero.
        at_kink: what an inequality at a kink counts as for derivatives: ``"inactive"`` or ``"active"``.
        infeasible: what becomes of a program whose constraints contradict each other: ``"error"``, or ``"closest"``,
            the solution (and its derivatives) where all sides have moved by the shift of least Euclidean norm that
            makes them hold, ``active_set.shift`` of the last record. Rows are as they are given, so their units matter.
            Multipliers of moved rows are not unique: those of least norm, of either sign. Programs of a batch in
            which one is infeasible are solved one by one. Not under transforms, nor with ``"mask"``.

    Returns:
        x [*batch, n].

    Raises:
        InfeasibleError, UnboundedError: no x satisfies the constraints (to 1e-6 of the size of x: contradictions below
            that are not noticed); the objective has no smallest value.
        IndefiniteError: Q is not positive semidefinite. NotConvergedError: no answer to 1e-6.
        NonFiniteError: NaN or Inf in the data. All of these name the lanes.

    Source: B. Amos and J. Z. Kolter, OptNet, ICML 2017 (arXiv:1703.00443). Difference from qpth: the active set is
    taken to be exact in place of the interior point's last scaling, shared arguments sum their gradients, programs
    without a solution are errors, kinks are told, all orders of derivative.

    Example:
        >>> import torch, implicitlayer as il
        >>> point = torch.tensor([0.9, 0.7, -2.0], dtype=torch.float64, requires_grad=True)
        >>> eye, ones = torch.eye(3).double(), torch.ones(1, 3).double()
        >>> x = il.qp(eye, -point, ones, ones[:, 0], -eye, torch.zeros(3).double())  # projection onto the simplex
        >>> [round(v, 12) + 0.0 for v in x.tolist()]
        [0.6, 0.4, 0.0]
        >>> x[0].backward()  # the mean of the support is taken off
        >>> [round(v, 12) + 0.0 for v in point.grad.tolist()]
        [0.5, -0.5, 0.0]
    """
    given = {"Q": Q, "p": p, "A": A, "b": b, "G": G, "h": h, "lower": lower, "lb": lb, "ub": ub}
    settings = settings_of(solver, linear_solver, on_failure, active_rtol, at_kink)
    x, multipliers = program_solution(given, settings, init, infeasible)
    return (x, multipliers()) if return_multipliers else x


def settings_of(
    solver: Any = None,
    linear_solver: Any = None,
    on_failure: OnFailure = "warn",
    active_rtol: float = 1e-8,
    at_kink: AtKink = "inactive",
    varying: Varying = None,
    added: torch.Tensor | None = None,
) -> _Settings:
    """Those of :func:`qp`; ``varying``: of :class:`Settings`, ``added``: of :class:`QuadraticSolver`."""
    check_one_of("at_kink", at_kink, get_args(AtKink))
    check_one_of("on_failure", on_failure, get_args(OnFailure))
    if isinstance(solver, str) and solver != "auto":
        raise ValueError(f"solver={solver!r} must be 'auto', one of il.solvers, such as DAQP(), or a function.")
    auto, tolerances = isinstance(solver, str), Tolerances(_STATIONARITY_RTOL, active_rtol)
    return _Settings(None if auto else solver, linear_solver, on_failure, tolerances, at_kink, varying, added, auto)


def program_solution(
    given: dict[str, Any], settings: _Settings, init: Any = None, infeasible: str = "error"
) -> tuple[torch.Tensor, Callable[[], Any]]:
    """x, and what makes the multipliers, of the program that is given by name."""
    check_one_of("infeasible", infeasible, ("error", "closest"))
    moves = infeasible == "closest"
    if moves and (settings.on_failure == "mask" or _torch.transforms_active()):
        why = "under a transform, where no value can be seen. Leave it out, or call il.qp on a batch of programs."
        if settings.on_failure == "mask":
            why = "beside on_failure='mask', which makes NaN of what has no solution. Leave one of the two out."
        raise ValueError(f"infeasible='closest' is not {why}")
    found = None
    if any(is_sparse(value) for value in given.values()):
        found = _sparse_solution(given, settings, init)
        given = given if found is not None else made_dense(given)
    if found is None:
        batch, data, fold = arguments(given)
        if settings.auto:
            settings = replace(settings, solver=fastest(data[1].shape[-1], batch.numel()))
        settings = settings.starting(init, fold, batch, data[5].shape[-1])
        found = _in_units(data, batch, settings, _closest if moves else _solution), fold
    (x, y, z), fold = found
    return x, partial(fold, y, z)


@dataclass(frozen=True)
class _Settings:
    """How a program is solved and judged."""

    solver: Callable[..., Any] | None
    linear_solver: Callable[..., Any] | None
    on_failure: OnFailure
    tolerances: Tolerances
    at_kink: AtKink
    varying: Varying = None
    added: torch.Tensor | None = None
    auto: bool = False
    shift: torch.Tensor | None = None

    @property
    def search(self) -> Search | None:
        """The search for the active set; None where a function of the user's solves the program."""
        if self.solver is None:
            return ActiveSet()
        return self.solver if isinstance(self.solver, Search) else None

    def starting(self, init: Any, fold: Fold, batch: torch.Size, count: int) -> _Settings:
        """The same with the search beginning at the active set of ``init``, where that can be looked at."""
        if init is None:
            return self
        if not isinstance(self.search, ActiveSet):
            raise ValueError(
                "init is where the library's own search begins. Leave out solver, or give the solver its own."
            )
        if _torch.transforms_active():
            return self
        return replace(self, solver=ActiveSet(fold.start(init, batch, count)))

    def layer(self, data: Leaves, proof: Proof | None, has_searched: bool) -> _QuadraticLayer:
        """The general layer, for one call, with what :func:`searched` has found where that was made."""
        hold, user = self.at_kink == "active", None if self.search is not None else self.solver
        search = self.search or ActiveSet()
        how = user, self.tolerances, hold, self.on_failure, search, proof, has_searched, self.shift
        solve = QuadraticSolver(*how, added=self.added, varying=self.varying)
        n, e, m = (data[k].shape[-1] for k in (1, 3, 5))
        own = KktSolver(n, e, m, prepared=solve.prepared, balance=solve.balance)
        linear = own if self.linear_solver is None else self.linear_solver
        lanes = data[1].ndim - 1
        layer = _QuadraticLayer(_scalar, solve, linear, "argmin", False, False, self.on_failure, None, 0, lanes)
        layer.found, layer.tolerances, layer.varying = solve.found, self.tolerances, self.varying
        return layer


def _in_units(data: Program, batch: torch.Size, settings: _Settings, solve: Callable[..., Solution]) -> Solution:
    """x and the multipliers by ``solve``, of the program of unknowns in other units where theirs are far apart."""
    Q, p, A, b, G, h = data
    # a function of the user's is given what the user has given
    unit = None if settings.search is None else unit_of_unknowns(Q, A, G, not _torch.transforms_active())
    if unit is None:
        return solve(data, batch, settings)
    columns = unit.unsqueeze(-2)
    x, y, z = solve((unit.unsqueeze(-1) * Q * columns, unit * p, A * columns, b, G * columns, h), batch, settings)
    return unit * x, y, z


def _solution(data: Program, batch: torch.Size, settings: _Settings) -> Solution:
    """x and the multipliers; by the plain path where that leads to a proof and there is nothing to tell."""
    p, proof, search, has_searched = data[1], None, settings.search, False
    if search is not None and settings.linear_solver is None and in_plain_surroundings(data):
        program, eps = full_data(data, batch), torch.finfo(p.dtype).eps
        # where our own search settles one program, it has seen that its equations are independent
        late = isinstance(search, ActiveSet) and is_single(program)
        has_searched = late or _independent(program, eps, settings.on_failure)
        proof = searched(program, p.dtype, search) if has_searched else None
        if proof is not None and proof.settled(eps, settings.tolerances.active_rtol, _STATIONARITY_RTOL):
            rules = partial(_general_gradients, settings, proof), by_data
            plain: Solution = ProvedProgram.apply(proof, rules, *data)
            return plain
        has_searched = has_searched and (not late or _independent(program, eps, settings.on_failure))
    n, e, m = (torch.zeros(*batch, data[k].shape[-1], dtype=p.dtype, device=p.device) for k in (1, 3, 5))
    layer = settings.layer(list(data), proof, has_searched)
    found = layer(Unknowns(n, e, m, torch.ones_like(m)), *on_all_levels(data))
    return found.x, found.equality, found.inequality


def _independent(program: Data, eps: float, on_failure: OnFailure) -> bool:
    """Whether all equations are independent; of lanes that are to be masked, the general layer finds out."""
    with marking(on_failure == "mask", program[1].shape[:-1], program[1]):
        return independent_equations(program, eps) is None


def _closest(data: Program, batch: torch.Size, settings: _Settings) -> Solution:
    """The same, of the closest feasible program where there is none."""

    def one(program: Program, shift: torch.Tensor | None, quietly: bool) -> Solution:
        own = settings if settings.search is None else replace(settings, solver=None)
        how = replace(own, on_failure="ignore", solver=None) if quietly else replace(own, shift=shift)
        return _solution(program, torch.Size([]), how)

    try:
        return _solution(data, batch, settings)
    except UNSOLVED:
        return closest(data, batch, one, settings.on_failure)


def _sparse_solution(given: dict[str, Any], settings: _Settings, init: Any) -> tuple[Any, Fold] | None:
    """x and the multipliers of a program with sparse matrices; None where that is not the plain path."""
    own = settings.solver is None or isinstance(settings.solver, ActiveSet)
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
    single = all(t.ndim == RANKS[k] and t.device.type == "cpu" for k, t in given.items() if isinstance(t, torch.Tensor))
    if not (own and single and settings.linear_solver is None and in_plain_surroundings(tensors)):
        return None
    _, data, fold = arguments(given)
    Q, p, A, b, G, h = data
    matrices, eps = (Q, A, G), torch.finfo(p.dtype).eps
    search = settings.starting(init, fold, torch.Size([]), len(h)).search
    assert isinstance(search, ActiveSet)
    arrays: list[Any] = [t.arrays() if isinstance(t, Entries) else t.detach().double().numpy() for t in data]
    proof = sparse_proof(SparseProgram(*arrays), None if search.start is None else search.start.numpy())
    if proof is None or not proof.settled(eps, settings.tolerances.active_rtol, _STATIONARITY_RTOL):
        return None
    rules = partial(_sparse_gradients, settings, matrices), partial(by_data, places=matrices)
    return ProvedProgram.apply(proof, rules, Q.values, p, A.values, b, G.values, h), fold


def _sparse_gradients(
    settings: _Settings, matrices: Sequence[Entries], z: Leaves, data: Leaves, cotangents: Pull, needed: Sequence[bool]
) -> Pull:
    """The gradients of a sparse program by way of the dense one: differentiable to every order."""
    given = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
    with torch.enable_grad():
        Q, A, G = (replace(place, values=t).dense() for place, t in zip(matrices, data[::2], strict=True))
        outputs = _solution((Q, data[1], A, data[3], G, data[5]), torch.Size([]), settings)
        wanted = [t for t, need in zip(data, needed, strict=True) if need]
        weights = [cotangents[i] for i in given]
        slopes = iter(torch.autograd.grad([outputs[i] for i in given], wanted, weights, create_graph=True))
    return [next(slopes) if need else None for need in needed]


def _general_gradients(
    settings: _Settings, proof: Proof, z: Leaves, data: Leaves, cotangents: Pull, needed: tuple[bool, ...]
) -> Pull:
    """The gradients of a proved program as a layer makes them: differentiable to every order, under every transform."""
    layer, spec, signature = settings.layer(data, proof, True), flatten(Unknowns(*z))[1], Signature.of(tuple(data))
    assert isinstance(layer.solver, QuadraticSolver)
    exact = proof.exact()
    layer.solver.prepared.extend([] if exact.factors is None else [exact.factors])
    layer.solver.balance.append(forces_beside(full_data(data, exact.error.shape), exact.solution))
    _, residual, _ = layer._equation(_scalar, spec, signature, ClosedOver())
    graph = None if derivatives_possible() else Graph(partial(residual.for_derivatives, z, data))
    v, solver, policy = fill(cotangents, z), layer.linear_solver, layer.on_failure
    by = Settings(solver, policy, damps=False, varying=settings.varying)
    return implicit_vjp(residual, z, data, v, needed, by, graph=graph)


class _QuadraticLayer(KktLayer):
    """The layer of :func:`_scalar`."""

    own_function: ClassVar[bool] = True

    def _equation(
        self, user_function: Callable[..., Any], x_spec: TreeSpec, signature: Signature, hidden: ClosedOver
    ) -> tuple[FlatFunction, Residual, Constraints | None]:
        function, residual, constraints = super()._equation(user_function, x_spec, signature, hidden)
        return function, replace(residual, written_out=partial(_Products, value=[], outputs=[])), constraints


def _scalar(
    z: Unknowns, Q: torch.Tensor, p: torch.Tensor, A: torch.Tensor, b: torch.Tensor, G: torch.Tensor, h: torch.Tensor
) -> torch.Tensor:
    """The scalar of the layer, one number per program; NOTE [the scalar] in ``_kkt_lagrangian``."""
    held = z.held.detach()
    x = z.x[..., None]
    value: torch.Tensor = (z.x * (0.5 * (Q @ x)[..., 0] + p)).sum(-1)
    if A.shape[-2]:
        value = value + (z.equality * ((A @ x)[..., 0] - b)).sum(-1)
    if G.shape[-2]:
        value = value + (held * z.inequality * ((G @ x)[..., 0] - h)).sum(-1)
        value = value - 0.5 * ((1 - held) * z.inequality * z.inequality).sum(-1)
        value = value + 0.5 * ((z.held - held) * (z.held - held)).sum(-1)
    return value


# With F the gradient of the scalar and a the mask of what is held,
#     F_x = Q x + p + A'y + G'(a z),   F_y = A x - b,   F_z = a (G x - h) - (1 - a) z,   F_a = 0,
# where Q stands for its symmetric part. Its matrix is symmetric, and for u = (u_x, u_y, u_z, u_a) the pull-backs
# (dF/dtheta)'u are read off <F, u>, term by term.


class _Products(Attached):
    """The products of F's derivatives at plain tensors."""

    def pull(self, u: Leaves) -> Leaves:
        held, (Q, _, A, _, G, _) = self.points[3], self.theta
        ux, uy, uz, ua = u
        pulled = (times(Q, ux) + times(Q.mT, ux)) / 2 + times(A.mT, uy) + times(G.mT, held * uz)
        return [pulled, times(A, ux), held * times(G, ux) - (1 - held) * uz, ua]

    def pull_theta(self, u: Leaves, needed: Sequence[bool]) -> list[torch.Tensor | None]:
        x, y, z, held = self.points
        return by_data((x, y, held * z), (u[0], u[1], held * u[2]), self.theta, needed)
