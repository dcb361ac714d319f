"""``il.qp``: convex quadratic programs as a layer, many at a time, differentiable in all their data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch

from implicitlayer import _torch
from implicitlayer.base._surroundings import outside_compiled_code
from implicitlayer.base._tree import TreeSpec, flatten
from implicitlayer.base._types import FlatFunction, Leaves, OnFailure
from implicitlayer.constrained._kkt import AtKink, KktLayer, Multipliers
from implicitlayer.constrained._kkt_lagrangian import Unknowns
from implicitlayer.constrained._qp_function import ProvedProgram, by_data, in_plain_surroundings
from implicitlayer.constrained._qp_solve import Proof, QuadraticSolver, cold_start, full_data
from implicitlayer.equation._capture import ClosedOver, derivatives_possible
from implicitlayer.equation._flat import Signature
from implicitlayer.equation._jacobian import Graph
from implicitlayer.equation._residual import Attached, Residual
from implicitlayer.equation._rules import implicit_vjp
from implicitlayer.equation._solve import fill
from implicitlayer.layer._forward import Constraints
from implicitlayer.programs._interior_point_step import times
from implicitlayer.programs._kkt_active import Tolerances
from implicitlayer.programs._kkt_linear import KktSolver
from implicitlayer.programs._qp_rank import independent_equations

__all__ = ["qp"]

_NO_BOUND = 1e20
_STATIONARITY_RTOL = 1e-6
# How many dimensions of each argument belong to one program.
_RANKS = {"Q": 2, "p": 1, "A": 2, "b": 1, "G": 2, "h": 1}


@outside_compiled_code
def qp(
    Q: torch.Tensor,
    p: torch.Tensor,
    A: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    G: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    *,
    solver: Callable[..., Any] | None = None,
    linear_solver: Callable[..., Any] | None = None,
    return_multipliers: bool = False,
    on_failure: OnFailure = "warn",
    active_rtol: float = 1e-8,
    at_kink: AtKink = "inactive",
) -> Any:
    """The x that minimises ``1/2 x'Qx + p'x`` subject to ``A x = b`` and ``G x <= h``, differentiable in all six.

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
        G: [*batch, m, n], h: [*batch, m]; both or neither. A bound of 1e20 or more, or inf, is none: its row is left
            out, lane by lane, and gets no gradient and a multiplier of zero.
            Leading dimensions are broadcast: an argument without them is shared by all programs, and its gradient is
            the sum over them.
        solver: ``solver(Q, p, A, b, G, h) -> x`` or ``(x, (y, z))`` with multipliers y of the equations and z >= 0 of
            the inequalities; called program by program, or once with all of them if it declares ``batched = True``. An
            answer whose conditions of optimality hold to 1e-2 of their terms is made exact, a worse one is judged as it
            is. Default: the interior-point method of :class:`il.solvers.InteriorPoint`.
        linear_solver: of the derivatives; default a dense symmetric indefinite solve.
        return_multipliers: return ``(x, Multipliers(equality, inequality))``, all differentiable.
        on_failure: ``"warn"``, ``"raise"``, ``"ignore"`` or ``"mask"``, as in :func:`constrained_argmin`. A
            program that is found to have no solution is an error under every policy but ``"mask"``, which makes it NaN.
        active_rtol: distance from a border, relative to the size of x, and force of a border, relative to the terms of
            the gradient, that count as zero.
        at_kink: what an inequality at a kink counts as for derivatives: ``"inactive"`` or ``"active"``.

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
    batch, (Q, p, A, b, G, h) = _checked({"Q": Q, "p": p, "A": A, "b": b, "G": G, "h": h})
    G, h = _without_missing(G, h)
    tolerances = Tolerances(_STATIONARITY_RTOL, active_rtol)
    if at_kink not in ("inactive", "active"):
        raise ValueError(f"at_kink={at_kink!r} must be 'inactive' or 'active'.")
    data, lanes = (Q, p, A, b, G, h), len(batch)

    def layer(proof: Proof | None, searched: bool) -> _QuadraticLayer:
        solve = QuadraticSolver(solver, tolerances, at_kink == "active", on_failure, proof, searched)
        sizes = p.shape[-1], b.shape[-1], h.shape[-1]
        default = linear_solver if linear_solver is not None else KktSolver(*sizes, prepared=solve.prepared)
        layer = _QuadraticLayer(_scalar, solve, default, "argmin", False, False, on_failure, None, 0, lanes)
        layer.found, layer.tolerances = solve.found, tolerances
        return layer

    proof, searched = None, False
    if solver is None and linear_solver is None and in_plain_surroundings(data):
        program, eps = full_data(data, batch), torch.finfo(p.dtype).eps
        searched = independent_equations(program, eps) is None
        proof = cold_start(program, p.dtype) if searched else None
        if proof is not None and proof.settled(eps, active_rtol, _STATIONARITY_RTOL):
            general = partial(_general_gradients, layer, proof)
            x, y, z = ProvedProgram.apply(proof, general, *data)
            return (x, Multipliers(y, z)) if return_multipliers else x
    zeros = [torch.zeros(*batch, k, dtype=p.dtype, device=p.device) for k in (p.shape[-1], b.shape[-1], h.shape[-1])]
    start = Unknowns(zeros[0], zeros[1], zeros[2], torch.ones_like(zeros[2]))
    found = layer(proof, searched)(start, *_on_all_levels(data))
    return (found.x, Multipliers(found.equality, found.inequality)) if return_multipliers else found.x


def _general_gradients(
    layer_of: Callable[[Proof | None, bool], _QuadraticLayer],
    proof: Proof,
    z: Leaves,
    data: Leaves,
    cotangents: list[torch.Tensor | None],
    needed: tuple[bool, ...],
) -> list[torch.Tensor | None]:
    """The gradients of a proved program as a layer makes them: differentiable to every order, under every transform."""
    layer, spec, signature = layer_of(proof, True), flatten(Unknowns(*z))[1], Signature.of(tuple(data))
    assert isinstance(layer.solver, QuadraticSolver)
    factors = proof.exact().factors
    layer.solver.prepared.extend([] if factors is None else [factors])
    _, residual, _ = layer._equation(_scalar, spec, signature, ClosedOver())
    graph = None if derivatives_possible() else Graph(partial(residual.for_derivatives, z, data))
    v, solver, policy = fill(cotangents, z), layer.linear_solver, layer.on_failure
    return implicit_vjp(residual, z, data, v, needed, graph=graph, solver=solver, on_failure=policy, kind="backward")


class _QuadraticLayer(KktLayer):
    """The layer of :func:`_scalar`."""

    own_function: ClassVar[bool] = True

    def _equation(
        self, user_function: Callable[..., Any], x_spec: TreeSpec, signature: Signature, hidden: ClosedOver
    ) -> tuple[FlatFunction, Residual, Constraints | None]:
        function, residual, constraints = super()._equation(user_function, x_spec, signature, hidden)
        return function, replace(residual, written_out=_written_out), constraints


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


def _written_out(unknowns: Leaves, data: Leaves) -> Attached:
    return _Products(unknowns, data, value=[], outputs=[])


class _Products(Attached):
    """The products of F's derivatives at plain tensors."""

    def pull(self, u: Leaves) -> Leaves:
        held, (Q, _, A, _, G, _) = self.points[3], self.theta
        ux, uy, uz, ua = u
        pulled = (times(Q, ux) + times(Q.mT, ux)) / 2 + times(A.mT, uy) + times(G.mT, held * uz)
        return [pulled, times(A, ux), held * (times(G, ux) + uz) - uz, ua]

    def pull_theta(self, u: Leaves, needed: Sequence[bool]) -> list[torch.Tensor | None]:
        x, y, z, held = self.points
        return by_data((x, y, held * z), (u[0], u[1], held * u[2]), self.theta, needed)


def _without_missing(G: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with 0'x <= 1 in place of rows without a bound; :data:`_NO_BOUND` is what most solvers take for none."""
    missing = h >= _NO_BOUND
    if not _torch.transforms_active() and not bool(missing.any()):
        return G, h
    return torch.where(missing[..., None], 0.0, G), torch.where(missing, 1.0, h)


def _checked(given: dict[str, torch.Tensor | None]) -> tuple[torch.Size, tuple[torch.Tensor, ...]]:
    """The batch dimensions, and all six with as many leading dimensions (of size one where they are shared)."""
    for name, tensor in given.items():
        if tensor is None and name not in ("Q", "p"):
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a real floating tensor, got {kind}. Use torch.as_tensor(..., dtype=...).")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} is sparse ({tensor.layout}); il.qp solves densely. Pass {name}.to_dense().")
    Q, p = given["Q"], given["p"]
    assert Q is not None and p is not None
    for matrix, vector in (("A", "b"), ("G", "h")):
        if (given[matrix] is None) != (given[vector] is None):
            raise ValueError(f"{matrix} and {vector} belong together: give both or neither.")
        if given[matrix] is None:
            given = {**given, matrix: p.new_zeros(0, p.shape[-1] if p.ndim else 0), vector: p.new_zeros(0)}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in tensors.items():
        if tensor.dtype != p.dtype or tensor.device != p.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but p is {p.dtype} on {p.device}. Bring all arguments "
                "to one dtype and device; float64 is recommended."
            )
        if tensor.ndim < _RANKS[name]:
            raise ValueError(
                f"{name} needs {_RANKS[name]} dimensions after those of the batch, got shape {_shape(tensor)}."
            )
    n = p.shape[-1]
    if not n:
        raise ValueError(f"p must have at least one entry per program, got shape {_shape(p)}.")
    expected = {"Q": (n, n), "A": (tensors["b"].shape[-1], n), "G": (tensors["h"].shape[-1], n)}
    for name, shape in expected.items():
        if tensors[name].shape[-2:] != shape:
            raise ValueError(
                f"{name} must end in dimensions {shape} to fit p and its right-hand side, got shape "
                f"{_shape(tensors[name])} with p {_shape(p)}."
            )
    leading = {name: tensor.shape[: tensor.ndim - _RANKS[name]] for name, tensor in tensors.items()}
    try:
        batch = torch.broadcast_shapes(*leading.values())
    except RuntimeError:
        shapes = {name: tuple(shape) for name, shape in leading.items()}
        raise ValueError(f"the batch dimensions do not fit together: {shapes}. They are broadcast.") from None
    k = len(batch)
    return batch, tuple(
        tensor.reshape(*[1] * (k - len(leading[name])), *tensor.shape) for name, tensor in tensors.items()
    )


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _on_all_levels(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, each with the lanes of every vmap level that one of them has.

    The solver sees the data with the lanes of all levels in front; it could not tell which level a lane belongs to if
    an argument had some of them only.
    """
    if not _torch.transforms_active():
        return list(tensors)
    zeros = [torch.zeros_like(t.detach().reshape(-1)[:1]).sum() for t in tensors]
    zero = torch.stack(zeros).sum()
    return [t + zero for t in tensors]
